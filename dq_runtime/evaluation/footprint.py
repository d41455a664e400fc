"""Memory footprint of a UNet, counted from its tensors."""

from __future__ import annotations

from dataclasses import dataclass
from math import nan, prod

import torch
from torch import nn

from dq_kernels import ops
from dq_runtime.layers import quantized_layers
from dq_runtime.validation import instance

FP16_BYTES = 2
WEIGHT_TENSORS = ("packed_weight", "weight_scale")


@dataclass(frozen=True)
class Footprint:
    """Sizes of a UNet's tensors, in bytes.

    Attributes:
        unet: all parameters and buffers, in their current dtypes.
        unet_fp16: all parameters of the UNet before quantization, in fp16.
        weights: packed weights and weight scales of the quantized layers.
        weights_fp16: weights of the same layers in fp16.
        tables: the other buffers of the quantized layers: dilation, activation scales, zero points and weight sums.
        cpu_prepacked: int8 weight copies that oneDNN keeps after a forward pass on a CPU; 0 on a GPU.
    """

    unet: int
    unet_fp16: int
    weights: int
    weights_fp16: int
    tables: int
    cpu_prepacked: int

    @property
    def weight_ratio(self) -> float:
        """Size of the quantized weights relative to the same weights in fp16; NaN if no layer is quantized."""
        return self.weights / self.weights_fp16 if self.weights else nan

    @property
    def total_ratio(self) -> float:
        """Size of quantized weights and all tables relative to the weights in fp16; NaN if no layer is quantized."""
        return (self.weights + self.tables) / self.weights_fp16 if self.weights else nan


def footprint(unet: nn.Module) -> Footprint:
    """Counts the memory of a UNet, quantized or not.

    Raises:
        TypeError: if it is no model.
    """
    instance("unet", unet, nn.Module)
    layers = quantized_layers(unet).values()
    weights = sum(_bytes(getattr(layer, name)) for layer in layers for name in WEIGHT_TENSORS)
    buffers = sum(_bytes(buffer) for layer in layers for buffer in layer.buffers())
    packed = sum(layer.packed_weight.numel() for layer in layers)
    elements = sum(prod(layer.stock_shape) for layer in layers)
    parameters = sum(parameter.numel() for parameter in unet.parameters())
    return Footprint(
        unet=sum(map(_bytes, [*unet.parameters(), *unet.buffers()])),
        unet_fp16=FP16_BYTES * (parameters - packed + elements),
        weights=weights,
        weights_fp16=FP16_BYTES * elements,
        tables=buffers - sum(_bytes(layer.weight_scale) for layer in layers),
        cpu_prepacked=ops.prepacked_bytes([layer.packed_weight for layer in layers]),
    )


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
