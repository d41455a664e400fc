"""Quantizes a small trained UNet to packed INT4 and compares its samples with those of the original.

    python -m examples.small_unets.demo [--unet photos] [--samples 500] [--output out/demo]

Run it from the repository's root. It calibrates W4A8 and W4A4, saves both, loads them with stock diffusers, and samples
every model from the same noise. It writes ``grid.png``, ``report.json`` (all numbers, with device and versions), the
packed checkpoints and, in each checkpoint's ``report`` folder, plots of its layers. It prints the numbers as a table.
A processor without native bf16 gets no bf16 row: PyTorch emulates bf16 convolutions there, some 20 times slower than
fp32.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import time
import timeit
from collections.abc import Mapping
from copy import deepcopy
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn
from tqdm import tqdm

import dq_runtime
from dq_runtime.evaluation.footprint import footprint
from dq_runtime.evaluation.metrics import frechet_distance, pooled_psnr, psnr, ssim
from dq_runtime.evaluation.plots import plot_image_grid, write_report
from examples.small_unets.task import Task
from examples.small_unets.tasks import TASKS

CALIBRATION_SAMPLES = 200
POLISH_ITERATIONS = 200
CALIBRATION_SEED, SAMPLE_SEED = 1, 0
TIMING_BATCH, TIMING_ROUNDS = 100, 3
LARGEST_BF16_SLOWDOWN = 5.0  # over fp32; measured: 17 to 25 on AVX2, which emulates bf16, and 0.7 with AMX
COLUMNS = (
    ("model", "{}"),
    ("label_accuracy", "{:.1%}"),
    ("psnr_db", "{:.1f}"),
    ("ssim", "{:.3f}"),
    ("frechet", "{:.2f}"),
    ("unet_mb_fp16", "{:.2f}"),
    ("unet_mb", "{:.2f}"),
    ("checkpoint_mb", "{:.2f}"),
    ("cpu_prepacked_mb", "{:.2f}"),
    ("seconds_per_image", "{:.4f}"),
    ("calibration_seconds", "{:.0f}"),
)


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


def floating_point_unets(task: Task) -> tuple[dict[str, ModelMixin], dict[str, str]]:
    """Loads the models that INT4 is compared with.

    Returns:
        the models by name, fp32 first; and, by name, the reason for each model that is left out.
    """
    unets, slowdown = {"fp32": task.unet()}, bf16_slowdown()
    if slowdown > LARGEST_BF16_SLOWDOWN:
        reason = f"this processor has no native bf16, its emulation takes {slowdown:.0f} times as long as fp32"
        return unets, {"bf16": reason}
    return unets | {"bf16": task.unet(torch.bfloat16)}, {}


def collect(task: Task, unet: ModelMixin) -> dq_runtime.CalibrationSet:
    """Records the UNet's calls during sampling with 20 steps of DDIM."""
    noise = task.noise(CALIBRATION_SAMPLES, CALIBRATION_SEED)
    condition = task.condition(task.labels(CALIBRATION_SAMPLES))
    return dq_runtime.collect_from_scheduler(unet, task.noise_scheduler(), noise, 20, condition, batch_size=100)


def quantize(
    unet: ModelMixin, calibration_set: dq_runtime.CalibrationSet, bits: int, folder: Path
) -> tuple[ModelMixin, float]:
    """Calibrates a copy of the UNet, saves it and loads it with stock diffusers.

    Returns:
        the loaded UNet, and the seconds that calibration took.
    """
    start = time.perf_counter()
    quantized = dq_runtime.calibrate(
        deepcopy(unet),
        calibration_set,
        dq_runtime.DilateQuantConfig(activation_bits=bits),
        dq_runtime.Distillation(polish_iterations=POLISH_ITERATIONS),
    )
    seconds = time.perf_counter() - start
    quantized.save_pretrained(folder)
    return type(unet).from_pretrained(folder), seconds


def seconds_per_image(task: Task, unets: Mapping[str, ModelMixin]) -> dict[str, float]:
    """Median seconds per image of each model (DDIM, 20 steps). Every round times each model once."""
    labels = task.labels(TIMING_BATCH)
    seconds: dict[str, list[float]] = {name: [] for name in unets}
    for name in tqdm([*unets] * TIMING_ROUNDS, desc="Timing"):
        start = time.perf_counter()
        task.sample(unets[name], labels, seed=2, batch_size=TIMING_BATCH)
        seconds[name].append((time.perf_counter() - start) / TIMING_BATCH)
    return {name: statistics.median(values) for name, values in seconds.items()}


