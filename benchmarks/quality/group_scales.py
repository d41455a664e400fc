"""What scales for groups of input channels would bring: weights rounded with them, in simulation.

    python -m benchmarks.quality.group_scales [--task digits/cross_attention] [--images 100] [--output FILE]

Weights of all layers that a UNet quantizes are rounded to nearest in 4 bits and multiplied back; activations stay in
floating point. A scale serves an output channel, as in this package, or a group of input channels of it (for a
convolution: of each of its taps). The figures are PSNR to the floating-point UNet, from the same noise, and the bits
for each weight with scales in fp16.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch

import dq_runtime
from benchmarks.quality.study import FIRST_IMAGE_SEED, slug, task_parser, write_report
from dq_runtime.convert import plan_conversion
from dq_runtime.evaluation.metrics import psnr
from dq_runtime.weights import quantize_weight
from examples.small_unets.tasks import TASKS

GROUPS = (None, 128, 64, 32)  # input channels; None: all of an output channel


def rounded(weight: torch.Tensor, group: int | None) -> tuple[torch.Tensor, int]:
    """A weight [N, K, ...] after rounding, and its number of scales."""
    rows = weight.movedim(1, -1)  # [N, ..., K]
    if group is None:
        parts = [rows.reshape(rows.shape[0], -1)]
    else:
        parts = [part.reshape(-1, part.shape[-1]) for part in rows.split(group, dim=-1)]
    results, scales = [], 0
    for part in parts:
        values, scale = quantize_weight(part)
        results.append(values * scale[:, None])
        scales += scale.numel()
    if group is None:
        return results[0].view(rows.shape).movedim(-1, 1), scales
    return torch.cat([result.view(*rows.shape[:-1], -1) for result in results], dim=-1).movedim(-1, 1), scales


@torch.no_grad()
def with_rounded_weights(unet: Any, group: int | None) -> tuple[Any, float]:
    """A copy of a UNet with rounded weights, and the bits for each of them."""
    unet = deepcopy(unet)
    scales = weights = 0
    for layer in plan_conversion(unet, dq_runtime.DilateQuantConfig()).layers.values():
        result, count = rounded(layer.weight, group)
        layer.weight.copy_(result)
        scales, weights = scales + count, weights + result.numel()
    return unet, 4 + 16 * scales / weights


def main() -> None:
    parser = task_parser(__doc__)
    parser.add_argument("--images", type=int, default=100)
    arguments = parser.parse_args()
    task = TASKS[arguments.task]
    unet, labels = task.unet(), task.labels(arguments.images)
    expected = task.sample(unet, labels, FIRST_IMAGE_SEED)
    rows = []
    for group in GROUPS:
        model, bits = with_rounded_weights(unet, group)
        drawn = task.sample(model, labels, FIRST_IMAGE_SEED)
        rows.append({"group": group, "bits": bits, "psnr_db": float(psnr(drawn, expected).mean())})
        print(rows[-1], flush=True)
    report = {"task": arguments.task, "images": arguments.images, "rows": rows}
    options = f"--task {arguments.task} --images {arguments.images}"
    write_report("group_scales", options, slug(arguments.task), report, arguments.output)


if __name__ == "__main__":
    main()
