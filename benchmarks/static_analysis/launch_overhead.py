"""Measures Python's time for one forward pass of a fused UNet, without a GPU.

    python -m benchmarks.static_analysis.launch_overhead [--unet sd15]... [--rounds 30] [--profile] [--output FILE]

Without a CUDA graph a fused UNet waits for Python, not for the GPU. Here a forward pass runs the same Python code as on
Hopper: modules, checks, dispatcher, allocations and Triton's own code for each launch. But tensors are on the CPU, and
launches do nothing. PyTorch's attention, and the few convolutions, norms and activations that stay in PyTorch, return
at once. The result is Python's time on this machine; a GPU's driver adds some microseconds per launch.
"""

from __future__ import annotations

import cProfile
import json
import pstats
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from triton.runtime import driver

from benchmarks import environment, quantized_unets, unets
from benchmarks.command_line import new_parser
from benchmarks.result_files import RESULTS, write_whole
from benchmarks.static_analysis.kernel_uses import TARGETS
from dq_kernels import reference, registration, triton
from dq_runtime import fuse


class NoGPU:
    """Replaces Triton's driver: kernels are compiled for Hopper and counted, but not loaded."""

    def __init__(self) -> None:
        self.launches = 0
        self.utils = self
        self.operators = torch.library.Library("dq_kernels", "IMPL")  # registrations last as long as this object

    def get_current_target(self) -> Any:
        return TARGETS["sm_90"]

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, threads

    def unload_module(self, module: int) -> None:
        pass

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launch(*arguments: Any) -> None:
            self.launches += 1

        return launch


def replace_the_gpu() -> NoGPU:
    """Disables the operators' launches, and makes PyTorch's expensive functions return at once."""
    gpu = NoGPU()
    driver.set_active(gpu)
    registration.is_plain = lambda arguments: False  # these tensors stand for a GPU's, which take the dispatcher
    for name in triton.__all__:
        launcher = registration.takes_fields(getattr(triton, name), getattr(reference, name))
        gpu.operators.impl(name, launcher, "CPU", allow_override=True)

    def convolve(x: torch.Tensor, weight: torch.Tensor, *arguments: Any) -> torch.Tensor:
        return x.new_empty(x.shape[0], weight.shape[0], *x.shape[2:])

    def attend(query: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        batch, heads, tokens, channels = query.shape  # the result has flash attention's layout
        return query.new_empty(batch, tokens, heads, channels).transpose(1, 2)

    F.conv2d = convolve
    F.scaled_dot_product_attention = attend
    F.group_norm = F.silu = lambda x, *arguments, **options: x
    return gpu


def measure(name: str, batch: int, rounds: int, gpu: NoGPU) -> tuple[dict[str, Any], Callable[[], Any]]:
    """Launches and milliseconds of a forward pass, and a function that runs it."""
    unet = quantized_unets.build(name, "cpu", torch.float16)
    fuse(unet)
    arguments = unets.inputs(name, batch)

    def forward() -> Any:
        return unet(**arguments)

    forward()  # compiles
    before = gpu.launches
    forward()
    launches = gpu.launches - before
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        forward()
        times.append(1e3 * (time.perf_counter() - start))
    row = {"unet": name, "launches": launches, "median_ms": statistics.median(times), "fastest_ms": min(times)}
    return row | {"us_a_launch": 1e3 * row["fastest_ms"] / launches}, forward


@torch.no_grad()
def main() -> None:
    """Runs the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--unet", action="append", choices=unets.CONFIGS, help="may be repeated (default: sd15)")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--profile", action="store_true", help="also list the functions that take longest")
    parser.add_argument("--output", type=Path, default=RESULTS / "launch_overhead.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    gpu, rows = replace_the_gpu(), []
    for name in arguments.unet or ("sd15",):
        row, forward = measure(name, arguments.batch, arguments.rounds, gpu)
        rows.append(row)
        print(
            f"{name}: {row['launches']} launches, {row['fastest_ms']:.1f} ms at best, {row['median_ms']:.1f} ms in the "
            f"median; {row['us_a_launch']:.0f} us a launch",
            flush=True,
        )
        if arguments.profile:
            with cProfile.Profile() as profile:
                for _ in range(arguments.rounds):
                    forward()
            pstats.Stats(profile).sort_stats("tottime").print_stats(30)
    document = {**environment.describe(), "batch": arguments.batch, "rows": rows}
    write_whole(arguments.output, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
