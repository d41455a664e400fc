"""The main job on a real trained model: quantize a digits UNet to packed INT4 and sample beside the original.

    python examples/digits/demo.py [--unet cross_attention] [--samples 500] [--output out/demo]

Calibrates W4A8 and W4A4, saves both, loads them with stock diffusers, and draws the same noise through every model.
Writes ``grid.png``, ``report.json`` (all numbers, with device and versions) and the packed checkpoints; prints the
numbers as a table.
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
from collections.abc import Mapping
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from typing import Any

import digits
import torch
from diffusers import ModelMixin
from PIL import Image, ImageDraw

import dq_runtime
from dq_runtime.evaluation.footprint import footprint
from dq_runtime.evaluation.metrics import frechet_distance, psnr, ssim

CALIBRATION_SAMPLES = 100
CALIBRATION_SEED, SAMPLE_SEED = 1, 0
TIMING_BATCH, TIMING_ROUNDS = 100, 3
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
)


def quantize(unet: ModelMixin, condition: digits.Condition, folder: Path) -> dict[str, ModelMixin]:
    """Calibrates the UNet at W4A8 and W4A4, saves each, and loads it again through stock diffusers."""
    labels = torch.arange(CALIBRATION_SAMPLES) % digits.NUM_CLASSES
    noise = torch.randn(CALIBRATION_SAMPLES, 1, 8, 8, generator=torch.Generator().manual_seed(CALIBRATION_SEED))
    calibration_set = dq_runtime.collect_from_scheduler(
        unet, digits.noise_scheduler(), noise, 20, condition(labels), batch_size=CALIBRATION_SAMPLES
    )
    loaded = {}
    for bits in (8, 4):
        quantized = deepcopy(unet)
        dq_runtime.calibrate(quantized, calibration_set, dq_runtime.DilateQuantConfig(activation_bits=bits))
        path = folder / f"w4a{bits}"
        quantized.save_pretrained(path)
        loaded[f"INT4 W4A{bits}"] = type(unet).from_pretrained(path)
    return loaded


def seconds_per_image(unets: Mapping[str, ModelMixin], condition: digits.Condition) -> dict[str, float]:
    """Median time of a DDIM-20 sample, the models in turn, several rounds."""
    labels = torch.arange(TIMING_BATCH) % digits.NUM_CLASSES
    seconds: dict[str, list[float]] = {name: [] for name in unets}
    for _ in range(TIMING_ROUNDS):
        for name, unet in unets.items():
            start = time.perf_counter()
            digits.sample(unet, condition, labels, seed=2, batch_size=TIMING_BATCH)
            seconds[name].append((time.perf_counter() - start) / TIMING_BATCH)
    return {name: statistics.median(values) for name, values in seconds.items()}


@torch.no_grad()
def evaluate(unets: Mapping[str, ModelMixin], kind: str, num_samples: int, folder: Path) -> list[dict[str, Any]]:
    """Samples with every model from one noise and measures the images; the first model is the reference."""
    condition, classifier = digits.load_condition(kind), digits.load_classifier()
    labels = torch.arange(num_samples) % digits.NUM_CLASSES
    real_features = classifier.features(digits.real_digits()[0])
    images = {name: digits.sample(unet, condition, labels, SAMPLE_SEED) for name, unet in unets.items()}
    seconds = seconds_per_image(unets, condition)
    reference = next(iter(images.values()))
    rows = []
    for name, unet in unets.items():
        sizes = footprint(unet)
        quantized = sizes.weights > 0
        rows.append(
            {
                "model": name,
                "label_accuracy": (classifier(images[name]).argmax(1) == labels).float().mean().item(),
                "psnr_db": None if images[name] is reference else psnr(images[name], reference),
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
            }
        )
    draw_grid(images, folder / "grid.png")
    return rows


def checkpoint_mb(unet: ModelMixin) -> float | None:
    """What the weights take on disk, where the UNet was loaded from."""
    if "_name_or_path" not in unet.config:
        return None
    return sum(file.stat().st_size for file in Path(unet.config["_name_or_path"]).glob("*.safetensors")) / 1e6


def draw_grid(images: Mapping[str, torch.Tensor], path: Path, columns: int = 20, zoom: int = 5) -> None:
    """One row of images a model, enlarged, with its name."""
    cell, margin = 8 * zoom + 2, 100
    canvas = Image.new("L", (margin + columns * cell, len(images) * cell), 255)
    draw = ImageDraw.Draw(canvas)
    for row, (name, batch) in enumerate(images.items()):
        draw.text((6, row * cell + cell // 2 - 6), name, fill=0)
        pixels = ((1 - batch[:columns, 0]) * 127.5).byte().numpy()
        for column, image in enumerate(pixels):
            enlarged = Image.fromarray(image).resize((8 * zoom, 8 * zoom), Image.Resampling.NEAREST)
            canvas.paste(enlarged, (margin + column * cell, row * cell))
    canvas.save(path)


def cpu_name() -> str:
    """The processor's name where Linux tells it, its architecture elsewhere."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found.group(1) if found else platform.machine()


def environment() -> dict[str, Any]:
    """Where the numbers come from."""
    return {
        "date": datetime.date.today().isoformat(),
        "device": f"{cpu_name()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "triton", "diffusers", "dq-runtime")},
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    """The report's rows, aligned."""
    cells = [[name for name, _ in COLUMNS]]
    cells += [["-" if row[name] is None else form.format(row[name]) for name, form in COLUMNS] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unet", choices=digits.UNETS, default="cross_attention")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--output", type=Path, default=Path("out/demo"))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)

    unet = digits.load_unet(arguments.unet)
    quantized = quantize(unet, digits.load_condition(arguments.unet), arguments.output)
    unets = {"fp32": unet, "bf16": digits.load_unet(arguments.unet, torch.bfloat16), **quantized}
    rows = evaluate(unets, arguments.unet, arguments.samples, arguments.output)
    report = {
        "unet": arguments.unet,
        "samples": arguments.samples,
        "environment": environment(),
        "models": rows,
        "notes": "psnr_db and ssim: against fp32 at equal noise; frechet: classifier features against real digits, "
        "fp32's own is the floor; MB = 10^6 bytes; cpu_prepacked_mb: int8 copies that only the CPU path keeps",
    }
    (arguments.output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print_table(rows)
    last = rows[-1]
    print(
        f"The quantized layers' weights take {last['quantized_weights_over_fp16']:.1%} of fp16, with all their tables "
        f"{last['quantized_weights_and_tables_over_fp16']:.1%}. Written to {arguments.output}: grid.png, report.json"
    )


if __name__ == "__main__":
    main()
