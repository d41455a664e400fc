"""Decides whether the Hopper GEMM may take the place of Triton's: are its integers equal, and is it faster?

    python -m benchmarks.gpu.hopper_gemm [--rows FILE] [--shapes 6]

For the linear layers of SD1.5 and SDXL at batch 2 with the most operations, and each tile of ``hopper_gemm``: whether
the sums equal those of ``gemm`` bit for bit, whether the fp16 results do, and the times of both, with the weights out
of the L2 cache. Each row is written at once, one line of JSON. The last row is the decision: "on" if all integers are
equal and the forward pass of each UNet gains time, with the tiles that a launch would choose. Where the GEMM cannot
run, the only row says why.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.command_line import new_parser
from benchmarks.gpu.row_file import Row, append
from benchmarks.speed.launches import Launch, launches
from benchmarks.speed.problem import Problem
from benchmarks.speed.timing import graph_microseconds
from dq_kernels.triton import hopper_gemm
from dq_kernels.triton.gemm import Epilogue
from dq_kernels.triton.launch import current_target
from dq_kernels.triton.tuning import LaunchConfig, architecture, missing_for_hopper_gemm, tuned_config

UNETS = ("sd15", "sdxl")


def served(unet: str) -> list[tuple[Launch, int]]:
    """The launches of a fused UNet that the Hopper GEMM serves, and the number of each, the most operations first."""
    found = [(launch, number) for launch, number in launches(unet, 2).items() if is_served(launch)]
    return sorted(found, key=lambda pair: -pair[0].operations * pair[1])


def is_served(launch: Launch) -> bool:
    """As ``gemm.launch`` and ``hopper_gemm.serves`` decide, for aligned tensors."""
    is_plain = launch.op == "linear" and not launch.statistics and not launch.channel_add
    return (
        is_plain
        and launch.reduction % (2 * hopper_gemm.ALIGNMENT) == 0
        and launch.rows >= hopper_gemm.TILES[-1].block_m
    )


def run_tile(problem: Problem, tile: LaunchConfig, copy: int = 0) -> None:
    """Launches the Hopper GEMM on a problem's operands."""
    bias, residual = problem.epilogue.bias, problem.epilogue.residual
    hopper_gemm.launch(problem.x, problem.weights[copy], problem.quantizer, problem.out, bias, residual, None, tile)


def result(problem: Problem, run: Callable[[], Any]) -> torch.Tensor:
    """What a launch writes; memory that it leaves out is NaN."""
    problem.out.fill_(float("nan"))
    run()
    return problem.out.clone()


def sums(problem: Problem) -> Problem:
    """The same problem with scales 1 and a plain epilogue in fp32, which holds the integer sums exactly."""
    plain = Problem(problem.launch, problem.x.device.type, copies=1)
    weight = plain.weights[0]
    plain.weights = [weight._replace(scale=torch.ones_like(weight.scale))]
    plain.quantizer = plain.quantizer._replace(scale=torch.ones_like(plain.quantizer.scale))
    plain.out = plain.out.float()
    plain.epilogue = Epilogue()
    return plain


def rows_of(unet: str, launch: Launch, number: int) -> list[Row]:
    """One row for each tile."""
    problem = Problem(launch, "cuda")
    config = tuned_config(architecture(), launch.op, launch.rows, launch.out_channels, launch.reduction)
    integers = sums(problem)
    expected_sums = result(integers, partial(integers.run, config))
    expected = result(problem, partial(problem.run, config))
    triton_us = graph_microseconds(partial(problem.run, config), problem.copies)
    rows_per_sample = launch.rows // launch.x[0]
    chosen = hopper_gemm.tile_for(launch.rows, launch.out_channels, rows_per_sample)
    # The largest tile is never chosen for tiles with rows of several samples: it would spill.
    tiles = hopper_gemm.TILES[1:] if rows_per_sample % hopper_gemm.TILES[0].block_m else hopper_gemm.TILES
    return [
        {
            "unet": unet,
            "shape": [launch.rows, launch.out_channels, launch.reduction],
            "residual": launch.residual,
            "number": number,
            "tile": tile.to_list(),
            "is_chosen": tile == chosen,
            "integers_equal": torch.equal(result(integers, partial(run_tile, integers, tile)), expected_sums),
            "results_equal": torch.equal(result(problem, partial(run_tile, problem, tile)), expected),
            "us": round(graph_microseconds(partial(run_tile, problem, tile), problem.copies), 2),
            "triton_us": round(triton_us, 2),
        }
        for tile in tiles
    ]


def decision(rows: list[Row]) -> Row:
    """The last row: what the others decide; ``us_saved`` is for one forward pass of each UNet, losses included."""
    chosen = [row for row in rows if row["is_chosen"]]
    saved = dict.fromkeys((row["unet"] for row in rows), 0.0)
    for row in chosen:
        saved[row["unet"]] += row["number"] * (row["triton_us"] - row["us"])
    integers_equal = all(row["integers_equal"] for row in rows)
    return {
        "decision": "on" if integers_equal and min(saved.values()) > 0 else "off",
        "integers_equal": integers_equal,
        "results_equal": all(row["results_equal"] for row in rows),
        "faster": f"{sum(row['us'] < row['triton_us'] for row in chosen)} of {len(chosen)} layers",
        "us_saved": {unet: round(time, 1) for unet, time in saved.items()},
    }


def main() -> None:
    """Runs the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--shapes", type=int, default=6, help="layers of each UNet (default: %(default)s)")
    parser.add_argument("--rows", type=Path, help="file that gets each row at once, one line of JSON each")
    arguments = parser.parse_args()

    record = partial(append, arguments.rows)
    missing = missing_for_hopper_gemm(current_target())
    if missing is not None:
        record({"decision": "not run", "reason": missing})
        return
    rows: list[Row] = []
    for unet in UNETS:
        for launch, number in served(unet)[: arguments.shapes]:
            for row in rows_of(unet, launch, number):
                rows.append(row)
                record(row)
    record(decision(rows))


if __name__ == "__main__":
    main()
