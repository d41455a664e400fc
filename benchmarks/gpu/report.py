"""Tables of a GPU's results, in Markdown, and their places in the documents.

    python -m benchmarks.gpu.report benchmarks/results/gpu_<device> [--documents]

It writes ``report.md`` into the folder. With ``--documents`` it also replaces each table in README.md and
docs/measurements.md that stands between the lines ``<!-- gpu: NAME -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.command_line import new_parser
from benchmarks.gpu.row_file import read
from benchmarks.result_files import ROOT, write_whole

DOCUMENTS = ("README.md", "docs/measurements.md")
RACES = ("race", "race_compiled", "race_tuned")
MOST_KERNELS = 15  # in the table of a profile


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown; numbers have three digits, None is a hyphen."""
    lines = [list(columns), ["---"] * len(columns), *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def _unet_rows(folder: Path, name: str) -> list[dict[str, Any]]:
    path = folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []


def _time(row: dict[str, Any]) -> float:
    """Milliseconds, in turn with the other rows if they were."""
    return row["in_turn_ms"] or row["median_ms"]


def race(folder: Path) -> str:
    """INT4 beside fp16, batch 2: one table for each process, in which alone ratios mean something."""
    tables = []
    for name in RACES:
        rows = _unet_rows(folder, name)
        ours = {row["unet"]: _time(row) for row in rows if row["row"] == "int4 graph"}
        cells = [
            [
                row["unet"], row["row"], row["median_ms"], row["back_to_back_ms"], row["in_turn_ms"], row["weights_mb"],
                row["peak_mb"], row["launches"], _time(row) / ours[row["unet"]] if row["unet"] in ours else None,
            ]
            for row in rows
        ]  # fmt: skip
        columns = ("UNet", "row", "one call, ms", "back to back, ms", "in turn, ms", "weights, MB", "peak, MB",
                   "launches", "INT4 graph is faster by")  # fmt: skip
        tables += [table(columns, cells)] if cells else []
    return "\n\n".join(tables)


def optimisations(folder: Path) -> str:
    """The time that each optimisation saves in the whole UNet."""
    rows = [*_unet_rows(folder, "optimisations"), *_unet_rows(folder, "adapters")]
    ours = {row["unet"]: row["median_ms"] for row in rows if row["row"] == "int4 graph"}
    cells = [
        [row["unet"], row["row"], row["median_ms"], row["median_ms"] / ours[row["unet"]], row["launches"]]
        for row in rows
        if row["unet"] in ours
    ]
    return table(("UNet", "row", "ms", "over INT4 graph", "launches"), cells) if cells else ""


def batches(folder: Path) -> str:
    """Other batch sizes."""
    rows = _unet_rows(folder, "batches")
    ours = {(row["unet"], row["batch"]): _time(row) for row in rows if row["row"] == "int4 graph"}
    cells = [
        [row["unet"], row["batch"], row["row"], _time(row), _time(row) / ours[key]]
        for row in rows
        if (key := (row["unet"], row["batch"])) in ours
    ]
    return table(("UNet", "batch", "row", "ms", "INT4 graph is faster by"), cells) if cells else ""


def profile(folder: Path) -> str:
    """The kernels that take the most time, of each UNet and row."""
    tables = []
    rows = read(folder / "profile.jsonl")
    for unet, name in dict.fromkeys((row["unet"], row["row"]) for row in rows):
        kernels = [row for row in rows if (row["unet"], row["row"]) == (unet, name)]
        total = sum(row["us"] for row in kernels)
        cells = [
            [row["kernel"], row["grid"], row["launches"], row["us"], f"{row['us'] / total:.1%}", row["registers"]]
            for row in kernels[:MOST_KERNELS]
        ]
        heading = f"{unet}, {name}: {total / 1000:.2f} ms in {sum(row['launches'] for row in kernels):.0f} launches"
        tables.append(f"{heading}\n\n" + table(("kernel", "grid", "launches", "µs", "share", "registers"), cells))
    return "\n\n".join(tables)


def checks(folder: Path) -> str:
    """What was compared bit for bit, the tests, and the decision about the Hopper GEMM."""
    operators, launches = read(folder / "operators.jsonl"), read(folder / "equalities.jsonl")
    decisions = [row for row in read(folder / "hopper_gemm.jsonl") if "decision" in row]
    lines = [
        f"- operators equal to their oracles: {sum(row['passed'] for row in operators)} of {len(operators)}",
        f"- forms of launches equal to the plain one in every repeat: "
        f"{sum(row['differing'] == 0 for row in launches)} of {len(launches)}",
        *(f"- GEMM in Gluon: {json.dumps(row)}" for row in decisions[-1:]),
    ]
    return "\n".join(lines)


TABLES: dict[str, Callable[[Path], str]] = {
    "checks": checks,
    "race": race,
    "optimisations": optimisations,
    "batches": batches,
    "profile": profile,
}


def replaced(document: str, name: str, text: str) -> str:
    """A document with a table in its place; unchanged if it has no such place."""
    place = re.compile(rf"(<!-- gpu: {name} -->\n).*?(\n<!-- end -->)", re.DOTALL)
    return place.sub(lambda found: found[1] + text + found[2], document)


def main() -> None:
    """Runs the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--documents", action="store_true")
    arguments = parser.parse_args()
    about = json.loads((arguments.folder / "suite.json").read_text(encoding="utf-8"))
    steps = about.pop("steps")
    made = {name: text for name, make in TABLES.items() if (text := make(arguments.folder))}
    outcomes = table(("step", "outcome", "seconds"), [(n, s["outcome"], s.get("seconds")) for n, s in steps.items()])
    parts = [f"# {about['device']}", f"`{json.dumps(about)}`", outcomes]
    parts += [f"## {name.capitalize()}\n\n{text}" for name, text in made.items()]
    write_whole(arguments.folder / "report.md", "\n\n".join(parts) + "\n")
    print(arguments.folder / "report.md")
    for path in (ROOT / name for name in DOCUMENTS if arguments.documents):
        text = path.read_text(encoding="utf-8")
        for name, made_table in made.items():
            text = replaced(text, name, made_table)
        write_whole(path, text)


if __name__ == "__main__":
    main()
