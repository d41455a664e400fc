"""Quantizes the trained emoji pipeline to packed INT4, and draws the same prompts from the same noise with both.

    python -m examples.emoji.demo [--images 64] [--bits 8] [--output out/demo]

Run it from the repository's root. It records the UNet while it draws, calibrates it, saves the packed pipeline and
loads it with stock diffusers. It writes ``grid.png``, the original's images above those of INT4; ``report.json``, all
numbers with device and versions; ``w4a8/``, the packed pipeline; and, in ``w4a8/report``, plots of its layers. It
prints the numbers as a table.
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
from collections.abc import Mapping, Sequence
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from matplotlib.figure import Figure

import dq_runtime
from dq_runtime import CalibrationSet, DilateQuantConfig, Distillation
from dq_runtime.evaluation.footprint import footprint
from dq_runtime.evaluation.plots import write_report
from examples.emoji import task

CALIBRATION_PROMPTS = 64
SETTINGS = Distillation()
# Layers close to the output, with 5% of the weights, stay in floating point. If layers are rounded one at a time, these
# cause most of the prediction's error, summed over all.
KEPT = (
    "conv_in", "conv_out", "up_blocks.2", "up_blocks.1.attentions", "up_blocks.1.upsamplers",
    "up_blocks.1.resnets.0.conv_shortcut", "up_blocks.1.resnets.1.conv_shortcut",
)  # fmt: skip
CALIBRATION_SEED, SAMPLE_SEED = 1, 0
SHOWN_PROMPTS = (
    "dog face", "fox", "panda", "owl", "frog", "butterfly", "red apple", "pizza", "birthday cake", "rocket", "bicycle",
    "grinning face",
)  # fmt: skip
SHOWN_GUIDANCE = 5.0
TIMED_BATCHES, TIMING_ROUNDS = (1, 16), 10
COLUMNS = (
    ("model", "{}"),
    ("agreement", "{:.1%}"),
    ("psnr_db, guidance 1", "{:.1f}"),
    ("psnr_db, guidance 5", "{:.1f}"),
    ("ssim, guidance 1", "{:.3f}"),
    ("ssim, guidance 5", "{:.3f}"),
    ("frechet", "{:.3f}"),
    ("unet_mb", "{:.2f}"),
    ("checkpoint_mb", "{:.2f}"),
    ("ms, batch 1", "{:.1f}"),
    ("ms, batch 16", "{:.1f}"),
)


def quantize(pipe: StableDiffusionPipeline, calibration_set: CalibrationSet, bits: int, folder: Path) -> float:
    """Calibrates a copy of the pipeline's UNet and saves the packed pipeline. Returns the seconds of calibration."""
    config = DilateQuantConfig(activation_bits=bits, modules_to_not_convert=list(KEPT))
    start = time.perf_counter()
    unet = dq_runtime.calibrate(deepcopy(pipe.unet), calibration_set, config, SETTINGS)
    seconds = time.perf_counter() - start
    task.with_unet(pipe, unet).save_pretrained(folder)
    return seconds


@torch.inference_mode()
def milliseconds(calls: CalibrationSet, unets: Mapping[str, Any], batch: int) -> dict[str, float]:
    """Median time of a UNet's call on so many samples. Every round times each UNet once."""
    call = calls.calls[0]
    text = call.arguments["encoder_hidden_states"]
    times: dict[str, list[float]] = {name: [] for name in unets}
    for _ in range(1 + TIMING_ROUNDS):
        for name, unet in unets.items():
            start = time.perf_counter()
            unet(call.sample[:batch], call.timestep, encoder_hidden_states=text[:batch])
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def evaluate(
    pipes: Mapping[str, StableDiffusionPipeline], asked: task.Prompts, calls: CalibrationSet
) -> list[dict[str, Any]]:
    """Draws with every pipeline from the same noise and measures the images. The first pipeline is the reference."""
    judge, images = task.Judge(), {}
    for name, pipe in pipes.items():
        print(f"Drawing {len(asked)} prompts with {name}, at guidance 1 and 5", flush=True)
        images[name] = task.draw_all(pipe, asked.captions, SAMPLE_SEED)
    print("Measuring", flush=True)
    unets = {name: pipe.unet for name, pipe in pipes.items()}
    times = {batch: milliseconds(calls, unets, batch) for batch in TIMED_BATCHES}
    reference, rows = next(iter(images.values())), []
    for name, drawn in images.items():
        sizes = footprint(unets[name])
        row = {"model": name, "agreement": judge.agreement(drawn, asked), "frechet": judge.frechet(drawn, asked)}
        for guidance, measures in task.closeness(drawn, reference).items():
            for measure, value in measures.items():
                row[f"{measure}, guidance {guidance:g}"] = None if drawn is reference else value
        rows.append(
            row
            | {f"ms, batch {batch}": times[batch][name] for batch in TIMED_BATCHES}
            | {
                "unet_mb": sizes.unet / 1e6,
                "unet_mb_fp16": sizes.unet_fp16 / 1e6,
                "quantized_weights_over_fp16": sizes.weight_ratio if sizes.weights else None,
                "quantized_weights_and_tables_over_fp16": sizes.total_ratio if sizes.weights else None,
                "checkpoint_mb": checkpoint_mb(unets[name]),
                "cpu_prepacked_mb": sizes.cpu_prepacked / 1e6,
            }
        )
    return rows


