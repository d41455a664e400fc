"""Rows of results in a file, one line of JSON each, on disk as soon as they are known."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def append(path: Path | None, row: Row) -> None:
    """Prints a row and, with a path, adds it to the file; a kill afterwards does not lose it."""
    line = json.dumps(row)
    print(line, flush=True)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())


def read(path: Path) -> list[Row]:
    """The rows of a file; none if there is no file. A line that a kill cut off is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
