"""Methods that quantize a whole UNet to W4A8 and W4A4, for ``compare.py``: DilateQuant's parts, and earlier methods.

Every method quantizes the same layers: all except ``conv_in`` and ``conv_out``. One row quantizes no convolution, as
some libraries do, and one keeps the layers close to the output in floating point (``late_layers``). All methods use the
same packed format, with one weight scale per output channel, and the same kernels. They differ only in the values of
weights, scales and zero points. In W4A4 the inputs of ``conv_shortcut`` have 8 bits, the config's default; one row has
4 bits there, too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from benchmarks.peers.unets import late_layers
from dq_runtime import CalibrationSet, DilateQuantConfig, Distillation, calibrate
from dq_runtime.calibration.settings import ERROR_FEEDBACK
from dq_runtime.calibration.temporal import layers_by_input, sample_inputs, temporal_quantizer
from dq_runtime.config import NOT_CONVERTED
from dq_runtime.convert import convert, plan_conversion
from dq_runtime.diffusers_quantizer import attach_quantizer
from dq_runtime.timesteps import grouped
from dq_runtime.weights import layer_tensors, quantize_weight

ACTIVATION_BITS = (8, 4)  # the table's rows
# (fp32 UNet, calibration set, activation bits, seed) -> quantized copy
Quantize = Callable[[Any, CalibrationSet, int, int], Any]


def dilatequant(
    dilation: str,
    groups: int | None,
    distillation: Distillation | None,
    linears_alone: bool = False,
    late_layers_kept: bool = False,
    **others: Any,
) -> Quantize:
    """Our own calibration. ``groups`` of timesteps: 1 is a static scale. ``others`` are more fields of the config."""

    def quantize(unet: Any, calibration_set: CalibrationSet, bits: int, seed: int) -> Any:
        config = DilateQuantConfig(activation_bits=bits, dilation=dilation, timestep_groups=groups, **others)
        if linears_alone:
            convs = [name for name, module in unet.named_modules() if isinstance(module, nn.Conv2d)]
            config = replace(config, modules_to_not_convert=convs)
        if late_layers_kept:
            config = replace(config, modules_to_not_convert=[*NOT_CONVERTED, *late_layers(unet)])
        settings = None if distillation is None else replace(distillation, seed=seed)
        return calibrate(deepcopy(unet), calibration_set, config, settings)

    return quantize


def min_max(smoothing: float | None) -> Quantize:
    """Min-max ranges of the sampled values, one for all timesteps; weights are rounded to nearest.

    ``smoothing``: SmoothQuant's exponent (arXiv 2211.10438): s_k = max|x_k|^a / max|w_k|^(1 - a).
    """

    def quantize(unet: Any, calibration_set: CalibrationSet, bits: int, seed: int) -> Any:
        quantized = deepcopy(unet)
        config = DilateQuantConfig(activation_bits=bits, dilation="none", timestep_groups=1)
        config = replace(config, timesteps=grouped(calibration_set.timesteps, 1))
        layers = plan_conversion(quantized, config).layers
        samples = sample_inputs(quantized, layers, calibration_set)
        tensors = {}
        for names in layers_by_input(samples):
            x = torch.cat(samples[names[0]])
            dilation = torch.ones(x.shape[1])
            if smoothing is not None:
                weights = torch.cat([layers[name].weight.detach().transpose(0, 1).flatten(1) for name in names], dim=1)
                sizes = x.abs().amax(0).clamp(min=1e-5), weights.abs().amax(1).clamp(min=1e-5)
                dilation = sizes[0] ** smoothing / sizes[1] ** (1 - smoothing)
            tables = temporal_quantizer([x], dilation, config.activation_bits_of(names[0]), candidates=1)
            for name in names:
                weight = layers[name].weight.detach().movedim(1, -1) * dilation
                rounded = quantize_weight(weight, candidates=1)
                tensors[name] = layer_tensors(layers[name], *rounded, dilation, *tables, layers[name].bias)
        convert(quantized, config, tensors)
        attach_quantizer(quantized, config)
        return quantized

    return quantize


def on_loading(unet: Any, calibration_set: CalibrationSet, bits: int, seed: int) -> Any:
    """Quantization of a checkpoint while it is loaded: no data, scales of each sample at run time."""
    with tempfile.TemporaryDirectory() as folder:
        unet.save_pretrained(folder)
        return type(unet).from_pretrained(folder, quantization_config=DilateQuantConfig(activation_bits=bits)).eval()


BLOCKWISE = Distillation()
POLISHED = Distillation(polish_iterations=200)

METHODS: dict[str, Quantize] = {  # the table's rows, for each number of activation bits (exceptions: ONLY_AT)
    "round to nearest, min-max": min_max(None),
    "on loading, without data": on_loading,
    "SmoothQuant": min_max(0.5),
    "one static scale": dilatequant("none", 1, None),
    "WD": dilatequant("joint", 1, None),
    "WD as published + TPQ": dilatequant("weight", None, None),
    "WD + TPQ": dilatequant("joint", None, None),
    "WD + TPQ + error feedback": dilatequant("joint", None, ERROR_FEEDBACK),
    "TPQ + BKD": dilatequant("none", None, BLOCKWISE),
    "WD + BKD": dilatequant("joint", 1, BLOCKWISE),
    "WD + TPQ + BKD": dilatequant("joint", None, BLOCKWISE),
    "WD + TPQ + BKD, polished": dilatequant("joint", None, POLISHED),
    "WD + TPQ + BKD, late layers kept": dilatequant("joint", None, BLOCKWISE, late_layers_kept=True),
    "WD + TPQ + BKD, linears alone": dilatequant("joint", None, BLOCKWISE, linears_alone=True),
    "WD + TPQ + BKD, shortcuts alike": dilatequant("joint", None, BLOCKWISE, layer_activation_bits={}),
}
ONLY_AT = {  # activation bits: 8 as in the libraries with quantized linears alone; 4, as 8 is the default
    "WD + TPQ + BKD, linears alone": 8,
    "WD + TPQ + BKD, shortcuts alike": 4,
}
QUICK = ("round to nearest, min-max", "SmoothQuant", "one static scale", "WD + TPQ", "WD + TPQ + BKD")
