"""Image quality with attention in int8, softmax included, alone and on top of INT4 layers.

    python -m benchmarks.quality.int8_attention [--task digits/cross_attention] [--seeds 3] [--output FILE]
    python -m benchmarks.quality.int8_attention --random

Samples from the same noise with several UNets: fp32; fp32 with attentions in int8; W4A8 and W4A4, calibrated and
trained block by block, without and with attentions in int8. The figures are PSNR to fp32 and label accuracy, for each
seed of calibration data, training and images.

The attentions of these UNets have few tokens. ``--random`` writes the signal-to-noise ratio (dB) of one attention to up
to 4096 random tokens, by the standard deviation of its scores.
"""

from __future__ import annotations

import math
from copy import deepcopy
from statistics import mean
from typing import Any

import torch
from diffusers.models.attention_processor import Attention

import dq_runtime
from benchmarks.quality.study import FIRST_IMAGE_SEED, STEPS, collect, slug, task_parser, write_report
from dq_kernels import ops
from dq_runtime.attention import float_attention
from dq_runtime.evaluation.metrics import psnr
from examples.small_unets.tasks import TASKS

IMAGES, ACTIVATION_BITS = 300, (8, 4)
ITERATIONS = dq_runtime.Distillation().iterations


def with_int8_attention(unet: Any) -> Any:
    """A copy with all attentions in int8."""
    unet = deepcopy(unet)
    for module in unet.modules():
        if isinstance(module, Attention):
            module.set_processor(dq_runtime.Int8AttnProcessor())
    return unet


def measure(task_name: str, seed: int) -> dict[str, dict[str, float]]:
    """PSNR to fp32 in dB (mean over images) and label accuracy of each UNet."""
    task = TASKS[task_name]
    stock = task.unet()
    labels, classifier = task.labels(IMAGES), task.classifier()
    calibration_set = collect(task, stock, seed)
    unets = {"fp32": stock}
    for bits in ACTIVATION_BITS:
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


def sqnr_db(tokens: int, spread: float) -> float:
    """SQNR of int8 attention to normal tokens, heads of 64 channels; scores have standard deviation ``spread``."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, length, 256, generator=generator) for length in (256, tokens, tokens))
    exact = float_attention(*(x.double() for x in (spread * query, key, value)), 4)
    error = ops.int8_attention(spread * query, key, value, 4) - exact
    return 10 * math.log10(float(exact.square().mean() / error.square().mean()))


def random_tokens() -> list[dict[str, float]]:
    """Attention to random tokens: their number, the standard deviation of the scores, and the SQNR."""
    rows = []
    for spread in (1.0, 2.0, 4.0):
        for tokens in (64, 256, 1024, 4096):
            rows.append({"tokens": tokens, "spread": spread, "sqnr_db": sqnr_db(tokens, spread)})
            print(f"{tokens:5d} tokens, spread {spread:.0f}: {rows[-1]['sqnr_db']:.1f} dB")
    return rows


def drawn(task_name: str, num_seeds: int) -> list[dict[str, Any]]:
    """For each UNet: the means over the seeds, and each seed's figures."""
    seeds = [measure(task_name, seed) for seed in range(num_seeds)]
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
    return rows


def main() -> None:
    parser = task_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--random", action="store_true", help="measure one attention to random tokens, without a UNet")
    arguments = parser.parse_args()
    if arguments.random:
        name, options = "random", "--random"
        report = {"rows": random_tokens()}
    else:
        name, options = slug(arguments.task), f"--task {arguments.task} --seeds {arguments.seeds}"
        report = {"task": arguments.task, "images": IMAGES, "rows": drawn(arguments.task, arguments.seeds)}
    write_report("int8_attention", options, name, report, arguments.output)


if __name__ == "__main__":
    main()
