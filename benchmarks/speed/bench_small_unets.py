"""Times the trained small UNets on this CPU: fp32, bf16 and INT4, one forward pass of each in turn.

    python -m benchmarks.speed.bench_small_unets [--task photos]... [--batch 1]... [--threads 1]... [--output FILE]

The process's CPU time is measured as well: other processes change it less than the time on the clock. INT4 layers have
random weights: latency does not depend on their values. bf16 is left out where the processor emulates it. Without
``--output``, the report goes to ``benchmarks/results/bench_small_unets.json``.
"""

from __future__ import annotations

import json
import statistics
import time
import timeit
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import environment, quantized_unets
from benchmarks.command_line import new_parser
from benchmarks.result_files import RESULTS, write_whole
from dq_runtime.fused import fuse
from examples.emoji.models import LATENT_CHANNELS, TEXT_CHANNELS, TOKENS, untrained_unet
from examples.small_unets.task import Task
from examples.small_unets.tasks import TASKS

WARM_UP_ROUNDS = 3
TIMESTEP = 500
LARGEST_BF16_SLOWDOWN = 5.0  # over fp32; measured: 17 to 25 on AVX2, which emulates bf16, and 0.7 with AMX


@torch.no_grad()
def bf16_slowdown() -> float:
    """The time of a bf16 convolution on this processor, over the time of the same convolution in fp32.

    The time is measured because the processor's flags are not sufficient: oneDNN also emulates bf16 if
    ``ONEDNN_MAX_CPU_ISA`` excludes the bf16 instructions. The CPU time of a single thread depends little on other
    processes.
    """
    seconds = {}
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for dtype in (torch.bfloat16, torch.float32):
        convolution = nn.Conv2d(64, 64, 3, padding=1, dtype=dtype)
        images = torch.zeros(32, 64, 8, 8, dtype=dtype)
        timer = timeit.Timer(partial(convolution, images), timer=time.process_time)
        seconds[dtype] = min(timer.repeat(number=1, repeat=5))
    torch.set_num_threads(num_threads)
    return seconds[torch.bfloat16] / seconds[torch.float32]


class Emoji:
    """The UNet of the emoji pipeline, and its inputs, as a ``Task`` has them."""

    name = "emoji"

    def unet(self, dtype: torch.dtype = torch.float32) -> Any:
        return untrained_unet().to(dtype)

    def noise(self, batch: int, seed: int) -> torch.Tensor:
        return torch.randn(batch, LATENT_CHANNELS, 16, 16, generator=torch.Generator().manual_seed(seed))

    def labels(self, batch: int) -> torch.Tensor:
        return torch.randn(batch, TOKENS, TEXT_CHANNELS, generator=torch.Generator().manual_seed(1))

    def condition(self, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"encoder_hidden_states": labels}


UNETS: dict[str, Task | Emoji] = {**TASKS, Emoji.name: Emoji()}
BATCHES = {Emoji.name: (1, 2, 16)}  # of the others: 1 and 100


def models(task: Task | Emoji, with_bf16: bool) -> dict[str, Any]:
    """The UNet in each form, by name."""
    int4 = task.unet()
    quantized_unets.replace_layers(int4, "cpu")
    fuse(int4)
    forms = {"fp32": task.unet()} | ({"bf16": task.unet(torch.bfloat16)} if with_bf16 else {}) | {"int4": int4.eval()}
    return {name: unet.eval() for name, unet in forms.items()}


@torch.inference_mode()
def measure(task: Task | Emoji, batch: int, rounds: int, with_bf16: bool) -> dict[str, Any]:
    """Median milliseconds of a forward pass by form, on the clock and on CPUs, and INT4's speed-up over each other."""
    unets, noise = models(task, with_bf16), task.noise(batch, seed=0)
    condition = task.condition(task.labels(batch))
    times: dict[str, list[float]] = {name: [] for name in unets}
    cpu_times: dict[str, list[float]] = {name: [] for name in unets}
    for _ in range(WARM_UP_ROUNDS + rounds):
        for name, unet in unets.items():
            arguments = {
                key: value.to(unet.dtype) if value.is_floating_point() else value for key, value in condition.items()
            }
            sample = noise.to(unet.dtype)
            start, cpu_start = time.perf_counter(), time.process_time()
            unet(sample, TIMESTEP, **arguments)
            cpu_times[name].append(time.process_time() - cpu_start)
            times[name].append(time.perf_counter() - start)
    medians, cpu_medians = (
        {name: 1e3 * statistics.median(each[WARM_UP_ROUNDS:]) for name, each in kind.items()}
        for kind in (times, cpu_times)
    )
    speed_up, cpu_speed_up = (
        {name: ms / kind["int4"] for name, ms in kind.items() if name != "int4"} for kind in (medians, cpu_medians)
    )
    return {
        "task": task.name, "batch": batch, "threads": torch.get_num_threads(), "median_ms": medians,
        "speed_up": speed_up, "median_cpu_ms": cpu_medians, "cpu_speed_up": cpu_speed_up,
    }  # fmt: skip


def main() -> None:
    """Runs the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--task", action="append", choices=UNETS, help="may be repeated (default: all)")
    parser.add_argument(
        "--batch", type=int, action="append", help="may be repeated (default: 1, 100; of emoji 1, 2, 16)"
    )
    parser.add_argument("--threads", type=int, action="append", help="may be repeated (default: PyTorch's)")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path, default=RESULTS / "bench_small_unets.json")
    arguments = parser.parse_args()
    with_bf16 = bf16_slowdown() <= LARGEST_BF16_SLOWDOWN
    report = {**environment.describe(), "cpu_capability": torch.backends.cpu.get_cpu_capability(), "rows": []}
    default_threads = torch.get_num_threads()
    for name in arguments.task or UNETS:
        for batch in arguments.batch or BATCHES.get(name, (1, 100)):
            for threads in arguments.threads or [default_threads]:
                torch.set_num_threads(threads)
                row = measure(UNETS[name], batch, arguments.rounds, with_bf16)
                report["rows"].append(row)
                write_whole(arguments.output, json.dumps(report, indent=1) + "\n")
                times = ", ".join(f"{form} {ms:.2f} ms" for form, ms in row["median_ms"].items())
                ratios = ", ".join(f"{ratio:.2f}x {form}" for form, ratio in row["speed_up"].items())
                on_cpu = ", ".join(f"{ratio:.2f}x {form}" for form, ratio in row["cpu_speed_up"].items())
                print(
                    f"{name}, batch {batch}: {times}; INT4 is {ratios} ({on_cpu} by CPU time, {threads} threads)",
                    flush=True,
                )
    torch.set_num_threads(default_threads)


if __name__ == "__main__":
    main()
