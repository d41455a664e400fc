"""Launch configurations of the GEMM, looked up by architecture, operator and shape, and adjusted to the launch.

``tuning/<architecture>.json`` lists shapes with the configuration that is best for each, and says whether that was
measured or chosen from the compiler's report. A launch takes the nearest listed shape. Nothing is ever tuned at run
time; ``make tune`` writes these files.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import astuple, dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget

from dq_kernels.shapes import STATISTICS_ROWS
from dq_kernels.triton.launch import current_device, target_of

FOLDER = Path(__file__).parent / "tuning"
# Compute capability -> tuning file: its own, or that of a GPU with the same matrix instructions and no more shared
# memory. sm_120 has 99 KB a block, as Ada. A newer GPU than the last takes the newest file that it can run.
FILES = {80: "sm_80", 86: "sm_89", 89: "sm_89", 90: "sm_90", 100: "sm_90", 103: "sm_90", 120: "sm_89"}
AMD_FILE = "gfx942"
# Whether linear layers use the GEMM in Gluon (``hopper_gemm``), which no device has timed yet.
HOPPER_GEMM = os.environ.get("DQ_HOPPER_GEMM", "0") == "1"
# Gluon has other names in each release: these are those whose machine code was checked.
HOPPER_GEMM_TRITONS = ("3.5", "3.6", "3.7", "3.8", "3.9")


@dataclass(frozen=True)
class LaunchConfig:
    """Tile sizes and pipeline of one launch.

    ``block_k`` counts packed bytes, so two input channels each; ``group_m`` tiles along the rows share a pass over the
    weights; ``split_k`` programs share a tile.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 1
    split_k: int = 1

    def with_whole_runs(self, rows: int) -> LaunchConfig:
        """The same with tiles of a whole number of ``rows``."""
        return self if self.block_m % rows == 0 else replace(self, block_m=rows)

    def with_fewer_registers(self) -> LaunchConfig:
        """The same with tiles of fewer than 64 accumulators a thread, which leaves registers for the epilogue."""
        if self.block_m * self.block_n < 64 * 32 * self.num_warps:
            return self
        return replace(self, block_m=min(self.block_m, 64), block_n=min(self.block_n, 64), num_warps=4)

    def to_list(self) -> list[int]:
        """As it stands in the JSON, in the order of the fields."""
        return list(astuple(self))


@dataclass(frozen=True)
class TunedShape:
    """One entry of a tuning file: the GEMM's [rows, reduction] x [reduction, out_channels], and how to launch it."""

    op: str  # "linear", "linear_geglu" or "conv2d"
    rows: int
    out_channels: int
    reduction: int
    config: LaunchConfig

    def distance(self, rows: int, out_channels: int, reduction: int) -> float:
        """The number of doublings between this shape and another."""
        return (
            abs(math.log2(self.rows / rows))
            + abs(math.log2(self.out_channels / out_channels))
            + abs(math.log2(self.reduction / reduction))
        )


def read_tuning(path: Path) -> tuple[dict[str, Any], tuple[TunedShape, ...]]:
    """A tuning file: where it comes from, and its shapes."""
    document = json.loads(path.read_text(encoding="utf-8"))
    shapes = (
        TunedShape(op, rows, out_channels, reduction, LaunchConfig(*config))
        for op, rows, out_channels, reduction, config in document.pop("shapes")
    )
    return document, tuple(shapes)


@cache
def tuned_shapes(architecture: str) -> tuple[TunedShape, ...]:
    """The shapes of an architecture's shipped file, read once a process."""
    return read_tuning(FOLDER / f"{architecture}.json")[1]


def architecture() -> str:
    """The tuning file for the current GPU; without a known one, for the oldest in the list."""
    return _file_of(current_device())


@cache
def _file_of(device: int | None) -> str:
    target = target_of(device)
    if target is not None and target.backend == "hip":
        return AMD_FILE
    if target is None or target.backend != "cuda":
        return FILES[min(FILES)]
    return FILES[max((number for number in FILES if number <= target.arch), default=min(FILES))]


