"""The folder of the results, and atomic writes of results files."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]  # the repository
RESULTS = Path(__file__).parent / "results"


def write_whole(path: Path, text: str) -> None:
    """Writes a file atomically, and makes its folder: no reader sees a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
