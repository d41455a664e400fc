"""What calibration costs for a UNet of real size, stage by stage: seconds, resident memory, disk.

    python -m benchmarks.quality.large_unet_cost [--latent 64] [--prompts 2] [--steps 2] [--iterations 0]

SD1.5's UNet has its published configuration and random weights in fp32, on the CPU, on one thread. It is sampled by
DDIM with guidance, so each of ``prompts`` images gives ``steps`` calls of two samples. A row has the seconds of the
processor (not those of a wall clock, since the machine may do other work), the peak of the process's resident memory
(``VmHWM`` of Linux, which is set back before each stage) and the most bytes in the folder of the activations. It is
written as soon as it is known. The estimate that ``dq-runtime quantize`` prints for the same work stands beside them.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from diffusers import DDIMScheduler

import dq_runtime
from benchmarks import process_memory
from benchmarks.command_line import new_parser
from benchmarks.quality.study import write_report
from benchmarks.unets import TEXT_TOKENS, build
from dq_runtime import DilateQuantConfig, Distillation
from dq_runtime.calibration import calibrate as calibration
from dq_runtime.cli.estimate import estimate, probe
from dq_runtime.cli.work_folder import folder_size
from dq_runtime.convert import plan_conversion

UNET = "sd15"
GUIDANCE = 7.5
STAGES = {  # functions of the module ``calibrate`` -> the name of the stage
    "sample_inputs": "samples of all layers' inputs",
    "_quantize_layers": "dilation, scales, rounding",
    "distil": "error feedback and training, block by block",
    "prediction_snr": "signal-to-noise ratio",
    "convert": "conversion",
}
INTERVAL = 0.1  # seconds between two looks at the disk


class Enough(Exception):
    """So many blocks are finished as were wanted."""


class Stages:
    """The rows of the stages and of the blocks.

    Args:
        folder: whose bytes are the disk that a stage takes.
        write: is called after each new row.
        most: blocks; None for all.
    """

    def __init__(self, folder: Path, write: Any, most: int | None) -> None:
        self.folder, self.write, self.most = folder, write, most
        self.rows: list[dict[str, Any]] = []
        self.blocks: list[dict[str, Any]] = []
        self._peak = 0
        self._block_start = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        disk, done = [0], threading.Event()

        def watch() -> None:
            while not done.wait(INTERVAL):
                with suppress(FileNotFoundError):  # a file may go away between the listing and the look at its size
                    disk[0] = max(disk[0], folder_size(self.folder))

        self._peak = 0
        process_memory.reset_peak()
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        start = time.process_time()
        try:
            yield
        finally:
            seconds = time.process_time() - start
            done.set()
            watcher.join()
        peak = max(self._peak, process_memory.peak())
        self.rows.append({"stage": name, "seconds": seconds, "peak_resident_mb": peak / 1e6, "disk_mb": disk[0] / 1e6})
        print(f"{name}: {seconds:.0f} s, peak {peak / 1e6:.0f} MB, disk {disk[0] / 1e6:.0f} MB", flush=True)
        self.write()

    def block(self, name: str, number: int, count: int) -> None:
        """Notes a block's seconds and peak (``Distillation(progress=...)``)."""
        peak, now = process_memory.peak(), time.process_time()
        self._peak = max(self._peak, peak)
        process_memory.reset_peak()
        if name:
            seconds = now - self._block_start
            self.blocks.append({"block": name, "seconds": seconds, "peak_resident_mb": peak / 1e6})
            print(f"  {number} of {count}, {name}: {seconds:.1f} s, peak {peak / 1e6:.0f} MB", flush=True)
            self.write()
        if number == self.most:
            raise Enough
        self._block_start = time.process_time()


@torch.no_grad()
def record(unet: Any, latent: int, prompts: int, steps: int) -> dq_runtime.CalibrationSet:
    """The calls of a sampler with guidance, from random noise and text embeddings."""
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(0)
    width = unet.config.cross_attention_dim
    empty = torch.randn(1, TEXT_TOKENS, width, generator=generator)
    with dq_runtime.record(unet, scheduler) as calibration_set:
        for _ in range(prompts):
            sample = torch.randn(1, unet.config.in_channels, latent, latent, generator=generator)
            text = torch.cat([empty, torch.randn(1, TEXT_TOKENS, width, generator=generator)])
            for timestep in scheduler.timesteps:
                without, conditional = unet(torch.cat([sample] * 2), timestep, text).sample.chunk(2)
                prediction = without + GUIDANCE * (conditional - without)
                sample = scheduler.step(prediction, timestep, sample).prev_sample
    return calibration_set


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--latent", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=0, help="training steps of each block")
    parser.add_argument("--dilation", choices=("joint", "weight", "none"), default="joint")
    parser.add_argument("--batch-size", type=int, default=4, help="samples of a training step")
    parser.add_argument("--blocks", type=int, help="stop after so many blocks")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    given = {name: value for name, value in vars(arguments).items() if name != "output" and value is not None}
    options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in given.items())
    results: dict[str, Any] = {"resident_after_imports_mb": process_memory.peak() / 1e6}
    unet = build(UNET, dtype=torch.float32)
    results["model_mb"] = sum(parameter.nbytes for parameter in unet.parameters()) / 1e6

    def write() -> None:
        rows = {"rows": stages.rows, "blocks": stages.blocks}
        write_report("large_unet_cost", options, UNET, results | rows, arguments.output, threads=1)

    with tempfile.TemporaryDirectory() as temporary, ExitStack() as patches:
        stages = Stages(Path(temporary), write, arguments.blocks)
        with stages.stage("recording"):
            calls = record(unet, arguments.latent, arguments.prompts, arguments.steps)
        settings = Distillation(
            batch_size=arguments.batch_size, iterations=arguments.iterations, gradient_checkpointing=True,
            folder=temporary, progress=stages.block,
        )  # fmt: skip
        config = DilateQuantConfig(dilation=arguments.dilation)
        call = calls.calls[-1]
        with stages.stage("estimate"):
            measured = probe(unet, plan_conversion(unet, config).layers, call)
        row_bytes = call.sample[:1].nbytes
        expected = estimate(measured, len(calls.calls), call.sample.shape[0], row_bytes, 0, settings)
        results["estimate"] = {
            "seconds": expected.seconds, "memory_mb": expected.memory / 1e6, "disk_mb": expected.disk / 1e6,
        }  # fmt: skip
        results["probe"] = asdict(measured) | {"device": str(measured.device)}
        print(results["estimate"], flush=True)
        for function, name in STAGES.items():
            original = getattr(calibration, function)

            def measured_stage(*args: Any, original: Any = original, name: str = name) -> Any:
                with stages.stage(name):
                    return original(*args)

            patches.enter_context(mock.patch.object(calibration, function, measured_stage))
        with suppress(Enough):
            dq_runtime.calibrate(unet, calls, config, settings)
    if not stages.most:
        with tempfile.TemporaryDirectory() as temporary, stages.stage("saving"):
            unet.save_pretrained(temporary)
    highest = max(row["peak_resident_mb"] for row in stages.rows)
    print(f"peak {highest:.0f} MB, the model {results['model_mb']:.0f} MB", flush=True)


if __name__ == "__main__":
    main()
