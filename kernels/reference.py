"""The oracle: what every operator computes, in plain torch, slow and obvious.

Symbols: B samples, K input channels (even; an odd count is padded by one), N output channels, T timestep groups. The
integers are summed in int64 or float64, which hold the same values as int32 in the kernels. The method is DilateQuant
(arXiv 2409.14307). The signatures here are those of every implementation, and of the registered operators.

int8 holds no NaN and no infinity. An operator that quantizes floating-point values makes the timestep index negative of
each sample of which a value is not finite (``NOT_FINITE``, or ~t of the index t); operators that multiply int8 give NaN
for a sample with a negative index. The index is of one call of a model, so all later results of that sample are NaN, as
in floating point; other samples' are as they would be without it. The int8 values of such a sample mean nothing.
``int4_linear`` and ``int4_geglu_quantize`` write no index: that of their int8 input was written before.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dq_kernels.packing import unpack_int4
from dq_kernels.records import NOT_FINITE, Norm, PackedWeight, Quantizer


def _tables(quantizer: Quantizer, ndim: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each sample: [T] -> [B, 1, ...] with ``ndim`` dimensions."""
    rows = quantizer.timestep_index.long().clamp(0, quantizer.scale.numel() - 1)
    per_sample = (-1, *[1] * (ndim - 1))
    return quantizer.scale[rows].reshape(per_sample), quantizer.zero_point[rows].reshape(per_sample)


def quantize(x: Tensor, quantizer: Quantizer, padding: tuple[int, int] = (0, 0)) -> Tensor:
    """x [B, ..., K] float -> int8 [B, ..., K padded to even], in [-2^(bits-1), 2^(bits-1) - 1].

    An image [B, H, W, K] gets ``padding`` rows and columns of the quantized zero on each side. The timestep index of
    samples that are not finite becomes ``NOT_FINITE``.
    """
    quantizer.timestep_index[~x.isfinite().flatten(1).all(1)] = NOT_FINITE
    return _rounded(x, quantizer, padding)


def _rounded(x: Tensor, quantizer: Quantizer, padding: tuple[int, int] = (0, 0)) -> Tensor:
    """``quantize`` without a change of the index."""
    x, dilation = x.float().nan_to_num(), quantizer.dilation
    if any(padding):
        pad_h, pad_w = padding
        x = F.pad(x, (0, 0, pad_w, pad_w, pad_h, pad_h))
    if x.shape[-1] % 2:
        x, dilation = F.pad(x, (0, 1)), F.pad(dilation, (0, 1), value=1.0)
    scale, zero_point = _tables(quantizer, x.ndim)
    q = torch.floor(x * (1 / dilation) * (1 / scale) + 0.5) + zero_point
    return q.clamp(-(2 ** (quantizer.bits - 1)), 2 ** (quantizer.bits - 1) - 1).to(torch.int8)


def dequantize_activation(q: Tensor, quantizer: Quantizer) -> Tensor:
    """Inverts ``quantize`` up to rounding: int8 [B, ..., K] -> fp32 [B, ..., K]."""
    q = q[..., : quantizer.dilation.numel()]
    scale, zero_point = _tables(quantizer, q.ndim)
    return (q.float() - zero_point) * scale * quantizer.dilation


def dequantize_weight(values: Tensor, scale: Tensor, dilation: Tensor | None = None) -> Tensor:
    """Packed [N, ..., K/2] -> fp32 [N, ..., K]: the dilated weight or, given the dilation, the original one."""
    w = unpack_int4(values).float() * scale.reshape(-1, *[1] * (values.ndim - 1))
    if dilation is not None:
        w = w[..., : dilation.numel()] / dilation
    return w


def linear_accumulator(x: Tensor, values: Tensor) -> Tensor:
    """sum_k q_x q_w: x int8 [B, ..., K], packed values [N, K/2] -> int64 [B, ..., N]."""
    return x.long() @ unpack_int4(values).long().t()


