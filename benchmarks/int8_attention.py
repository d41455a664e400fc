"""What attention in int8, softmax included, costs in image quality, alone and on top of INT4 layers.

    python benchmarks/int8_attention.py [--task digits/cross_attention] [--seeds 3] [--output FILE]

Draws the same noise in fp32 and with the UNet's attentions in int8, all else in floating point; then with a UNet that
was calibrated and trained block by block, W4A8 and W4A4, as it is and with its attentions in int8. The figures are PSNR
to fp32 and label accuracy, for each seed of calibration data, training and images.
"""

from __future__ import annotations

import argparse
import json
from copy import deepcopy
from pathlib import Path
from statistics import mean
from typing import Any

import environment
import torch
from diffusers.models.attention_processor import Attention
from quality import FIRST_IMAGE_SEED, ROOT, STEPS, collect
from tasks import TASKS

import dq_runtime
from dq_runtime.evaluation.metrics import psnr

IMAGES = 300
ITERATIONS = dq_runtime.Distillation().iterations


def with_int8_attention(unet: Any) -> Any:
    """A copy whose attentions all run in int8."""
    unet = deepcopy(unet)
    for module in unet.modules():
        if isinstance(module, Attention):
            module.set_processor(dq_runtime.Int8AttnProcessor())
    return unet


def measure(task_name: str, seed: int) -> dict[str, dict[str, float]]:
    """By UNet: PSNR to fp32 in dB (mean over images) and label accuracy."""
    task = TASKS[task_name]
    stock = task.unet()
    labels, classifier = task.labels(IMAGES), task.classifier()
    calibration_set = collect(task, stock, seed)
    unets = {"fp32": stock}
    for bits in (8, 4):
        config = dq_runtime.DilateQuantConfig(activation_bits=bits)
        distillation = dq_runtime.Distillation(iterations=ITERATIONS, seed=seed)
        unets[f"W4A{bits}"] = dq_runtime.calibrate(deepcopy(stock), calibration_set, config, distillation)
    unets |= {f"{name}, int8 attention": with_int8_attention(unet) for name, unet in unets.items()}
    images = {name: task.sample(unet, labels, FIRST_IMAGE_SEED + seed, STEPS) for name, unet in unets.items()}
    with torch.no_grad():
        return {
            name: {
                "psnr_db": float(psnr(drawn, images["fp32"]).mean()),
                "label_accuracy": (classifier(drawn).argmax(1) == labels).float().mean().item(),
            }
            for name, drawn in images.items()
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="digits/cross_attention")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    seeds = [measure(arguments.task, seed) for seed in range(arguments.seeds)]
    rows = [
        {
            "unet": name,
            **{f"mean_{column}": mean(seed[name][column] for seed in seeds) for column in seeds[0][name]},
            **{column: [seed[name][column] for seed in seeds] for column in seeds[0][name]},
        }
        for name in seeds[0]
    ]
    for row in rows:
        print(f"{row['unet']:24s}  {row['mean_psnr_db']:6.2f} dB  {row['mean_label_accuracy']:.1%}")
    slug = arguments.task.replace("/", "_")
    output = arguments.output or ROOT / "benchmarks" / "results" / f"int8_attention_{slug}.json"
    report = {
        "command": f"python benchmarks/int8_attention.py --task {arguments.task} --seeds {arguments.seeds}",
        "environment": environment.describe(),
        "task": arguments.task,
        "images": IMAGES,
        "rows": rows,
    }
    output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
