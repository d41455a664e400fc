"""Launch configurations of the GEMM, looked up by architecture, operator and shape.

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
from typing import Any

import torch

FOLDER = Path(__file__).parent / "tuning"
# The file that serves a compute capability: its own, or that of a GPU with the same matrix instructions and no more
# shared memory. sm_120 has Ada's 99 KB a block; what is newer than this list gets the newest that it can run.
FILES = {80: "sm_80", 86: "sm_89", 89: "sm_89", 90: "sm_90", 100: "sm_90", 103: "sm_90", 120: "sm_89"}
AMD_FILE = "gfx942"


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
        """The same with tiles that leave a thread room for more than its accumulators: fewer than 64 of them."""
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
        """How many doublings lie between this shape and another."""
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


@cache
def architecture() -> str:
    """The tuning file for the current device; without one, for the oldest GPU in the list."""
    if not torch.cuda.is_available():
        return FILES[min(FILES)]
    if torch.version.hip is not None:
        return AMD_FILE
    major, minor = torch.cuda.get_device_capability()
    return FILES[max((number for number in FILES if number <= 10 * major + minor), default=min(FILES))]


@lru_cache(maxsize=4096)
def launch_config(op: str, rows: int, out_channels: int, reduction: int) -> LaunchConfig:
    """The configuration of the nearest tuned shape of the same operator.

    Args:
        op: "linear", "linear_geglu" (two weight tiles a program) or "conv2d".
        rows: samples x positions of the result.
        out_channels: N of the result.
        reduction: input channels x taps.
    """
    candidates = (shape for shape in tuned_shapes(architecture()) if shape.op == op)
    return min(candidates, key=lambda shape: shape.distance(rows, out_channels, reduction)).config


def cdiv(dividend: int, divisor: int) -> int:
    """Rounded up. Triton's own takes as long as a tenth of a launch, since it serves kernels too."""
    return -(-dividend // divisor)


def next_power_of_2(number: int) -> int:
    """The least one that is not below."""
    return 1 << (number - 1).bit_length()


@cache
def use_ptx() -> bool:
    """Whether kernels may use inline PTX: on NVIDIA GPUs, but not in Triton's interpreter."""
    return torch.version.hip is None and os.environ.get("TRITON_INTERPRET", "0") != "1"


@cache
def launch_options() -> dict[str, Any]:
    """What every launch is given: whether it follows the kernel before it early (see ``use_pdl``)."""
    return {"PDL": True, "launch_pdl": True} if use_pdl() else {"PDL": False}


@cache
def use_pdl() -> bool:
    """Whether a kernel may be launched while the one before it runs out: on NVIDIA GPUs since Hopper."""
    return use_ptx() and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
