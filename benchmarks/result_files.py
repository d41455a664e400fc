"""Where results go, and results files that are whole whenever a run is stopped."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]  # of the repository
RESULTS = Path(__file__).parent / "results"


def write_whole(path: Path, text: str) -> None:
    """Replaces a file, or makes it and its folder; nobody ever reads half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
