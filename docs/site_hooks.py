"""Puts the pages and figures of ``benchmarks/results`` into the site; documents link to them in the repository."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
IN_REPOSITORY, IN_SITE = "../benchmarks/results/", "results/"


def on_files(files: Files, config: Any) -> Files:
    """Adds them as ``results/NAME``."""
    for path in sorted([*RESULTS.glob("*.md"), *RESULTS.glob("*.png")]):
        files.append(File.generated(config, IN_SITE + path.name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Points links to them."""
    return markdown.replace(IN_REPOSITORY, IN_SITE)
