"""The matrix of what works: a row for each mark ``supports`` of a test, which proves it.

python tests/support/support_matrix.py    # writes docs/support.md

@pytest.mark.supports("Saving", "shards", "load as one", "limits, if there are any")
"""

import ast
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).parents[2]
PAGE = REPOSITORY / "docs" / "support.md"
AREAS = (
    "Models", "Pipelines", "Schedulers", "Adapters and attention", "Training and gradients", "Saving and loading",
    "Offloading", "Casting", "Compiling, exporting, graphs", "Errors",
)  # fmt: skip
HEAD = """# What works

Each row is proved by the tests that it names; `python tests/support/support_matrix.py` writes this page from their
marks. The tests run on small random models on a CPU. [diffusers' own tests](../benchmarks/results/upstream.md) with
quantized UNets are a second proof, and list what is refused.
"""


class Row(NamedTuple):
    area: str
    feature: str
    holds: str
    limits: str
    test: str  # "runtime/test_lora.py::test_..."


def rows_of(source: str, file: str) -> list[Row]:
    """The rows of a file of tests.

    Raises:
        ValueError: if a mark has not three or four strings, or an area that is not in ``AREAS``.
    """
    rows = []
    for node in ast.parse(source).body:
        for mark in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
            if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.supports":
                texts = [ast.literal_eval(argument) for argument in mark.args]
                if not 3 <= len(texts) <= 4 or texts[0] not in AREAS:
                    raise ValueError(f"{file}::{node.name}: supports(area, feature, what holds[, limits]), got {texts}")
                rows.append(Row(*texts[:3], texts[3] if len(texts) == 4 else "", f"{file}::{node.name}"))
    return rows


def all_rows() -> list[Row]:
    """The rows of all tests."""
    tests = REPOSITORY / "tests"
    files = sorted(tests.rglob("test_*.py"))
    return [row for file in files for row in rows_of(file.read_text(), file.relative_to(tests).as_posix())]


def page(rows: list[Row]) -> str:
    """The page in Markdown: a table for each area; rows of one feature and wording are one."""
    lines = [HEAD]
    for area in AREAS:
        merged: dict[tuple[str, str, str], list[str]] = {}
        for row in rows:
            if row.area == area:
                merged.setdefault((row.feature, row.holds, row.limits), []).append(row.test)
        if merged:
            lines += [f"## {area}", "", "| feature | what holds | limits | tests |", "|---|---|---|---|"]
            for texts, tests in sorted(merged.items()):
                cells = (*texts, "<br>".join(f"`{test}`" for test in tests))
                lines.append(f"| {' | '.join(cells)} |")
            lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(all_rows()))
