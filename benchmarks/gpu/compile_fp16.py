"""Compiles the fp16 UNets into the compiler's cache, so that their rows of the race start at once.

    TORCHINDUCTOR_CACHE_DIR=out/inductor python -m benchmarks.gpu.compile_fp16 [--unet sd15]... [--rows FILE]

Compilation takes minutes and needs no quiet machine. ``out/inductor_artifacts`` keeps the cache in files of 16 MiB at
most, to be carried to another machine of the same kind; they are loaded first. Only the compilation is timed here.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import unets
from benchmarks.command_line import new_parser
from benchmarks.gpu.row_file import append
from benchmarks.result_files import ROOT
from benchmarks.speed.unet_rows import rows

ARTIFACTS = ROOT / "out" / "inductor_artifacts"
PART = 16 * 2**20  # bytes of a file
ROWS = ("fp16 compiled, graph", "fp16 compiled blocks, graph")


def save(folder: Path, artifacts: bytes) -> None:
    """Writes bytes as numbered files; older ones are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.bin"):
        old.unlink()
    for number, start in enumerate(range(0, len(artifacts), PART)):
        (folder / f"{number:03}.bin").write_bytes(artifacts[start : start + PART])


def load(folder: Path) -> bytes:
    """The bytes that ``save`` wrote; empty if there are none."""
    return b"".join(part.read_bytes() for part in sorted(folder.glob("*.bin")))


def compile_row(name: str, row: Any, device: str) -> None:
    """Builds a row's UNet and calls it once."""
    with torch.no_grad():
        row.make()(**unets.inputs(name, 2, device, row.dtype))


def main() -> None:
    """Runs the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--unet", action="append", choices=unets.CONFIGS, help="may be repeated (default: sd15, sdxl)")
    parser.add_argument("--rows", type=Path, help="file that gets each row at once, one line of JSON each")
    parser.add_argument("--dry-run", action="store_true", help="compiles nothing")
    arguments = parser.parse_args()
    artifacts = load(ARTIFACTS)
    if artifacts:
        torch.compiler.load_cache_artifacts(artifacts)
    for name in arguments.unet or ("sd15", "sdxl"):
        for row in rows(name, "cuda"):
            if row.name not in ROWS:
                continue
            start = time.monotonic()
            if not arguments.dry_run:
                compile_row(name, row, "cuda")
                saved = torch.compiler.save_cache_artifacts()
                if saved is not None:
                    save(ARTIFACTS, saved[0])
            append(arguments.rows, {"unet": name, "row": row.name, "seconds": round(time.monotonic() - start, 1)})


if __name__ == "__main__":
    main()
