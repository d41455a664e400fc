"""The current GPU, the launch options that it admits, sizes of launch grids, and counters that outlive a launch."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor
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


class ArrivalCounters:
    """Zeroed int32 counters on one device, for launches that leave them zero; so no launch is preceded by a fill.

    Launches that may run at the same time never share a counter:

    - Launches on one stream share a region. A launch has left it zero before the next one reads it: with programmatic
      dependent launch too, because each kernel waits for the previous one's memory before it touches any.
    - A launch that is captured in a CUDA graph has a region to itself for ever, since graphs may be replayed on any
      stream. This costs 4 bytes a tile and captured launch.

    Regions are never freed, so the addresses in graphs stay valid and a larger region can take a stream's place at any
    time. They are cut from blocks that are allocated outside of captures, by a thread of its own: neither a graph's
    memory pool nor that of ``torch.compile`` then owns them. A capture for which no block is left has counters in its
    own pool, and the graph fills them with zeros. A kernel that fails ends the CUDA context, and the counters with it.
    """

    REGION, BLOCK = 2**12, 2**16

    def __init__(self, device: torch.device) -> None:
        self._device, self._lock = device, Lock()
        self._blocks: list[Tensor] = []
        self._free = 0  # in the last block
        self._of_stream: dict[int, Tensor] = {}

    def take(self, number: int, stream: int | None) -> Tensor:
        """At least ``number`` counters for a launch on a stream, None for a launch that is being captured."""
        number = 4 * cdiv(number, 4)  # 16 bytes: Triton specializes kernels by the alignment of addresses
        with self._lock:
            if stream is None:
                if number > self._free:
                    return torch.zeros(number, dtype=torch.int32, device=self._device)
                return self._cut(number)
            region = self._of_stream.get(stream)
            if region is None or region.numel() < number:
                region = self._of_stream[stream] = self._cut(max(number, self.REGION))
            if self._free < self.BLOCK // 2:  # for captures, which cannot allocate
                self._allocate(self.BLOCK)
            return region

    def _cut(self, number: int) -> Tensor:
        if number > self._free:
            self._allocate(max(number, self.BLOCK))
        self._free -= number
        return self._blocks[-1][self._free : self._free + number]

    def _allocate(self, number: int) -> None:
        with ThreadPoolExecutor(1) as thread:
            block = thread.submit(lambda: torch.zeros(number, dtype=torch.int32).to(self._device)).result()
        self._blocks.append(block)
        self._free = number


_counters_of = cache(ArrivalCounters)


def arrival_counters(number: int, device: torch.device) -> Tensor:
    """At least ``number`` zeroed counters for a launch that leaves them zero, now, on the current stream."""
    if device.type == "cpu":  # the interpreter may be interrupted in a launch
        return torch.zeros(number, dtype=torch.int32)
    is_captured = torch.cuda.is_current_stream_capturing()
    stream = None if is_captured else driver.active.get_current_stream(device.index)
    return _counters_of(device).take(number, stream)
