"""Launch configurations of the GEMM-shaped kernels."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class LaunchConfig:
    """Tile sizes and pipeline of one launch: ``block_k`` counts packed bytes, so two input channels each."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# Chosen from the compiler's report (registers, shared memory, occupancy); not measured on a GPU yet.
FEW_ROWS = LaunchConfig(block_m=16, block_n=64, block_k=64, num_warps=4, num_stages=4)
SOME_ROWS = LaunchConfig(block_m=64, block_n=64, block_k=64, num_warps=4, num_stages=3)
MANY_ROWS = LaunchConfig(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=3)
CONFIGS = (FEW_ROWS, SOME_ROWS, MANY_ROWS)


def launch_config(num_rows: int, out_channels: int) -> LaunchConfig:
    """The configuration for a GEMM whose result has num_rows rows (samples x positions) and out_channels columns."""
    if num_rows <= 32:
        return FEW_ROWS
    # A large tile only pays where it still leaves enough tiles to fill the chip.
    return MANY_ROWS if num_rows * out_channels >= 128 * 128 * 128 else SOME_ROWS


@cache
def use_ptx() -> bool:
    """Whether kernels may use inline PTX: on NVIDIA GPUs, but not in Triton's interpreter."""
    return torch.version.hip is None and os.environ.get("TRITON_INTERPRET", "0") != "1"
