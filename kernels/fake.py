"""The operators on tensors without values: the shapes and dtypes of results, for torch.compile and torch.export."""

from __future__ import annotations

import torch
from torch import Tensor

from dq_kernels.records import Norm, PackedWeight, Quantizer
from dq_kernels.shapes import conv2d_output_size, quantized_shape, statistics_shape


def _check_same_kind(op: str, x: Tensor, *others: Tensor) -> None:
    """One tensor without values is enough for torch to ask for a result without values, on a device that has none."""
    for tensor in others:
        if x.is_meta != tensor.is_meta:
            raise ValueError(
                f"{op}: one argument is on {x.device}, another on {tensor.device}: load offloaded weights first"
            )


def quantize(x: Tensor, quantizer: Quantizer, padding: tuple[int, int]) -> Tensor:
    """As ``reference.quantize``."""
    _check_same_kind("quantize", x, quantizer.scale)
    return x.new_empty(quantized_shape(x.shape, padding), dtype=torch.int8)


def layer_norm_quantize(x: Tensor, norm: Norm, quantizer: Quantizer) -> Tensor:
    """As ``reference.layer_norm_quantize``."""
    _check_same_kind("layer_norm_quantize", x, quantizer.scale)
    return x.new_empty(x.shape, dtype=torch.int8)


def group_norm_quantize(
    x: Tensor, num_groups: int, norm: Norm, quantizer: Quantizer, silu: bool, skip: Tensor | None,
    statistics: Tensor | None, skip_statistics: Tensor | None, padding: tuple[int, int],
    plain_quantizer: Quantizer | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As ``reference.group_norm_quantize``."""
    _check_same_kind("group_norm_quantize", x, quantizer.scale)
    batch, *size, _ = x.shape
    channels = quantizer.dilation.shape[0]
    q = x.new_empty(quantized_shape((batch, *size, channels), padding), dtype=torch.int8)
    return q, x.new_empty((0 if plain_quantizer is None else batch, *size, channels), dtype=torch.int8)


def int4_linear(
    x: Tensor, weight: PackedWeight, quantizer: Quantizer, bias: Tensor | None, residual: Tensor | None,
    out_dtype: torch.dtype, next_quantizer: Quantizer | None = None,
) -> Tensor:  # fmt: skip
    """As ``reference.int4_linear``."""
    _check_same_kind("int4_linear", x, weight.values)
    return x.new_empty(*x.shape[:-1], weight.values.shape[0], dtype=out_dtype if next_quantizer is None else torch.int8)


def int4_geglu_quantize(
    x: Tensor, weight: PackedWeight, quantizer: Quantizer, next_quantizer: Quantizer, bias: Tensor | None
) -> Tensor:
    """As ``reference.int4_geglu_quantize``."""
    _check_same_kind("int4_geglu_quantize", x, weight.values)
    return x.new_empty(*x.shape[:-1], next_quantizer.dilation.shape[0], dtype=torch.int8)


def int4_conv2d(
    x: Tensor, weight: PackedWeight, quantizer: Quantizer, bias: Tensor | None, channel_add: Tensor | None,
    residual: Tensor | None, stride: tuple[int, int], dilation: tuple[int, int], upsample: bool,
    out_dtype: torch.dtype, with_statistics: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As ``reference.int4_conv2d``."""
    _check_same_kind("int4_conv2d", x, weight.values)
    batch, out_channels = x.shape[0], weight.values.shape[0]
    size = conv2d_output_size(x.shape[1:3], weight.values.shape[1:3], stride, dilation, upsample)
    y = x.new_empty(batch, *size, out_channels, dtype=out_dtype)
    return y, x.new_empty(statistics_shape(batch, size, out_channels, with_statistics), dtype=torch.float32)


def attention_quantize(query: Tensor, key: Tensor, value: Tensor, heads: int, quantizer: Quantizer) -> Tensor:
    """As ``reference.attention_quantize``."""
    _check_same_kind("attention_quantize", query, key, value, quantizer.scale)
    return query.new_empty(query.shape, dtype=torch.int8)


def int8_attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """As ``reference.int8_attention``."""
    _check_same_kind("int8_attention", query, key, value)
    return query.new_empty(query.shape)


def int8_attention_quantize(
    query: Tensor, key: Tensor, value: Tensor, heads: int, quantizer: Quantizer, statistics: Tensor | None = None
) -> Tensor:
    """As ``reference.int8_attention_quantize``."""
    _check_same_kind("int8_attention_quantize", query, key, value, quantizer.scale)
    return query.new_empty(query.shape, dtype=torch.int8)