def conv2d_accumulator(
    x: Tensor, values: Tensor, stride: tuple[int, int], dilation: tuple[int, int], upsample: bool
) -> Tensor:
    """sum_{tap,k} q_x q_w: padded x int8 [B, H, W, K], packed values [N, KH, KW, K/2] -> int64 [B, OH, OW, N].

    With ``upsample`` the image inside the border of 1 is doubled, each pixel to 2 x 2, and the border is 1 again.
    Summed in float64, which is exact below 2^53.
    """
    image = x.double().permute(0, 3, 1, 2)
    if upsample:
        doubled = F.interpolate(image[..., 1:-1, 1:-1], scale_factor=2, mode="nearest")
        border = image[..., :1, :1]  # the zero point of each sample, equal in all channels
        image = F.pad(doubled - border, (1, 1, 1, 1)) + border
    w = unpack_int4(values).double().permute(0, 3, 1, 2)
    return F.conv2d(image, w, None, stride, 0, dilation).permute(0, 2, 3, 1).long()


def _dequantize_product(accumulator: Tensor, weight: PackedWeight, quantizer: Quantizer) -> Tensor:
    """act_scale_t weight_scale_n (sum q_x q_w - zp_t sum q_w), float64; NaN for a sample with a negative index."""
    scale, zero_point = _tables(quantizer, accumulator.ndim)
    scale = scale.where(quantizer.timestep_index.reshape(zero_point.shape) >= 0, torch.nan)
    sums = unpack_int4(weight.values).long().flatten(1).sum(1)
    return (accumulator - zero_point * sums) * scale.double() * weight.scale.double()


def int4_linear(
    x: Tensor, weight: PackedWeight, quantizer: Quantizer, bias: Tensor | None, residual: Tensor | None,
    out_dtype: torch.dtype, next_quantizer: Quantizer | None = None,
) -> Tensor:  # fmt: skip
    """y = act_scale_t weight_scale_n (sum_k q_x q_w - zp_t sum_k q_w) + bias_n + residual, in float64 until the end.

    With ``next_quantizer`` the result is the next layer's int8.
    """
    y = _dequantize_product(linear_accumulator(x, weight.values), weight, quantizer)
    for addend in (bias, residual):
        if addend is not None:
            y = y + addend.double()
    return y.to(out_dtype) if next_quantizer is None else _rounded(y, next_quantizer)


def int4_geglu_quantize(
    x: Tensor, weight: PackedWeight, quantizer: Quantizer, next_quantizer: Quantizer, bias: Tensor | None
) -> Tensor:
    """A linear layer of 2N channels, GEGLU, and the next layer's quantization: int8 [B, ..., N].

    GEGLU is the first half of the channels times gelu of the second; gelu(x) is x Phi(x).
    """
    hidden, gate = int4_linear(x, weight, quantizer, bias, None, torch.float64).chunk(2, dim=-1)
    return _rounded(hidden * F.gelu(gate), next_quantizer)