def joins_halves(target: GPUTarget | None) -> bool:
    """True if the GEMM's main loop joins its products into one a step: on Hopper, whose ``wgmma`` is asynchronous.

    Triton waits for it after each product whose operand A is in registers. Elsewhere joining adds instructions.
    """
    return target is not None and target.backend == "cuda" and target.arch == 90


def missing_for_hopper_gemm(target: GPUTarget | None) -> str | None:
    """What the GEMM in Gluon needs and what is here, if it cannot run here; otherwise None."""
    is_hopper = target is not None and target.backend == "cuda" and target.arch == 90
    if is_hopper and ".".join(triton.__version__.split(".")[:2]) in HOPPER_GEMM_TRITONS:
        return None
    found = "no GPU" if target is None else f"a GPU of architecture {target.backend} {target.arch}"
    oldest, newest = HOPPER_GEMM_TRITONS[0], HOPPER_GEMM_TRITONS[-1]
    return (
        f"the GEMM in Gluon needs a GPU of architecture cuda 90 and Triton {oldest} to {newest}; "
        f"here are {found} and Triton {triton.__version__}"
    )


def uses_hopper_gemm(target: GPUTarget | None) -> bool:
    """True if ``DQ_HOPPER_GEMM=1`` asks for the GEMM in Gluon.

    Raises:
        RuntimeError: it was asked for and cannot run here.
    """
    if HOPPER_GEMM and (missing := missing_for_hopper_gemm(target)) is not None:
        raise RuntimeError(f"DQ_HOPPER_GEMM=1, but {missing}. Unset DQ_HOPPER_GEMM: Triton's GEMM has the same results")
    return HOPPER_GEMM


class Problem(NamedTuple):
    """The properties of a GEMM that decide its launch: [rows, reduction] x [reduction, out_channels], and the epilogue.

    Attributes:
        op: "linear", "linear_geglu" (two weight tiles a program) or "conv2d".
        rows: samples x positions of the result.
        out_channels: N of the result.
        reduction: input channels x taps.
        rows_per_sample: positions of the result.
        with_statistics: whether the epilogue sums runs of ``STATISTICS_ROWS`` rows.
    """

    op: str
    rows: int
    out_channels: int
    reduction: int
    rows_per_sample: int
    with_statistics: bool = False


def launch_config(problem: Problem) -> LaunchConfig:
    """The configuration with which a GEMM is launched."""
    config = tuned_config(architecture(), problem.op, problem.rows, problem.out_channels, problem.reduction)
    return adjusted(config, problem)


def adjusted(config: LaunchConfig, problem: Problem) -> LaunchConfig:
    """A tuned configuration, changed where a launch needs more than the plain product.

    The halves of GEGLU are multiplied before they are stored, so their sums cannot be split. A tile with statistics
    holds whole runs. Rows of several samples have a scale each, for which threads need registers.
    """
    if problem.op == "linear_geglu" and config.split_k > 1:
        config = replace(config, split_k=1)
    if problem.with_statistics:
        config = config.with_whole_runs(STATISTICS_ROWS)
    if problem.rows_per_sample % config.block_m:
        config = config.with_fewer_registers()
    return config


def register_limit(config: LaunchConfig, problem: Problem, target: GPUTarget | None) -> dict[str, int]:
    """Options of a launch: 128 registers a thread at most, where joined products would take a few more.

    So a multiprocessor holds 16 warps, as without joining, and one block's loop hides another's epilogue. The limit is
    for tiles with 64 accumulators a thread and a plain epilogue: nothing spills (see the static report).
    """
    tiles = 2 if problem.op == "linear_geglu" else 1
    accumulators = tiles * config.block_m * config.block_n // (32 * config.num_warps)
    is_plain = problem.op != "conv2d" and not problem.with_statistics
    if joins_halves(target) and is_plain and accumulators == 64 and config.block_k <= 64:
        return {"maxnreg": 128}
    return {}


@lru_cache(maxsize=4096)
def tuned_config(architecture: str, op: str, rows: int, out_channels: int, reduction: int) -> LaunchConfig:
    """The configuration of the nearest tuned shape of the same operator; arguments as of ``Problem``."""
    candidates = (shape for shape in tuned_shapes(architecture) if shape.op == op)
    return min(candidates, key=lambda shape: shape.distance(rows, out_channels, reduction)).config
