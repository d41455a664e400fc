"""Quantized UNets with random packed weights, to measure latency and memory without a calibration.

Both depend on shapes and dtypes, not on values. The scales keep activations finite.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from benchmarks import unets
from dq_kernels import ops
from dq_runtime.config import DilateQuantConfig
from dq_runtime.convert import insert_empty_layers
from dq_runtime.layers import QuantizedLayer, quantized_layers

TIMESTEPS = tuple(range(19, 1000, 49))


def build(name: str, device: torch.device | str, dtype: torch.dtype, int8_attention: Sequence[str] = ()) -> Any:
    """A quantized UNet of ``unets.CONFIGS`` in evaluation mode; its values are drawn on the device."""
    unet = unets.build(name, "meta", dtype)
    replace_layers(unet, device, int8_attention)
    for module in unet.modules():
        if not isinstance(module, QuantizedLayer) and any(p.is_meta for p in module.parameters(recurse=False)):
            module.to_empty(device=device, recurse=False)
            _fill_floating_point(module)
    return unet.to(device).eval()


def replace_layers(unet: Any, device: torch.device | str, int8_attention: Sequence[str] = ()) -> None:
    """Replaces a UNet's layers by quantized ones with random weights, in place."""
    insert_empty_layers(unet, DilateQuantConfig(timesteps=list(TIMESTEPS), int8_attention=list(int8_attention)))
    for layer in quantized_layers(unet).values():
        _fill(layer, device)


@torch.no_grad()
def _fill(layer: QuantizedLayer, device: torch.device | str) -> None:
    weight = torch.randint(0, 256, layer.packed_weight.shape, dtype=torch.uint8, device=device)
    reduction = 2 * weight[0].numel()
    tensors = {
        "packed_weight": weight,
        # Values of [-8, 7] have a mean square of 21.5; inputs of unit variance give outputs of about 0.5.
        "weight_scale": torch.full(layer.weight_scale.shape, 0.5 / (21.5 * reduction) ** 0.5, device=device),
        "weight_sum": ops.unpack_int4(weight).flatten(1).sum(1, dtype=torch.int32),
        "weight_dilation": torch.ones(layer.weight_dilation.shape, device=device),
        "act_scale": torch.full(layer.act_scale.shape, 0.03, device=device),
        "act_zero_point": torch.full(layer.act_zero_point.shape, -3, dtype=torch.int32, device=device),
    }
    if layer.bias is not None:
        tensors["bias"] = torch.zeros(layer.bias.shape, dtype=layer.bias.dtype, device=device)
    layer.load_state_dict(tensors, assign=True)


@torch.no_grad()
def _fill_floating_point(module: nn.Module) -> None:
    for name, parameter in module.named_parameters(recurse=False):
        if name == "bias":
            parameter.zero_()
        elif isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            parameter.fill_(1)
        else:
            parameter.normal_(std=0.02)
