"""Activation quantization on GPUs: float -> int8, one scale and zero point per sample, selected on the device.

    q_x = clamp(floor(x (1 / s_k) (1 / act_scale_t) + 0.5) + zp_t, -2^(b-1), 2^(b-1) - 1)

with s the weight dilation of input channel k and t the sample's timestep group. The kernel is memory bound: it reads x
once and writes one byte per element. x may have any strides, so an NCHW tensor becomes NHWC int8 in the same pass. An
image gets a border of the zero point, so that convolutions need no bounds checks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dq_kernels import records
from dq_kernels.records import Quantizer
from dq_kernels.shapes import quantized_shape
from dq_kernels.triton.intrinsics import floor_to_int, follow_previous_kernel
from dq_kernels.triton.launch import cdiv, launch_options

BLOCK_LENGTH, BLOCK_CHANNELS = 32, 128
NOT_FINITE = tl.constexpr(records.NOT_FINITE)


@triton.jit
def select_timestep(timestep_index, num_timesteps):
    """A sample's row of the tables; an index out of range is clamped, so it can never read out of bounds."""
    return tl.minimum(tl.maximum(timestep_index, 0), num_timesteps - 1)


@triton.jit
def any_not_finite(x):
    """True if fp32 x has a NaN or an infinity.

    Their bits without sign are infinity's or more. So an integer maximum finds them, in less than two instructions a
    value; a maximum of floats drops NaN.
    """
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF) >= 0x7F800000


@triton.jit
def quantize_tile(x, inverse_dilation, inverse_scale, zero_point, BITS: tl.constexpr, PTX: tl.constexpr):
    """The formula above, on fp32; int32 in the range of BITS bits.

    Values are clamped to integers before they are rounded: the result is the same, and no conversion can overflow.
    """
    lowest = (-(2 ** (BITS - 1)) - zero_point).to(tl.float32)
    highest = (2 ** (BITS - 1) - 1 - zero_point).to(tl.float32)
    q = tl.minimum(tl.maximum(x * inverse_dilation * inverse_scale, lowest), highest)
    return floor_to_int(q + 0.5, PTX) + zero_point


@triton.jit
def dequantize_sums(accumulator, weight_sum_ptrs, weight_scale, act_scale, act_zero_point_ptrs):
    """16 sum q_x q_w as floats: act_scale weight_scale sum q_w (q_x - zero_point)."""
    # 16 times the sum of q_w (q_x - zp_t), exact in int32; the scale divides it by 16.
    corrected = accumulator - 16 * tl.load(weight_sum_ptrs) * tl.load(act_zero_point_ptrs)
    return corrected.to(tl.float32) * (act_scale / 16 * weight_scale)


@triton.jit
def padded_position(position, height, width, pad_h, pad_w):
    """The position in the image of a position in the padded image, and whether it lies inside."""
    padded_width = width + 2 * pad_w
    row = position // padded_width - pad_h
    column = position % padded_width - pad_w
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return row * width + column, inside


@triton.jit
def quantize_kernel(
    x_ptr,
    weight_dilation_ptr,
    act_scale_ptr,
    act_zero_point_ptr,
    timestep_index_ptr,
    out_ptr,
    num_timesteps,
    height,
    width,
    channels,
    out_channels,
    stride_b,
    stride_l,
    stride_k,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PTX: tl.constexpr,
    PDL: tl.constexpr,
):
    """One tile of one sample: x [H * W, K] (strided) -> out [padded H * W, K padded to even]."""
    follow_previous_kernel(PDL)
    sample = tl.program_id(2)
    position = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    length = (height + 2 * PAD_H) * (width + 2 * PAD_W)

    t = select_timestep(tl.load(timestep_index_ptr + sample), num_timesteps)
    inverse_scale = tl.math.div_rn(1.0, tl.load(act_scale_ptr + t))
    inverse_dilation = tl.math.div_rn(1.0, tl.load(weight_dilation_ptr + k, mask=k < channels, other=1.0))

    # The border, and a channel beyond K (at most one), read as 0 and so become the zero point.
    source, inside = position, position < length
    if PAD_H + PAD_W > 0:
        source, inside = padded_position(position, height, width, PAD_H, PAD_W)
    x = tl.load(
        x_ptr + sample.to(tl.int64) * stride_b + source[:, None] * stride_l + k[None, :] * stride_k,
        mask=inside[:, None] & (k < channels)[None, :],
        other=0.0,
    ).to(tl.float32)
    q = quantize_tile(x, inverse_dilation[None, :], inverse_scale, tl.load(act_zero_point_ptr + t), BITS, PTX)
    tl.store(
        out_ptr + sample.to(tl.int64) * length * out_channels + position[:, None] * out_channels + k[None, :],
        q.to(tl.int8),
        mask=(position < length)[:, None] & (k < out_channels)[None, :],
    )
    tl.store(timestep_index_ptr + sample, NOT_FINITE, mask=any_not_finite(x))


def quantize(x: Tensor, quantizer: Quantizer, padding: tuple[int, int]) -> Tensor:
    """As ``reference.quantize``."""
    out = torch.empty(quantized_shape(x.shape, padding), dtype=torch.int8, device=x.device)
    batch, channels, out_channels = x.shape[0], x.shape[-1], out.shape[-1]
    length = out.numel() // (batch * out_channels)
    height, width = (x.shape[1], x.shape[2]) if any(padding) else (length, 1)
    flat = x.reshape(batch, height * width, channels)
    quantize_kernel[(cdiv(length, BLOCK_LENGTH), cdiv(out_channels, BLOCK_CHANNELS), batch)](
        flat,
        quantizer.dilation,
        quantizer.scale,
        quantizer.zero_point,
        quantizer.timestep_index,
        out,
        quantizer.scale.numel(),
        height,
        width,
        channels,
        out_channels,
        *flat.stride(),
        PAD_H=padding[0],
        PAD_W=padding[1],
        BITS=quantizer.bits,
        BLOCK_L=BLOCK_LENGTH,
        BLOCK_K=BLOCK_CHANNELS,
        **launch_options(),
        num_warps=4,
        enable_fp_fusion=False,  # a fused multiply-add would round some ties differently from the reference
    )
    return out