def checkpoint_mb(unet: Any) -> float:
    """Size of the weight files that the UNet was loaded from."""
    return sum(file.stat().st_size for file in Path(unet.config["_name_or_path"]).glob("*.safetensors")) / 1e6


def plot_prompts(images: Mapping[str, torch.Tensor], captions: Sequence[str]) -> Figure:
    """One row of images [B, 3, H, W] for each model, under the captions."""
    figure = Figure(figsize=(len(captions), 0.97 * len(images) + 0.2), dpi=120, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0.02, hspace=0.02)
    plots = figure.subplots(len(images), len(captions), squeeze=False)
    for row, (name, drawn) in zip(plots, images.items(), strict=True):
        row[0].set_ylabel(name, fontsize=8)
        for axes, image in zip(row, drawn, strict=True):
            axes.imshow((image / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy())
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
    for axes, caption in zip(plots[0], captions, strict=True):
        axes.set_title(caption, fontsize=8, pad=3)
    return figure


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
        **{name: version(name) for name in ("triton", "diffusers", "transformers", "dq-runtime")},
    }


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints the report's rows as an aligned table."""
    cells = [[name for name, _ in COLUMNS]]
    cells += [["-" if row[name] is None else form.format(row[name]) for name, form in COLUMNS] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64, help="at each guidance scale (default: %(default)s)")
    parser.add_argument("--bits", type=int, choices=(8, 6, 4), default=8, help="of activations (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("out/demo"))
    arguments = parser.parse_args()
    name, folder = f"INT4 W4A{arguments.bits}", arguments.output / f"w4a{arguments.bits}"
    asked, for_calibration = task.prompts(arguments.images, CALIBRATION_PROMPTS, CALIBRATION_SEED)

    original = task.load_pipeline()
    print(f"Recording the UNet while it draws {len(for_calibration)} prompts", flush=True)
    calls = task.collect(original, for_calibration, CALIBRATION_SEED)
    print(f"Calibrating {name}", flush=True)
    seconds = quantize(original, calls, arguments.bits, folder)
    packed = task.load_pipeline(folder)
    write_report(packed.unet, original.unet, CalibrationSet(calls.calls[: task.STEPS]), folder / "report")
    dq_runtime.fuse(packed.unet)
    pipes = {"fp32": original, name: packed}
    rows = evaluate(pipes, asked, calls)
    shown = {name: task.draw(pipe, SHOWN_PROMPTS, SHOWN_GUIDANCE, SAMPLE_SEED) for name, pipe in pipes.items()}
    plot_prompts(shown, SHOWN_PROMPTS).savefig(arguments.output / "grid.png")
    report = {
        "images": arguments.images,
        "steps": task.STEPS,
        "calibration_prompts": CALIBRATION_PROMPTS,
        "calibration_seconds": seconds,
        "kept_in_floating_point": KEPT,
        "environment": environment(),
        "models": rows,
        "notes": "agreement: images closest to their own prompt among 32; psnr_db and ssim: means, against fp32 at "
        "equal noise; frechet: classifier features against real images of the same emoji; agreement and frechet are of "
        "both guidance scales' images; ms: one call of the UNet, median; MB = 10^6 bytes; cpu_prepacked_mb: int8 "
        "copies that only the CPU path keeps",
    }
    (arguments.output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print_table(rows)
    last = rows[-1]
    print(
        f"Calibration took {seconds:.0f} s. The quantized layers' weights take "
        f"{last['quantized_weights_over_fp16']:.1%} of fp16, with all their tables "
        f"{last['quantized_weights_and_tables_over_fp16']:.1%}. Written to {arguments.output}: grid.png, report.json"
    )


if __name__ == "__main__":
    main()
