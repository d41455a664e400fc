"""Where the time of a forward pass goes, kernel by kernel.

    python -m benchmarks.gpu.profile_unets [--unet sd15]... [--row 'int4 graph']... [--rows FILE]

PyTorch's profiler traces three replays of the captured forward pass. Kernels of one name and one grid are added up. A
row has their number and microseconds in one pass, and their grid, block, registers and shared memory; the first ones
take the most time. ``--dry-run`` profiles nothing.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks import unets
from benchmarks.command_line import new_parser
from benchmarks.gpu.row_file import Row, append
from benchmarks.speed.unet_rows import rows
from dq_runtime.graphs import enable_cuda_graphs

REPLAYS = 3
DEFAULT_ROWS = ("int4 graph", "fp16 graph")
ON_THE_GPU = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of a trace's events


def by_kernel(events: Iterable[dict[str, Any]], passes: int) -> list[Row]:
    """A trace's events on the GPU, added up by name and grid; the longest first."""
    kernels: dict[Any, Row] = {}
    for event in events:
        if event.get("cat") not in ON_THE_GPU:
            continue
        details = event.get("args", {})
        key = event["name"], str(details.get("grid"))
        kernel = kernels.setdefault(
            key,
            {
                "kernel": event["name"][:120],
                "grid": details.get("grid"),
                "block": details.get("block"),
                "registers": details.get("registers per thread"),
                "shared_bytes": details.get("shared memory"),
                "launches": 0,
                "us": 0.0,
            },
        )
        kernel["launches"] += 1 / passes
        kernel["us"] += event["dur"] / passes
    for kernel in kernels.values():
        kernel["launches"], kernel["us"] = round(kernel["launches"], 2), round(kernel["us"], 2)
    return sorted(kernels.values(), key=lambda kernel: -kernel["us"])


def trace(call: Callable[[], Any]) -> list[dict[str, Any]]:
    """The events of several calls."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(REPLAYS):
            call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        return json.loads(path.read_text(encoding="utf-8"))["traceEvents"]


@torch.no_grad()
def profile_row(name: str, row: Any) -> list[Row]:
    """The kernels of one row of ``unet_rows``."""
    torch.manual_seed(0)
    with row.without():
        unet = row.make()
        arguments = unets.inputs(name, 2, "cuda", row.dtype)
        if row.replays:
            enable_cuda_graphs(unet)
        for _ in range(3):
            unet(**arguments)
    return by_kernel(trace(lambda: unet(**arguments)), REPLAYS)


def main() -> None:
    """Runs the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--unet", action="append", choices=unets.CONFIGS, help="may be repeated (default: sd15, sdxl)")
    parser.add_argument("--row", action="append", default=[], help=f"may be repeated (default: {DEFAULT_ROWS})")
    parser.add_argument("--rows", type=Path, help="file that gets each row at once, one line of JSON each")
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    if arguments.dry_run:
        return
    torch.backends.cudnn.benchmark = True
    for name in arguments.unet or ("sd15", "sdxl"):
        for row in rows(name, "cuda"):
            if row.name in (arguments.row or DEFAULT_ROWS):
                for kernel in profile_row(name, row):
                    append(arguments.rows, {"unet": name, "row": row.name, **kernel})


if __name__ == "__main__":
    main()
