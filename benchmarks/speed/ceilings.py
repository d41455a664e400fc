"""Measures a GPU's peak arithmetic and memory throughput, the reference for other timings.

    python -m benchmarks.speed.ceilings [--output benchmarks/results/ceilings_<device>.json]

Data is random, and times are medians over CUDA graphs. The measurements are a product of 8192 x 8192 x 8192 in fp16
(cuBLAS) and int8 (cuBLASLt, through ``torch._int_mm``), the same product with our INT4 weights in the fastest of a few
tiles, and a copy of 1 GiB, which counts bytes read and written.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from benchmarks import environment
from benchmarks.command_line import new_parser
from benchmarks.result_files import RESULTS
from benchmarks.speed.launches import Launch
from benchmarks.speed.problem import Problem
from benchmarks.speed.timing import graph_microseconds
from dq_kernels.triton.tuning import LaunchConfig

SIZE = 8192
COPIED_BYTES = 2**30
TILES = ((128, 128, 64, 8, 3, 8), (128, 128, 64, 8, 4, 16), (64, 128, 128, 4, 3, 16), (256, 128, 64, 8, 3, 8))


def measure() -> dict[str, float]:
    """The measured TFLOP/s, TOP/s and TB/s."""
    operations = 2 * SIZE**3
    a, b = (torch.randn(SIZE, SIZE, device="cuda", dtype=torch.float16) for _ in range(2))
    q, w = (torch.randint(-128, 128, (SIZE, SIZE), device="cuda", dtype=torch.int8) for _ in range(2))
    problem = Problem(Launch("linear", SIZE, SIZE, SIZE, (1, SIZE, SIZE), (SIZE, SIZE // 2)), "cuda", copies=1)
    source = torch.empty(COPIED_BYTES, device="cuda", dtype=torch.int8)
    target = torch.empty_like(source)

    def int4_microseconds(tile: tuple[int, ...]) -> float:
        return graph_microseconds(lambda _: problem.run(LaunchConfig(*tile)), 1)

    return {
        "fp16_tflops": operations / graph_microseconds(lambda _: torch.mm(a, b), 1) / 1e6,
        "int8_tops": operations / graph_microseconds(lambda _: torch._int_mm(q, w.t()), 1) / 1e6,
        "int4_tops": operations / min(map(int4_microseconds, TILES)) / 1e6,
        "copy_tbps": 2 * COPIED_BYTES / graph_microseconds(lambda _: target.copy_(source), 1) / 1e6,
    }


def main() -> None:
    """Runs the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--output", type=Path, help="the JSON file (default: named after the device)")
    arguments = parser.parse_args()
    about = environment.describe()
    name = f"ceilings_{environment.slug(about['device'])}.json"
    output = arguments.output or RESULTS / name
    ceilings = measure()
    output.write_text(json.dumps({**about, **ceilings}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(ceilings, indent=1))


if __name__ == "__main__":
    main()
