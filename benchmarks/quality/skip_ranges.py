"""The skip concatenation of an up block: one quantizer for both sources against one for each.

    python -m benchmarks.quality.skip_ranges [--task digits/cross_attention] [--output FILE]

A resnet's ``conv_shortcut`` reads the concatenation of the previous layer's output and the skip connection, whose
ranges differ. For each such layer, the script reports the signal-to-noise ratio (dB) of the output with one quantizer
and no dilation, with each rule of dilation (its factors can include the ratio of the ranges), and with one quantizer
per source. Weights are rounded to nearest.
"""

from __future__ import annotations

import math
from typing import Any

import torch

import dq_runtime
from benchmarks.quality.study import BATCH, STEPS, slug, task_parser, write_report
from dq_runtime.calibration.dilation import joint_dilation
from dq_runtime.calibration.temporal import rounded, sample_inputs, temporal_quantizer
from dq_runtime.convert import plan_conversion
from dq_runtime.weights import quantize_weight, weight_dilation
from examples.small_unets.tasks import TASKS

CALIBRATION_SAMPLES = 40
MAX_DILATION = 8.0


def output_sqnr(
    weight: torch.Tensor, per_timestep: list[torch.Tensor], dilation: torch.Tensor, bits: int, ends: list[int]
) -> float:
    """Output SQNR (dB) of a 1x1 convolution [N, K], one quantizer per part of its inputs; ``ends`` of the parts."""
    values, weight_scale = quantize_weight(weight * dilation)
    restored = values * weight_scale[:, None]
    signal = noise = 0.0
    for rows in per_timestep:
        parts, start = [], 0
        for end in ends:
            part = rows[:, start:end] / dilation[start:end]
            scale, zero_point = temporal_quantizer([part], torch.ones(end - start), bits)
            parts.append(rounded(part, scale, zero_point, bits))
            start = end
        expected = rows @ weight.T
        signal += expected.square().sum().item()
        noise += (torch.cat(parts, 1) @ restored.T - expected).square().sum().item()
    return 10 * math.log10(signal / noise)


def sources(unet: Any, name: str) -> int:
    """The number of a ``conv_shortcut``'s input channels from the previous layer; the rest is the skip connection."""
    _, block, _, resnet, _ = name.split(".")
    if int(resnet) > 0:
        return int(unet.up_blocks[int(block)].resnets[int(resnet) - 1].out_channels)
    before = unet.up_blocks[int(block) - 1] if int(block) > 0 else unet.mid_block
    return int(before.resnets[-1].out_channels)


@torch.no_grad()
def main() -> None:
    parser = task_parser(__doc__)
    arguments = parser.parse_args()
    task = TASKS[arguments.task]
    unet = task.unet()
    calibration_set = dq_runtime.collect_from_scheduler(
        unet, task.noise_scheduler(), task.noise(CALIBRATION_SAMPLES, 0), STEPS,
        task.condition(task.labels(CALIBRATION_SAMPLES)), BATCH,
    )  # fmt: skip
    layers = plan_conversion(unet, dq_runtime.DilateQuantConfig()).layers
    layers = {name: layers[name] for name in layers if name.startswith("up_blocks") and name.endswith("conv_shortcut")}
    samples = sample_inputs(unet, layers, calibration_set)
    rows = []
    for bits in (8, 4):
        for name, layer in layers.items():
            weight, seen, below = layer.weight.flatten(1), samples[name], sources(unet, name)
            channels = weight.shape[1]
            everything = torch.cat(seen).abs()
            none = torch.ones(channels)
            joint = joint_dilation([layer.weight], seen, bits, MAX_DILATION)
            row = {
                "layer": name,
                "activation_bits": bits,
                "range_ratio": (everything[:, :below].max() / everything[:, below:].max()).item(),
                "none": output_sqnr(weight, seen, none, bits, [channels]),
                "weight": output_sqnr(weight, seen, weight_dilation(weight, MAX_DILATION), bits, [channels]),
                "joint": output_sqnr(weight, seen, joint, bits, [channels]),
                "two quantizers": output_sqnr(weight, seen, none, bits, [below, channels]),
                "joint and two quantizers": output_sqnr(weight, seen, joint, bits, [below, channels]),
            }
            rows.append(row)
            print({key: round(value, 1) if isinstance(value, float) else value for key, value in row.items()})
    results = {"task": arguments.task, "rows": rows}
    write_report("skip_ranges", f"--task {arguments.task}", slug(arguments.task), results, arguments.output)


if __name__ == "__main__":
    main()
