"""What must be equal bit for bit on a GPU: operators and their oracles, launches with and without each optimisation.

    python -m benchmarks.gpu.equalities [--operators] [--unet sd15]... [--repeats 20] [--rows FILE]

With ``--operators``, each public operator is compared with its oracle (``dq_kernels.self_check``). Otherwise the
largest GEMM launch of each kind in the UNets runs in its plain form: two products a step, no split of the reduction, no
programmatic launch. Then it runs as it is shipped, split, with programmatic launches, and with one product a step, many
times without a sync between: a race between tiles, or between a kernel and the next one, gives another result at some
time. Sums are exact integers, so every result must equal the plain one. ``--dry-run`` runs tiny launches in Triton's
interpreter. The exit code is 1 if anything differs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.command_line import new_parser
from benchmarks.gpu.row_file import Row, append
from benchmarks.speed.launches import TINY, Launch, launches
from benchmarks.speed.problem import Problem
from benchmarks.speed.unet_rows import OPTIMISATIONS
from dq_kernels.self_check import check_operators
from dq_kernels.triton.tuning import LaunchConfig, architecture, tuned_config

JOINED, PROGRAMMATIC = "one product a step", "programmatic launches"
TINY_CONFIG = LaunchConfig(16, 16, 16, 4, 2)
SPLIT = 4
LEAST_STEPS = 8  # of the loop over the reduction, where it is split


def kinds(counted: dict[Launch, int]) -> list[Launch]:
    """The largest launch of each kind, the most expensive kind first."""
    largest: dict[Any, Launch] = {}
    for launch in sorted(counted, key=lambda launch: launch.operations):
        options = (launch.stride, launch.upsample, launch.residual, launch.channel_add, launch.statistics)
        largest[launch.op, options] = launch
    return sorted(largest.values(), key=lambda launch: -launch.operations)


def config_of(launch: Launch, device: str) -> LaunchConfig:
    """The shipped configuration."""
    if device == "cpu":
        return TINY_CONFIG
    return tuned_config(architecture(), launch.op, launch.rows, launch.out_channels, launch.reduction)


def results(problem: Problem, config: LaunchConfig, repeats: int) -> Iterator[torch.Tensor]:
    """What each of several launches writes; nothing waits between them, and memory that one leaves out is not zero."""
    written = []
    for _ in range(repeats):
        problem.out.fill_(float("nan") if problem.out.is_floating_point() else 99)
        problem.run(config)
        written.append(problem.out.clone())
    yield from written


def compared(launch: Launch, device: str, repeats: int) -> Iterator[Row]:
    """One row for each form of a launch: how many of its results differ from the plain form's."""
    torch.manual_seed(0)
    problem = Problem(launch, device, copies=1)
    shipped = config_of(launch, device)
    plain = replace(shipped, split_k=1)
    with OPTIMISATIONS[JOINED](), OPTIMISATIONS[PROGRAMMATIC]():
        (expected,) = results(problem, plain, 1)
    forms = {
        "as shipped": ((), shipped),
        JOINED: ((PROGRAMMATIC,), plain),
        PROGRAMMATIC: ((JOINED,), plain),
    }
    if launch.op != "linear_geglu" and launch.reduction // (2 * shipped.block_k) >= LEAST_STEPS:
        forms["split-K"] = ((JOINED, PROGRAMMATIC), replace(shipped, split_k=SPLIT))
    for form, (without, config) in forms.items():
        with contextlib.ExitStack() as stack:
            for name in without:
                stack.enter_context(OPTIMISATIONS[name]())
            differing = sum(not torch.equal(result, expected) for result in results(problem, config, repeats))
        shape = [launch.rows, launch.out_channels, launch.reduction]
        yield {"op": launch.op, "shape": shape, "config": config.to_list(), "form": form, "repeats": repeats,
               "differing": differing}  # fmt: skip


def main() -> None:
    """Runs the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--operators", action="store_true")
    parser.add_argument("--unet", action="append", help="may be repeated (default: sd15 and sdxl)")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--rows", type=Path, help="file that gets each row at once, one line of JSON each")
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    device = "cpu" if arguments.dry_run else "cuda"
    record = partial(append, arguments.rows)
    wrong = 0
    if arguments.operators:
        for check in check_operators(torch.device(device)):
            record({"operator": check.operator, "passed": check.passed, "detail": check.detail})
            wrong += not check.passed
    else:
        counted = dict.fromkeys(TINY, 1) if arguments.dry_run else {}
        for name in () if arguments.dry_run else arguments.unet or ("sd15", "sdxl"):
            counted |= launches(name, 2)
        for launch in kinds(counted):
            for row in compared(launch, device, arguments.repeats if device == "cuda" else 1):
                record(row)
                wrong += row["differing"] > 0
    if wrong:
        raise SystemExit(f"{wrong} rows differ")


if __name__ == "__main__":
    main()
