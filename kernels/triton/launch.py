"""The current GPU, the launch options that it admits, and sizes of launch grids."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"  # Triton reads it when kernels are defined, too


def current_device() -> int | None:
    """The number of the GPU on which Triton launches now; None in Triton's interpreter and without a GPU."""
    if INTERPRETED:
        return None
    try:
        return driver.active.get_current_device()
    except RuntimeError:  # Triton finds no GPU
        return None


@cache
def target_of(device: int | None) -> GPUTarget | None:
    """The GPU with this number, which must be the current one: a machine may hold GPUs of several kinds."""
    return None if device is None else driver.active.get_current_target()


def current_target() -> GPUTarget | None:
    """The kind of the GPU on which Triton launches now; None in Triton's interpreter and without a GPU."""
    return target_of(current_device())


def launch_options(ptx: bool = True) -> dict[str, Any]:
    """Arguments of every launch on the current GPU.

    Args:
        ptx: whether the kernel has a PTX form.

    Returns:
        PTX: True on NVIDIA GPUs. PDL, launch_pdl: whether the kernel starts while the one before it runs out
        (programmatic dependent launch), on NVIDIA GPUs since Hopper.
    """
    return _launch_options(current_device(), ptx)


@cache
def _launch_options(device: int | None, ptx: bool) -> dict[str, Any]:
    return options_of(target_of(device), ptx)


def options_of(target: GPUTarget | None, ptx: bool = True) -> dict[str, Any]:
    """``launch_options`` on a GPU of this kind."""
    is_nvidia = target is not None and target.backend == "cuda"
    is_dependent = target is not None and is_nvidia and target.arch >= 90
    options = {"PTX": is_nvidia} if ptx else {}
    return options | ({"PDL": True, "launch_pdl": True} if is_dependent else {"PDL": False})


def cdiv(dividend: int, divisor: int) -> int:
    """The quotient, rounded up. ``triton.cdiv`` also works in kernels, and takes a tenth of a launch's time."""
    return -(-dividend // divisor)


def next_power_of_2(number: int) -> int:
    """The least power of 2 that is not below the number."""
    return 1 << (number - 1).bit_length()
