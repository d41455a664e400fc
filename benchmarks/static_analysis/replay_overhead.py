"""Measures Python's time for one replayed call of a UNet with CUDA graphs, without a GPU.

    python -m benchmarks.static_analysis.replay_overhead [--unet sd15]... [--rounds 500] [--profile] [--output FILE]

A replayed call runs Python code before the graph is launched (the key, the copies of the inputs), and after it (the
copies of the results, and the comparison of the model with its state at the capture). The GPU waits for the first part
alone: the second part runs while the GPU runs the graph. Both are measured. The graph does nothing, and captures
nothing; streams are objects without a function; the inputs are small tensors on the CPU; the weights have no memory.
The result is the thread's CPU time on this machine, without the time of other processes; a GPU's driver adds some
microseconds per copy and launch.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import json
import pstats
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import environment, quantized_unets, unets
from benchmarks.command_line import new_parser
from benchmarks.result_files import RESULTS, write_whole
from dq_runtime import fuse
from dq_runtime.graphs import CudaGraphRunner


class NoGraph:
    """A graph that records the times of its launches."""

    launched: float = 0

    def replay(self) -> None:
        NoGraph.launched = time.thread_time()

    def pool(self) -> None:
        return None


@contextlib.contextmanager
def no_gpu() -> Iterator[None]:
    """Replaces streams and graphs."""
    stream = mock.Mock()
    nothing = {name: lambda *_, **__: contextlib.nullcontext() for name in ("graph", "stream", "device_of")}
    with mock.patch.multiple(
        torch.cuda, CUDAGraph=NoGraph, Stream=mock.Mock, current_stream=lambda device=None: stream, **nothing
    ):
        yield


def small_inputs(name: str) -> dict[str, Any]:
    """The arguments of a pipeline's call, with small tensors: Python's time does not depend on their sizes."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape).half()

    unet_class, config = unets.CONFIGS[name]
    arguments: dict[str, Any] = {"sample": normal(2, config["in_channels"], 8, 8), "timestep": torch.tensor(500)}
    if unet_class is unets.UNet2DModel:
        return arguments | {"return_dict": False}
    arguments["encoder_hidden_states"] = normal(2, 4, 8)
    arguments |= {"timestep_cond": None, "cross_attention_kwargs": None, "added_cond_kwargs": None}
    if name == "sdxl":
        arguments["added_cond_kwargs"] = {"text_embeds": normal(2, 8), "time_ids": normal(2, 6)}
    return arguments | {"return_dict": False}


def with_controlnet(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments and a ControlNet's twelve skips, as SD1.5 has them."""
    residuals = [torch.randn(2, 8).half() for _ in range(13)]
    return arguments | {"down_block_additional_residuals": residuals[1:], "mid_block_additional_residual": residuals[0]}


def measure(call: Callable[[], Any], rounds: int) -> dict[str, float]:
    """Microseconds until the launch and of the whole call: fastest and median."""
    launches, calls = [], []
    for _ in range(rounds):
        start = time.thread_time()
        call()
        end = time.thread_time()
        if NoGraph.launched < start:
            raise RuntimeError("The call ran eagerly")
        launches.append(1e6 * (NoGraph.launched - start))
        calls.append(1e6 * (end - start))
    return {
        "launch_fastest_us": min(launches),
        "launch_median_us": statistics.median(launches),
        "call_fastest_us": min(calls),
        "call_median_us": statistics.median(calls),
    }


def rows_of(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The times of one UNet's calls."""
    unet = quantized_unets.build(name, "meta", torch.float16)
    fuse(unet)
    runner = CudaGraphRunner(unet)
    runner.device_type = "cpu"  # of the inputs
    runner.eager = lambda **arguments: (torch.zeros_like(arguments["sample"]),)  # type: ignore[method-assign]
    runner.install()
    arguments = small_inputs(name)
    calls = {"tensor timestep": arguments, "number timestep": arguments | {"timestep": 500}}
    if name == "sd15":
        calls["ControlNet"] = with_controlnet(arguments)
    rows = []
    for kind, given in calls.items():

        def call(given: dict[str, Any] = given) -> Any:
            return unet(**given)

        call()  # captures
        rows.append({"unet": name, "call": kind, **measure(call, options.rounds)})
        row = rows[-1]
        print(
            f"{name}, {kind}: {row['launch_fastest_us']:.0f} us until the launch at best, "
            f"{row['launch_median_us']:.0f} us in the median; whole call {row['call_fastest_us']:.0f} us at best, "
            f"{row['call_median_us']:.0f} us in the median",
            flush=True,
        )
        if options.profile:
            with cProfile.Profile() as profile:
                for _ in range(options.rounds):
                    call()
            pstats.Stats(profile).sort_stats("tottime").print_stats(15)
    return rows


@torch.no_grad()
def main() -> None:
    """Runs the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--unet", action="append", choices=unets.CONFIGS, help="may be repeated (default: sd15)")
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--profile", action="store_true", help="also list the functions that take longest")
    parser.add_argument("--output", type=Path, default=RESULTS / "replay_overhead.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with no_gpu():
        rows = [row for name in options.unet or ("sd15",) for row in rows_of(name, options)]
    document = {**environment.describe(), "rows": rows}
    write_whole(options.output, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