def int4_conv2d(
    x: Tensor, weight: PackedWeight, quantizer: Quantizer, bias: Tensor | None, channel_add: Tensor | None,
    residual: Tensor | None, stride: tuple[int, int], dilation: tuple[int, int], upsample: bool,
    out_dtype: torch.dtype, with_statistics: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The convolution of int8 x [B, H, W, K], padded already, with packed values [N, KH, KW, K/2].

    Adds bias [N], channel_add [B, N] (the time embedding) and residual [B, OH, OW, N]; returns [B, OH, OW, N] and, if
    wanted, its ``channel_statistics`` (otherwise an empty tensor).
    """
    y = _dequantize_product(conv2d_accumulator(x, weight.values, stride, dilation, upsample), weight, quantizer)
    if channel_add is not None:
        y = y + channel_add.double()[:, None, None, :]
    for addend in (bias, residual):
        if addend is not None:
            y = y + addend.double()
    y = y.to(out_dtype)
    return y, channel_statistics(y) if with_statistics else torch.empty(0, 0, 2, y.shape[-1], dtype=torch.float32)


def channel_statistics(x: Tensor, run: int = 64) -> Tensor:
    """x [B, H, W, K] -> fp32 [B, ceil(H W / run), 2, K]: sum and centred sum of squares of each run of pixels."""
    runs = x.double().flatten(1, 2).split(run, dim=1)
    total = [part.sum(1) for part in runs]
    centred = [(part - part.mean(1, keepdim=True)).square().sum(1) for part in runs]
    return torch.stack([torch.stack(total, 1), torch.stack(centred, 1)], dim=2).float()


def group_norm_quantize(
    x: Tensor, num_groups: int, norm: Norm, quantizer: Quantizer, silu: bool, skip: Tensor | None,
    statistics: Tensor | None, skip_statistics: Tensor | None, padding: tuple[int, int],
    plain_quantizer: Quantizer | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Group norm of x [B, H, W, K] beside skip [B, H, W, K2], SiLU if wanted, quantized: int8, padded.

    With ``plain_quantizer`` x beside skip is also quantized as it is, unpadded (otherwise an empty tensor). The
    statistics are those of x and skip by definition, so they are not read here.
    """
    image = x if skip is None else torch.cat([x, skip], dim=-1)
    y = F.group_norm(image.double().permute(0, 3, 1, 2), num_groups, *_double(norm)).permute(0, 2, 3, 1)
    q = quantize(F.silu(y) if silu else y, quantizer, padding)
    plain = torch.empty(0, *image.shape[1:], dtype=torch.int8)
    return q, plain if plain_quantizer is None else _rounded(image, plain_quantizer)


def layer_norm_quantize(x: Tensor, norm: Norm, quantizer: Quantizer) -> Tensor:
    """Layer norm of x [B, ..., K] over its channels, quantized."""
    y = F.layer_norm(x.double(), x.shape[-1:], *_double(norm))
    return quantize(y, quantizer)


def _double(norm: Norm) -> Norm:
    weight, bias = (None if parameter is None else parameter.double() for parameter in (norm.weight, norm.bias))
    return Norm(weight, bias, norm.eps)


def attention_quantize(query: Tensor, key: Tensor, value: Tensor, heads: int, quantizer: Quantizer) -> Tensor:
    """softmax(q k^T / sqrt(D)) v in float64, quantized.

    query [B, L, H D], key and value [B, S, H D] -> int8 [B, L, H D].
    """
    q, k, v = (x.double().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    y = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1) @ v
    return quantize(y.transpose(1, 2).flatten(2), quantizer)


def quantize_to_127(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """x fp32 in steps of its largest magnitude along ``dims`` / 127: int8, and the steps (1 where all of x is 0)."""
    largest = x.abs().amax(dims, keepdim=True)
    scale = torch.where(largest > 1e-30, largest / 127, 1.0) + largest * 0  # NaN where x is not finite
    return torch.floor(x * (1 / scale) + 0.5).to(torch.int8), scale


def int8_attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(D)) v with q, k, v and the probabilities in 8 bits, 64 keys at a time.

    query [B, L, H D], key and value [B, S, H D] -> [B, L, H D] in query's dtype. A query has a scale of its own, a
    block of keys or values another; both are quantized less their means over S, and the values' is added at the end.
    The probabilities of a block are relative to the largest up to this block, and rounded to steps of 1/255; their sum,
    the divisor, is not rounded.
    """
    dtype = query.dtype
    key_mean, value_mean = (x.float().mean(1, keepdim=True) for x in (key, value))
    key, value = key.float() - key_mean, value.float() - value_mean
    q, k, v = (x.float().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    q8, q_scale = quantize_to_127(q, (-1,))
    largest = torch.full((*q.shape[:-1], 1), -torch.inf, dtype=torch.float64)
    total = torch.zeros_like(largest)
    result = torch.zeros(q.shape, dtype=torch.float64)
    for k_block, v_block in zip(k.split(64, dim=2), v.split(64, dim=2), strict=True):
        (k8, k_scale), (v8, v_scale) = quantize_to_127(k_block, (-2, -1)), quantize_to_127(v_block, (-2, -1))
        score = (q8.long() @ k8.long().mT) * (q_scale.double() * k_scale.double() * q.shape[-1] ** -0.5)
        so_far = torch.maximum(largest, score.amax(-1, keepdim=True))
        fade, p = torch.exp(largest - so_far), torch.exp(score - so_far)
        p8 = torch.floor(255 * p + 0.5).long()
        total = total * fade + p.sum(-1, keepdim=True)
        result = result * fade + (p8 @ v8.long()) * (v_scale.double() / 255)
        largest = so_far
    return ((result / total).transpose(1, 2).flatten(2) + value_mean).to(dtype)


def int8_attention_quantize(
    query: Tensor, key: Tensor, value: Tensor, heads: int, quantizer: Quantizer, statistics: Tensor | None = None
) -> Tensor:
    """``int8_attention`` and the next layer's quantization: int8 [B, L, H D].

    The statistics are those of key and value by definition, so they are not read here.
    """
    return quantize(int8_attention(query.float(), key, value, heads), quantizer)
