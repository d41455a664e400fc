"""The cost of block-wise distillation compared with end-to-end training of the same quantized UNet.

    python -m benchmarks.quality.calibration_cost [--task photos] [--budgets 64 ... 1024] [--output FILE]

Both start from the same post-training quantization (W4A4) and sample timesteps in the same way. Each runs in a
separate process, on one thread. The baseline is quantization-aware training, as in DilateQuant's paper: it trains all
layers at once, from rounding to nearest, towards the floating-point UNet's prediction. It has its own learning rates,
and the same training time as block-wise distillation; its targets are computed before its time starts. A second
baseline has the same time as block-wise distillation with a polish, which recomputes activations (gradient
checkpointing).

The report has seconds (also of each block), peak memory above the level before training, and PSNR to fp32 over the
images of ``compare.py``'s first seed. It also has block-wise distillation with fewer and more samples.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import nn

import dq_runtime
from benchmarks.quality import peak_memory
from benchmarks.quality.study import FIRST_IMAGE_SEED, STEPS, collect, slug, task_parser, write_report
from benchmarks.result_files import ROOT
from dq_runtime import Distillation
from dq_runtime.architectures.architecture import result_tensor
from dq_runtime.calibration import calibrate as calibration
from dq_runtime.calibration import training
from dq_runtime.calibration.batches import MixedBatches
from dq_runtime.calibration.replay import squared_error
from dq_runtime.calibration.simulated import simulated
from dq_runtime.evaluation.metrics import psnr
from dq_runtime.timesteps import TimestepGrid
from examples.small_unets.tasks import TASKS

IMAGES = 300
BITS = 4
END_TO_END = "end to end"
BLOCK_WISE = {
    "block-wise": Distillation(),
    "block-wise, polished": Distillation(polish_iterations=200, gradient_checkpointing=True),
}
QAT_SAMPLES, LEARNING_RATE, SCALE_LEARNING_RATE = 2048, 5e-3, 1e-3


def train_end_to_end(
    unet: Any, layers: Any, tensors: Any, sharing: Any, calibration_set: Any, config: Any, seconds: float
) -> dict[str, dict[str, torch.Tensor]]:
    """The baseline: trains all layers at once for the given time."""
    grid = TimestepGrid(config.timesteps)
    batches = MixedBatches(calibration_set, QAT_SAMPLES, 32, seed=0)
    weights = [batches.importance(i) / batches.share(i) for i in range(len(batches))]
    teacher = [result_tensor(batch.run(unet)) for batch in batches]
    with simulated(unet, layers, tensors, sharing, config, grid) as simulated_layers:
        in_steps: list[nn.Parameter] = []
        logarithms: list[nn.Parameter] = []
        for layer in simulated_layers.values():
            layer.quantized = True
            first, second = layer.unfreeze()
            in_steps += first
            logarithms += second
        for quantizer in {layer.input_quantizer: None for layer in simulated_layers.values()}:
            in_steps.append(quantizer.zero_point.requires_grad_(True))
            logarithms.append(quantizer.log_ratio.requires_grad_(True))
        optimizer = torch.optim.Adam(
            [{"params": in_steps, "lr": LEARNING_RATE}, {"params": logarithms, "lr": SCALE_LEARNING_RATE}], fused=True
        )
        first_error = float((squared_error(result_tensor(batches[0].run(unet)), teacher[0]) * weights[0]).mean())
        rates = [group["lr"] for group in optimizer.param_groups]
        generator, start, done = torch.Generator().manual_seed(0), time.perf_counter(), 0.0
        while done < 1:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * done))))
            i = int(torch.randint(len(batches), (), generator=generator))
            error = squared_error(result_tensor(batches[i].run_with_gradients(unet)), teacher[i])
            optimizer.zero_grad()
            ((error * weights[i]).mean() / first_error).backward()
            optimizer.step()
            done = (time.perf_counter() - start) / seconds
        for layer in simulated_layers.values():
            layer.freeze()
        return {name: layer.tensors() for name, layer in simulated_layers.items()}


@contextmanager
def training_by(train: Any, record: dict[str, float]) -> Iterator[None]:
    """Replaces the training in ``calibrate`` by ``train``, and records seconds and peak memory of the training."""
    original = calibration.distil

    def measured(*arguments: Any) -> Any:
        start = time.perf_counter()
        with peak_memory.above_now() as peak:
            tensors = train(original, *arguments)
        record.update(seconds=time.perf_counter() - start, **peak)
        return tensors

    with mock.patch.object(calibration, "distil", measured):
        yield


@contextmanager
def timing_blocks(seconds: dict[str, float]) -> Iterator[None]:
    """Records the seconds of each block."""
    original = training.Trainer.distil

    def timed(self: Any, name: str, *arguments: Any) -> None:
        start = time.perf_counter()
        original(self, name, *arguments)
        seconds[name] = time.perf_counter() - start

    with mock.patch.object(training.Trainer, "distil", timed):
        yield


def measure(task_name: str, way: str, samples: int, seconds: float) -> dict[str, Any]:
    """Trains by one method and samples images."""
    task = TASKS[task_name]
    unet, stock = task.unet(), task.unet()
    calibration_set = collect(task, unet, seed=0)

    def train(distil: Any, *arguments: Any) -> Any:
        if way == END_TO_END:
            return train_end_to_end(*arguments[:-1], seconds)
        return distil(*arguments)

    record: dict[str, Any] = {"way": way, "samples": samples}
    blocks: dict[str, float] = {}
    settings = replace(BLOCK_WISE.get(way, Distillation()), samples=samples)
    with training_by(train, record), timing_blocks(blocks):
        dq_runtime.calibrate(unet, calibration_set, dq_runtime.DilateQuantConfig(activation_bits=BITS), settings)
    drawn, reference = (task.sample(model, task.labels(IMAGES), FIRST_IMAGE_SEED, STEPS) for model in (unet, stock))
    return record | {"psnr_db": float(psnr(drawn, reference).mean()), "seconds_of_blocks": blocks}


def main() -> None:
    parser = task_parser(__doc__)
    parser.add_argument("--budgets", type=int, nargs="*", default=[64, 256, 1024])
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)  # arguments of a measurement's process
    arguments = parser.parse_args()
    if arguments.measure:
        way, samples, seconds = arguments.measure
        torch.set_num_threads(1)
        print(json.dumps(measure(arguments.task, way, int(samples), float(seconds))))
        return

    def in_own_process(way: str, samples: int, seconds: float = 0.0) -> dict[str, Any]:
        command = [sys.executable, "-m", "benchmarks.quality.calibration_cost", "--task", arguments.task]
        command += ["--measure", way, str(samples), str(seconds)]
        environ = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environ, cwd=ROOT, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{way}, {samples} samples: {row['seconds']:.0f} s, {row['allocated_mb']:.0f} MB "
            f"({row['resident_mb']:.0f} resident), {row['psnr_db']:.1f} dB",
            flush=True,
        )
        return row

    rows = []
    for way, settings in BLOCK_WISE.items():
        block_wise = in_own_process(way, settings.samples)
        end_to_end = in_own_process(END_TO_END, QAT_SAMPLES, block_wise["seconds"])
        shares = {name: block_wise[f"{name}_mb"] / end_to_end[f"{name}_mb"] for name in ("allocated", "resident")}
        rows.append(block_wise | {"end_to_end": end_to_end, "share_of_memory": shares})
    budgets = [in_own_process("block-wise", samples) for samples in arguments.budgets]
    results = {"task": arguments.task, "activation_bits": BITS, "rows": rows, "budgets": budgets}
    write_report(
        "calibration_cost", f"--task {arguments.task}", slug(arguments.task), results, arguments.output, threads=1
    )
    for row in rows:
        shares = row["share_of_memory"]
        print(
            f"{row['way']}: {shares['allocated']:.0%} of the memory that end-to-end training allocates "
            f"({shares['resident']:.0%} resident)"
        )


if __name__ == "__main__":
    main()
