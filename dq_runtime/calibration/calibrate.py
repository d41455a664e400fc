"""From a floating-point UNet and its calibration set to a packed-INT4 UNet, in place."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from dq_kernels.ops import pack_int4
from dq_runtime.calibration.collect import CalibrationSet
from dq_runtime.calibration.dilation import weight_dilation
from dq_runtime.calibration.temporal import Samples, layers_by_input, sample_inputs, temporal_quantizer
from dq_runtime.calibration.weights import quantize_weight
from dq_runtime.config import DilateQuantConfig
from dq_runtime.convert import convert, plan_conversion
from dq_runtime.diffusers_quantizer import attach_quantizer
from dq_runtime.timesteps import TimestepGrid

logger = logging.getLogger("dq_runtime")


@torch.no_grad()
def calibrate(unet: Any, calibration_set: CalibrationSet, config: DilateQuantConfig | None = None) -> Any:
    """Quantizes a UNet in place: Weight Dilation, one activation quantizer per layer and timestep, packed weights.

    Args:
        unet: a floating-point ``UNet2DModel`` or ``UNet2DConditionModel``, on any device.
        calibration_set: calls recorded from its real sampling trajectory (``record``, ``collect_from_pipeline``,
            ``collect_from_scheduler``). Its timesteps become the grid of the activation tables.
        config: W4A8 by default.

    Returns:
        the same UNet, quantized.

    Raises:
        ValueError: if there is no calibration data, or weights or activations are not finite. The UNet is unchanged.
    """
    config = replace(config or DilateQuantConfig(), timesteps=calibration_set.timesteps)
    assert config.timesteps is not None
    layers = plan_conversion(unet, config).layers
    for name, layer in layers.items():
        for tensor, parameter in layer.named_parameters():
            if not bool(parameter.isfinite().all()):
                raise ValueError(f"{name}.{tensor} holds NaN or infinity; load the original weights again")
    samples = sample_inputs(unet, layers, calibration_set, TimestepGrid(config.timesteps))
    unreached = [name for name in layers if name not in samples]
    if unreached:
        logger.warning("Kept in floating point: %s (calibration never reached them)", ", ".join(unreached))
        config.modules_to_not_convert = [*(config.modules_to_not_convert or ()), *unreached]

    tensors: dict[str, dict[str, torch.Tensor]] = {}
    with tqdm(total=len(samples), desc="Quantizing layers") as progress:
        for names in layers_by_input(samples):
            tensors |= _quantize_group({name: layers[name] for name in names}, samples, config)
            for name in names:
                del samples[name]
            progress.update(len(names))
    convert(unet, config, tensors)
    attach_quantizer(unet, config)
    return unet


def _quantize_group(
    layers: Mapping[str, nn.Linear | nn.Conv2d], samples: Samples, config: DilateQuantConfig
) -> dict[str, dict[str, torch.Tensor]]:
    """The state dicts of layers that see one tensor: they share one dilation and one activation quantizer."""
    channels = next(iter(layers.values())).weight.shape[1]
    dilation = torch.ones(channels, device=next(iter(layers.values())).weight.device)
    if config.dilation == "weight":
        per_layer = [weight_dilation(layer.weight, config.max_dilation) for layer in layers.values()]
        dilation = torch.stack(per_layer).amin(0)
    act_scale, act_zero_point = temporal_quantizer(samples[next(iter(layers))], dilation, config.activation_bits)

    tensors = {}
    for name, layer in layers.items():
        weight = layer.weight.detach().float().movedim(1, -1) * dilation  # [N, K] or [N, KH, KW, K]
        values, weight_scale = quantize_weight(weight)
        tensors[name] = {
            "weight": pack_int4(values),
            "weight_scale": weight_scale,
            "weight_sum": values.flatten(1).sum(1, dtype=torch.int32),
            "weight_dilation": dilation.clone(),
            "act_scale": act_scale.clone(),
            "act_zero_point": act_zero_point.clone(),
        }
        if layer.bias is not None:
            tensors[name]["bias"] = layer.bias.detach()
    return tensors
