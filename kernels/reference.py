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
) -> torch.Tensor:
    """x [B, ..., K] float -> int8 [B, ..., K padded to even], in [-2^(bits-1), 2^(bits-1) - 1]."""
    x = x.float()
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
    x: torch.Tensor,
    weight: torch.Tensor,
    zero_point: torch.Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> torch.Tensor:
    """sum_{tap,k} q_x q_w: x int8 [B, H, W, K] padded with zero_point [B], weight packed [N, KH, KW, K/2]
    -> int64 [B, OH, OW, N]. Summed in float64, which is exact below 2^53."""
    batch, height, width, channels = x.shape
    pad_h, pad_w = padding
    padded = zero_point.double().view(batch, 1, 1, 1).repeat(1, height + 2 * pad_h, width + 2 * pad_w, channels)
    padded[:, pad_h : pad_h + height, pad_w : pad_w + width] = x.double()
    w = unpack_int4(weight).double().permute(0, 3, 1, 2)
    return F.conv2d(padded.permute(0, 3, 1, 2), w, None, stride, 0, dilation).permute(0, 2, 3, 1).long()


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
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """The convolution of int8 x [B, H, W, K] with packed weight [N, KH, KW, K/2], padded with the quantized zero.

    Adds bias [N], channel_add [B, N] (the time embedding) and residual [B, OH, OW, N]; returns [B, OH, OW, N].
    """
    scale = _select(act_scale, timestep_index, 4).double()
    zero_point = _select(act_zero_point, timestep_index, 4)
    accumulator = conv2d_accumulator(x, weight, zero_point, stride, padding, dilation)
    y = (accumulator - zero_point * unpack_int4(weight).long().sum((1, 2, 3))) * scale * weight_scale.double()
    if channel_add is not None:
        y = y + channel_add.double()[:, None, None, :]
    for addend in (bias, residual):
        if addend is not None:
            y = y + addend.double()
    return y.to(out_dtype)