@torch.no_grad()
def evaluate(
    task: Task,
    unets: Mapping[str, ModelMixin],
    calibration_seconds: Mapping[str, float],
    num_samples: int,
    folder: Path,
) -> list[dict[str, Any]]:
    """Samples every model from the same noise and measures the images. The first model is the reference."""
    classifier, labels = task.classifier(), task.labels(num_samples)
    images = {name: task.sample(unet, labels, SAMPLE_SEED, progress=f"Sampling {name}") for name, unet in unets.items()}
    seconds = seconds_per_image(task, unets)
    print("Measuring the images", flush=True)
    real_features = classifier.features(task.real_images()[0])
    reference = next(iter(images.values()))
    rows = []
    for name, unet in unets.items():
        sizes = footprint(unet)
        quantized = sizes.weights > 0
        rows.append(
            {
                "model": name,
                "label_accuracy": (classifier(images[name]).argmax(1) == labels).float().mean().item(),
                "psnr_db": None if images[name] is reference else float(psnr(images[name], reference).mean()),
                "pooled_psnr_db": None if images[name] is reference else pooled_psnr(images[name], reference),
                "ssim": None if images[name] is reference else ssim(images[name], reference),
                "frechet": frechet_distance(classifier.features(images[name]), real_features),
                "unet_mb_fp16": sizes.unet_fp16 / 1e6,
                "unet_mb": sizes.unet / 1e6,
                "quantized_weights_mb": sizes.weights / 1e6,
                "quantized_weights_over_fp16": sizes.weight_ratio if quantized else None,
                "quantized_weights_and_tables_over_fp16": sizes.total_ratio if quantized else None,
                "checkpoint_mb": checkpoint_mb(unet),
                "cpu_prepacked_mb": sizes.cpu_prepacked / 1e6,
                "seconds_per_image": seconds[name],
                "calibration_seconds": calibration_seconds.get(name),
            }
        )
    plot_image_grid(images, columns=20).savefig(folder / "grid.png")
    return rows


def checkpoint_mb(unet: ModelMixin) -> float | None:
    """Size of the weight files that the UNet was loaded from; None if it was not loaded from files."""
    if "_name_or_path" not in unet.config:
        return None
    return sum(file.stat().st_size for file in Path(unet.config["_name_or_path"]).glob("*.safetensors")) / 1e6


def cpu_name() -> str:
    """The processor's name, or its architecture if Linux reports no name."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found.group(1) if found else platform.machine()


def environment() -> dict[str, Any]:
    """Date, device and versions of a measurement."""
    return {
        "date": datetime.date.today().isoformat(),
        "device": f"{cpu_name()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,  # names the CUDA version too
        **{name: version(name) for name in ("triton", "diffusers", "dq-runtime")},
    }


def print_table(rows: list[dict[str, Any]], left_out: Mapping[str, str]) -> None:
    """Prints the report's rows as an aligned table, and one line for each model that was left out."""
    cells = [[name for name, _ in COLUMNS]]
    cells += [["-" if row[name] is None else form.format(row[name]) for name, form in COLUMNS] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
    for name, reason in left_out.items():
        print(f"{name}: left out, {reason}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unet", choices=TASKS, default="digits/cross_attention")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--output", type=Path, default=Path("out/demo"))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)

    task = TASKS[arguments.unet]
    unets, left_out = floating_point_unets(task)
    unet = unets["fp32"]
    calibration_set = collect(task, unet)
    calibration_seconds: dict[str, float] = {}
    for bits in (8, 4):
        name, path = f"INT4 W4A{bits}", arguments.output / f"w4a{bits}"
        print(f"Calibrating {name}", flush=True)
        unets[name], calibration_seconds[name] = quantize(unet, calibration_set, bits, path)
        print(f"Plotting the layers of {name}", flush=True)
        one_trajectory = dq_runtime.CalibrationSet(calibration_set.calls[:20])
        write_report(unets[name], unet, one_trajectory, path / "report")
    rows = evaluate(task, unets, calibration_seconds, arguments.samples, arguments.output)
    report = {
        "unet": task.name,
        "samples": arguments.samples,
        "environment": environment(),
        "models": rows,
        "left_out": left_out,
        "notes": "psnr_db (mean over images), pooled_psnr_db (of the mean squared error), ssim: against fp32 at equal "
        "noise; frechet: classifier features against real images, "
        "fp32's own is the floor; MB = 10^6 bytes; cpu_prepacked_mb: int8 copies that only the CPU path keeps",
    }
    (arguments.output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print_table(rows, left_out)
    last = rows[-1]
    print(
        f"The quantized layers' weights take {last['quantized_weights_over_fp16']:.1%} of fp16, with all their tables "
        f"{last['quantized_weights_and_tables_over_fp16']:.1%}. Written to {arguments.output}: grid.png, report.json"
    )


if __name__ == "__main__":
    main()
