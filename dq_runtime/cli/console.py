"""What commands print: progress and tables on stderr, and with ``--json`` one object on stdout.

Of several processes that run one command together, the first alone prints.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def are_several_processes() -> bool:
    """True under ``torchrun`` or ``accelerate launch`` with more than one process."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def is_first_process() -> bool:
    """True in one of several processes, and in a single one."""
    return not are_several_processes() or os.environ["RANK"] == "0"


def say(text: str) -> None:
    """One line on stderr, as it is."""
    if is_first_process():
        print(text, file=sys.stderr, flush=True)


def show(report: Mapping[str, Any], as_json: bool, *tables: Any) -> None:
    """Prints a command's result on stdout: the report as JSON, or rich's tables and texts."""
    if not is_first_process():
        return
    if as_json:
        print(json.dumps(_finite(report), indent=1, allow_nan=False))
        return
    from rich.console import Console

    console = Console(markup=False, highlight=False)  # prompts may hold brackets
    for table in tables:
        console.print(table)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Any:
    """A table of rich; all columns but the first are aligned to the right."""
    from rich.table import Table

    made = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        made.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in rows:
        made.add_row(*map(str, row))
    return made


def duration(seconds: float) -> str:
    """12 s, 3 min or 1.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 1 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    """Bytes as kB, MB or GB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null instead."""
    if isinstance(value, Mapping):
        return {str(name): _finite(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
