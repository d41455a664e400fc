"""Ways to quantize a whole UNet to W4A8 and W4A4, for ``quality.py``: DilateQuant part by part, and what was before it.

Every method quantizes the same layers (all but ``conv_in`` and ``conv_out``), to the same packed format, with one
weight scale for each output channel, and runs on the same kernels; only how the numbers are found differs.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch

from dq_runtime import CalibrationSet, DilateQuantConfig, Distillation, calibrate
from dq_runtime.calibration.temporal import layers_by_input, sample_inputs, temporal_quantizer
from dq_runtime.calibration.weights import layer_tensors, quantize_weight
from dq_runtime.convert import convert, plan_conversion
from dq_runtime.diffusers_quantizer import attach_quantizer
from dq_runtime.timesteps import TimestepGrid, grouped

Quantize = Callable[[Any, CalibrationSet, int, int], Any]  # UNet, calibration set, activation bits, seed


@dataclass(frozen=True)
class Method:
    """A row of the table, for each number of activation bits.

    Attributes:
        parts: which of DilateQuant's parts it has.
        quantize: a quantized copy of an fp32 UNet; the seed is for what is random in it.
    """

    name: str
    parts: tuple[str, ...]
    quantize: Quantize


def dilatequant(dilation: str, groups: int | None, distillation: Distillation | None) -> Quantize:
    """Our own calibration; ``groups`` of timesteps, one of them is a static scale."""

    def quantize(unet: Any, calibration_set: CalibrationSet, bits: int, seed: int) -> Any:
        config = DilateQuantConfig(activation_bits=bits, dilation=dilation, timestep_groups=groups)
        settings = None if distillation is None else replace(distillation, seed=seed)
        return calibrate(deepcopy(unet), calibration_set, config, settings)

    return quantize


def min_max(smoothing: float | None) -> Quantize:
    """Ranges from the least to the largest value, one for all timesteps; weights rounded to nearest.

    ``smoothing``: SmoothQuant's exponent (arXiv 2211.10438): s_k = max|x_k|^a / max|w_k|^(1 - a).
    """

    def quantize(unet: Any, calibration_set: CalibrationSet, bits: int, seed: int) -> Any:
        quantized = deepcopy(unet)
        config = DilateQuantConfig(activation_bits=bits, dilation="none", timestep_groups=1)
        config = replace(config, timesteps=grouped(calibration_set.timesteps, 1))
        layers = plan_conversion(quantized, config).layers
        samples = sample_inputs(quantized, layers, calibration_set, TimestepGrid(config.timesteps or []))
        tensors = {}
        for names in layers_by_input(samples):
            (x,) = samples[names[0]]
            dilation = torch.ones(x.shape[1])
            if smoothing is not None:
                weights = torch.cat([layers[name].weight.detach().transpose(0, 1).flatten(1) for name in names], dim=1)
                sizes = x.abs().amax(0).clamp(min=1e-5), weights.abs().amax(1).clamp(min=1e-5)
                dilation = sizes[0] ** smoothing / sizes[1] ** (1 - smoothing)
            tables = temporal_quantizer([x], dilation, bits, candidates=1)
            for name in names:
                weight = layers[name].weight.detach().movedim(1, -1) * dilation
                rounded = quantize_weight(weight, candidates=1)
                tensors[name] = layer_tensors(layers[name], *rounded, dilation, *tables, layers[name].bias)
        convert(quantized, config, tensors)
        attach_quantizer(quantized, config)
        return quantized

    return quantize


BLOCKWISE = Distillation()
POLISHED = Distillation(polish_iterations=200)
WD, TPQ, BKD, POLISH = "WD", "TPQ", "BKD", "polish"

METHODS = {
    method.name: method
    for method in (
        Method("round to nearest, min-max", (), min_max(None)),
        Method("SmoothQuant", (), min_max(0.5)),
        Method("one static scale", (), dilatequant("none", 1, None)),
        Method("WD", (WD,), dilatequant("joint", 1, None)),
        Method("WD as published + TPQ", (WD, TPQ), dilatequant("weight", None, None)),
        Method("WD + TPQ", (WD, TPQ), dilatequant("joint", None, None)),
        Method("TPQ + BKD", (TPQ, BKD), dilatequant("none", None, BLOCKWISE)),
        Method("WD + BKD", (WD, BKD), dilatequant("joint", 1, BLOCKWISE)),
        Method("WD + TPQ + BKD", (WD, TPQ, BKD), dilatequant("joint", None, BLOCKWISE)),
        Method("WD + TPQ + BKD, polished", (WD, TPQ, BKD, POLISH), dilatequant("joint", None, POLISHED)),
    )
}
