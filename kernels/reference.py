"""The oracle: what every operator computes, in plain torch, slow and obvious.

Symbols: B samples, K input channels (even; an odd count is padded by one), N output channels, T timestep groups.
``timestep_index`` picks, for each sample, its row of the ``act_scale`` and ``act_zero_point`` tables; an index outside
[0, T-1] is clamped to it. Sums of products are integers: the int64 arithmetic here has the value that int32 has in the
kernels. The method is DilateQuant's (arXiv 2409.14307).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dq_kernels.packing import unpack_int4


def _select(table: torch.Tensor, timestep_index: torch.Tensor, ndim: int) -> torch.Tensor:
    """The row of each sample: [T] -> [B, 1, ...] with ``ndim`` dimensions."""
    rows = table[timestep_index.long().clamp(0, table.numel() - 1)]
    return rows.reshape(-1, *[1] * (ndim - 1))


def quantize(
    x: torch.Tensor,
    weight_dilation: torch.Tensor,
    act_scale: torch.Tensor,
    act_zero_point: torch.Tensor,
    timestep_index: torch.Tensor,
    bits: int,
    padding: tuple[int, int] = (0, 0),
    skip: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [B, ..., K] float -> int8 [B, ..., K padded to even], in [-2^(bits-1), 2^(bits-1) - 1].

    An image [B, H, W, K] gets ``padding`` rows and columns of the quantized zero on each side. ``skip`` [B, ..., K2]
    stands for a concat of channels.
    """
    x = (x if skip is None else torch.cat([x, skip], dim=-1)).float()
    if any(padding):
        pad_h, pad_w = padding
        x = F.pad(x, (0, 0, pad_w, pad_w, pad_h, pad_h))
    if x.shape[-1] % 2:
        x, weight_dilation = F.pad(x, (0, 1)), F.pad(weight_dilation, (0, 1), value=1.0)
    scale = _select(act_scale, timestep_index, x.ndim)
    zero_point = _select(act_zero_point, timestep_index, x.ndim)
    q = torch.floor(x * (1 / weight_dilation) * (1 / scale) + 0.5) + zero_point
    return q.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).to(torch.int8)


def dequantize_activation(
    q: torch.Tensor,
    weight_dilation: torch.Tensor,
    act_scale: torch.Tensor,
    act_zero_point: torch.Tensor,
    timestep_index: torch.Tensor,
) -> torch.Tensor:
    """Inverts ``quantize`` up to rounding: int8 [B, ..., K] -> fp32 [B, ..., K]."""
    q = q[..., : weight_dilation.numel()]
    scale = _select(act_scale, timestep_index, q.ndim)
    zero_point = _select(act_zero_point, timestep_index, q.ndim)
    return (q.float() - zero_point) * scale * weight_dilation


def dequantize_weight(
    weight: torch.Tensor, weight_scale: torch.Tensor, weight_dilation: torch.Tensor | None = None
) -> torch.Tensor:
    """Packed [N, ..., K/2] -> fp32 [N, ..., K]: the dilated weight or, given the dilation, the original one."""
    w = unpack_int4(weight).float() * weight_scale.reshape(-1, *[1] * (weight.ndim - 1))
    if weight_dilation is not None:
        w = w[..., : weight_dilation.numel()] / weight_dilation
    return w


def linear_accumulator(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """sum_k q_x q_w: x int8 [B, ..., K], weight packed [N, K/2] -> int64 [B, ..., N]."""
    return x.long() @ unpack_int4(weight).long().t()


def conv2d_accumulator(
    x: torch.Tensor, weight: torch.Tensor, stride: tuple[int, int], dilation: tuple[int, int], upsample: bool
) -> torch.Tensor:
    """sum_{tap,k} q_x q_w: x int8 [B, H, W, K], padded already, weight packed [N, KH, KW, K/2] -> int64 [B, OH, OW, N].

    With ``upsample`` the image inside the border of 1 is doubled, each pixel to 2 x 2, and the border is 1 again.
    Summed in float64, which is exact below 2^53.
    """
    image = x.double().permute(0, 3, 1, 2)
    if upsample:
        doubled = F.interpolate(image[..., 1:-1, 1:-1], scale_factor=2, mode="nearest")
        border = image[..., :1, :1]  # the zero point of each sample, equal in all channels
        image = F.pad(doubled - border, (1, 1, 1, 1)) + border
    w = unpack_int4(weight).double().permute(0, 3, 1, 2)
    return F.conv2d(image, w, None, stride, 0, dilation).permute(0, 2, 3, 1).long()


def int4_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_sum: torch.Tensor,
    act_scale: torch.Tensor,
    act_zero_point: torch.Tensor,
    timestep_index: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """y = act_scale_t weight_scale_n (sum_k q_x q_w - zp_t sum_k q_w) + bias_n + residual, in float64 until the end."""
    scale = _select(act_scale, timestep_index, x.ndim).double()
    zero_point = _select(act_zero_point, timestep_index, x.ndim)
    accumulator = linear_accumulator(x, weight) - zero_point * unpack_int4(weight).long().sum(-1)
    y = accumulator * scale * weight_scale.double()
    for addend in (bias, residual):
        if addend is not None:
            y = y + addend.double()
    return y.to(out_dtype)


def int4_linear_quantize(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_sum: torch.Tensor,
    act_scale: torch.Tensor,
    act_zero_point: torch.Tensor,
    timestep_index: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    next_dilation: torch.Tensor,
    next_scale: torch.Tensor,
    next_zero_point: torch.Tensor,
    next_bits: int,
) -> torch.Tensor:
    """The linear layer, its activation, and the next layer's quantization: int8 [B, ..., N], for "geglu" N of 2N.

    "gelu" is x Phi(x); "geglu" splits the channels in two and multiplies the first half by gelu of the second.
    """
    y = int4_linear(
        x, weight, weight_scale, weight_sum, act_scale, act_zero_point, timestep_index, bias, None, torch.float64
    )
    if activation == "geglu":
        hidden, gate = y.chunk(2, dim=-1)
        y = hidden * F.gelu(gate)
    elif activation == "gelu":
        y = F.gelu(y)
    return quantize(y, next_dilation, next_scale, next_zero_point, timestep_index, next_bits)


def int4_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_sum: torch.Tensor,
    act_scale: torch.Tensor,
    act_zero_point: torch.Tensor,
    timestep_index: torch.Tensor,
    bias: torch.Tensor | None,
    channel_add: torch.Tensor | None,
    residual: torch.Tensor | None,
    skip: torch.Tensor | None,
    skip_weight: torch.Tensor | None,
    skip_weight_sum: torch.Tensor | None,
    skip_act_scale: torch.Tensor | None,
    skip_act_zero_point: torch.Tensor | None,
    stride: tuple[int, int],
    dilation: tuple[int, int],
    upsample: bool,
    out_dtype: torch.dtype,
    with_statistics: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The convolution of int8 x [B, H, W, K], padded already, with packed weight [N, KH, KW, K/2].

    ``skip`` is a second image beside x, as in a concat of channels, with weights and tables of its own and the same
    weight_scale. Adds bias [N], channel_add [B, N] (the time embedding) and residual [B, OH, OW, N]; returns
    [B, OH, OW, N] and, if wanted, its ``channel_statistics`` (otherwise an empty tensor).
    """
    sources = [(x, weight, act_scale, act_zero_point)]
    if skip is not None and skip_weight is not None and skip_act_scale is not None and skip_act_zero_point is not None:
        sources.append((skip, skip_weight, skip_act_scale, skip_act_zero_point))
    y = torch.zeros((), dtype=torch.float64)
    for image, w, scales, zero_points in sources:
        zero_point = _select(zero_points, timestep_index, 4)
        accumulator = conv2d_accumulator(image, w, stride, dilation, upsample)
        corrected = accumulator - zero_point * unpack_int4(w).long().sum((1, 2, 3))
        y = y + corrected * _select(scales, timestep_index, 4).double() * weight_scale.double()
    if channel_add is not None:
        y = y + channel_add.double()[:, None, None, :]
    for addend in (bias, residual):
        if addend is not None:
            y = y + addend.double()
    y = y.to(out_dtype)
    return y, channel_statistics(y) if with_statistics else torch.empty(0, 0, 2, y.shape[-1])


def channel_statistics(x: torch.Tensor, run: int = 64) -> torch.Tensor:
    """x [B, H, W, K] -> fp32 [B, ceil(H W / run), 2, K]: sum and centred sum of squares of each run of pixels."""
    runs = x.double().flatten(1, 2).split(run, dim=1)
    total = [part.sum(1) for part in runs]
    centred = [(part - part.mean(1, keepdim=True)).square().sum(1) for part in runs]
    return torch.stack([torch.stack(total, 1), torch.stack(centred, 1)], dim=2).float()


def group_norm_quantize(
    x: torch.Tensor,
    skip: torch.Tensor | None,
    statistics: torch.Tensor | None,
    skip_statistics: torch.Tensor | None,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    silu: bool,
    weight_dilation: torch.Tensor,
    act_scale: torch.Tensor,
    act_zero_point: torch.Tensor,
    timestep_index: torch.Tensor,
    bits: int,
    padding: tuple[int, int],
) -> torch.Tensor:
    """Group norm of x [B, H, W, K] beside skip [B, H, W, K2], SiLU if wanted, quantized: int8, padded.

    The statistics are those of x and skip by definition, so they are not read here.
    """
    image = (x if skip is None else torch.cat([x, skip], dim=-1)).double().permute(0, 3, 1, 2)
    y = F.group_norm(image, num_groups, weight.double(), bias.double(), eps).permute(0, 2, 3, 1)
    return quantize(F.silu(y) if silu else y, weight_dilation, act_scale, act_zero_point, timestep_index, bits, padding)


def layer_norm_quantize(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    weight_dilation: torch.Tensor,
    act_scale: torch.Tensor,
    act_zero_point: torch.Tensor,
    timestep_index: torch.Tensor,
    bits: int,
) -> torch.Tensor:
    """Layer norm of x [B, ..., K] over its channels, quantized."""
    weight, bias = (None if parameter is None else parameter.double() for parameter in (weight, bias))
    y = F.layer_norm(x.double(), x.shape[-1:], weight, bias, eps)
    return quantize(y, weight_dilation, act_scale, act_zero_point, timestep_index, bits)


def quantize_to_127(x: torch.Tensor, dims: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """x fp32 in steps of its largest magnitude along ``dims`` / 127: int8, and the steps (1 where all of x is 0)."""
    largest = x.abs().amax(dims, keepdim=True)
    scale = torch.where(largest > 1e-30, largest / 127, 1.0) + largest * 0  # NaN where x is not finite
    return torch.floor(x * (1 / scale) + 0.5).to(torch.int8), scale


def int8_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int, block_keys: int = 64
) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v with q, k, v and the probabilities in 8 bits, block of keys by block of keys.

    query [B, L, H D], key and value [B, S, H D] -> [B, L, H D] in query's dtype. A query has a scale of its own, a
    block of keys or values another; both are quantized less their means over S, and the values' is added at the end.
    The probabilities of a block are relative to the largest up to this block, and rounded to steps of 1/255; what they
    are divided by is not rounded.
    """
    dtype = query.dtype
    key_mean, value_mean = (x.float().mean(1, keepdim=True) for x in (key, value))
    key, value = key.float() - key_mean, value.float() - value_mean
    q, k, v = (x.float().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    q8, q_scale = quantize_to_127(q, (-1,))
    largest = torch.full((*q.shape[:-1], 1), -torch.inf, dtype=torch.float64)
    total = torch.zeros_like(largest)
    result = torch.zeros(q.shape, dtype=torch.float64)
    for k_block, v_block in zip(k.split(block_keys, dim=2), v.split(block_keys, dim=2), strict=True):
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
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    heads: int,
    weight_dilation: torch.Tensor,
    act_scale: torch.Tensor,
    act_zero_point: torch.Tensor,
    timestep_index: torch.Tensor,
    bits: int,
) -> torch.Tensor:
    """``int8_attention`` and the next layer's quantization: int8 [B, L, H D]."""
    y = int8_attention(query.float(), key, value, heads)
    return quantize(y, weight_dilation, act_scale, act_zero_point, timestep_index, bits)
