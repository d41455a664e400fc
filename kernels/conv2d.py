"""INT4 convolution on the GPU: an implicit GEMM over NHWC int8 activations and packed INT4 weights.

    y_mn = act_scale_t weight_scale_n (sum_{tap,k} q_x q_w - zp_t sum_{tap,k} q_w)
           + bias_n + channel_add_bn + residual_mn

Row m of the GEMM is one output pixel. One flat loop runs over taps x channel blocks; a tap that falls outside the image
reads the sample's zero point, the quantized zero, so the correction by sum q_w holds at the borders as well. As in
``linear``, the weight is operand A, one packed block meets two activation blocks, and the accumulator holds 16 times
the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl

from dq_kernels.packing import unpack_int4_x16
from dq_kernels.tuning import launch_config, use_ptx


@triton.jit
def int4_conv2d_kernel(
    x_ptr,
    zero_rows_ptr,
    weight_ptr,
    weight_scale_ptr,
    weight_sum_ptr,
    act_scale_ptr,
    act_zero_point_ptr,
    timestep_index_ptr,
    bias_ptr,
    channel_add_ptr,
    residual_ptr,
    out_ptr,
    num_rows,
    rows_per_sample,
    height,
    width,
    out_width,
    num_timesteps,
    out_channels,
    half_channels,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    TILE_IN_SAMPLE: tl.constexpr,
    PTX: tl.constexpr,
):
    """One [BLOCK_N, BLOCK_M] tile of Y^T.

    x [B, H, W, K] int8, weight [N, KH, KW, K/2] uint8, channel_add [B, N], residual and out [B, OH, OW, N];
    TILE_IN_SAMPLE: no tile has rows of two samples.
    """
    num_tiles_n = tl.cdiv(out_channels, BLOCK_N)
    first_row = tl.program_id(0) // num_tiles_n * BLOCK_M
    n = (tl.program_id(0) % num_tiles_n * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    m = (first_row + tl.arange(0, BLOCK_M))[None, :]
    n_inside = n < out_channels

    # Rows beyond the edge repeat the last pixel; they are never stored.
    pixel = tl.minimum(m, num_rows - 1)
    sample = first_row // rows_per_sample if TILE_IN_SAMPLE else pixel // rows_per_sample
    top = pixel % rows_per_sample // out_width * STRIDE_H - PAD_H
    left = pixel % out_width * STRIDE_W - PAD_W

    k = tl.arange(0, BLOCK_K)
    weight_rows = weight_ptr + tl.where(n_inside, n, 0) * (KERNEL_H * KERNEL_W * half_channels) + k[None, :]
    x_rows = x_ptr + ((sample * height + top) * width + left) * (2 * half_channels) + k[:, None]
    # A tap outside the image reads a row full of the zero point. To choose between addresses, rather than between
    # values, keeps the copies to shared memory asynchronous.
    if PAD_H + PAD_W > 0:
        t = tl.load(timestep_index_ptr + sample)
        t = tl.minimum(tl.maximum(t, 0), num_timesteps - 1)
        quantized_zero = tl.minimum(tl.maximum(tl.load(act_zero_point_ptr + t), -128), 127)
        zero_rows = zero_rows_ptr + (quantized_zero + 128) * BLOCK_K + k[:, None]

    accumulator = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
    # tap and start are counted: dividing a step by the number of blocks is slow.
    tap = 0
    start = 0
    for _ in range(0, KERNEL_H * KERNEL_W * tl.cdiv(half_channels, BLOCK_K)):
        row = tap // KERNEL_W * DILATION_H
        column = tap % KERNEL_W * DILATION_W
        weight_ptrs = weight_rows + (tap * half_channels + start)
        low_ptrs = x_rows + ((row * width + column) * (2 * half_channels) + start)
        high_ptrs = low_ptrs + half_channels
        if PAD_H + PAD_W > 0:
            in_image = (top + row >= 0) & (top + row < height) & (left + column >= 0) & (left + column < width)
            low_ptrs = tl.where(in_image, low_ptrs, zero_rows)
            high_ptrs = tl.where(in_image, high_ptrs, zero_rows)
        if EVEN_K:
            packed = tl.load(weight_ptrs)
            x_low = tl.load(low_ptrs)
            x_high = tl.load(high_ptrs)
        else:
            # Where the weight reads as 0, the activation does not count, but it must not be read from elsewhere.
            in_channels = start + k < half_channels
            packed = tl.load(weight_ptrs, mask=in_channels[None, :], other=0)
            x_low = tl.load(low_ptrs, mask=in_channels[:, None], other=0)
            x_high = tl.load(high_ptrs, mask=in_channels[:, None], other=0)
        w_low, w_high = unpack_int4_x16(packed, PTX)
        accumulator = tl.dot(w_low, x_low, accumulator, out_dtype=tl.int32)
        accumulator = tl.dot(w_high, x_high, accumulator, out_dtype=tl.int32)
        start += BLOCK_K
        tap = tl.where(start < half_channels, tap, tap + 1)
        start = tl.where(start < half_channels, start, 0)

    # Found anew: holding it through the loop would cost registers.
    last_sample = num_rows // rows_per_sample - 1
    sample = first_row // rows_per_sample if TILE_IN_SAMPLE else tl.minimum(m // rows_per_sample, last_sample)
    t = tl.load(timestep_index_ptr + sample)
    t = tl.minimum(tl.maximum(t, 0), num_timesteps - 1)
    # 16 times the sum of q_w (q_x - zp_t), exact in int32; the scale divides it by 16.
    weight_sum = tl.load(weight_sum_ptr + n, mask=n_inside, other=0)
    scale = tl.load(act_scale_ptr + t) / 16 * tl.load(weight_scale_ptr + n, mask=n_inside, other=0.0)
    y = (accumulator - 16 * weight_sum * tl.load(act_zero_point_ptr + t)).to(tl.float32) * scale
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n_inside, other=0.0).to(tl.float32)
    if channel_add_ptr is not None:
        y += tl.load(channel_add_ptr + sample * out_channels + n, mask=n_inside, other=0.0).to(tl.float32)

    offsets = m * out_channels + n
    inside = n_inside & (m < num_rows)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, y.to(out_ptr.dtype.element_ty), mask=inside)


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
    """Launches ``int4_conv2d_kernel``; arguments and result as in ``reference.int4_conv2d``."""
    batch, height, width, _ = x.shape
    out_channels, kernel_h, kernel_w, half_channels = weight.shape
    out_height, out_width = conv2d_output_size((height, width), (kernel_h, kernel_w), stride, padding, dilation)
    out = torch.empty(batch, out_height, out_width, out_channels, dtype=out_dtype, device=x.device)
    rows_per_sample = out_height * out_width
    num_rows = batch * rows_per_sample
    config = launch_config(num_rows, out_channels)
    grid = (triton.cdiv(out_channels, config.block_n) * triton.cdiv(num_rows, config.block_m),)
    int4_conv2d_kernel[grid](
        x,
        zero_point_rows(config.block_k, x.device),
        weight,
        weight_scale,
        weight_sum,
        act_scale,
        act_zero_point,
        timestep_index,
        bias,
        channel_add,
        residual,
        out,
        num_rows,
        rows_per_sample,
        height,
        width,
        out_width,
        act_scale.numel(),
        out_channels,
        half_channels,
        KERNEL_H=kernel_h,
        KERNEL_W=kernel_w,
        STRIDE_H=stride[0],
        STRIDE_W=stride[1],
        PAD_H=padding[0],
        PAD_W=padding[1],
        DILATION_H=dilation[0],
        DILATION_W=dilation[1],
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        EVEN_K=half_channels % config.block_k == 0,
        TILE_IN_SAMPLE=rows_per_sample % config.block_m == 0,
        PTX=use_ptx(),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


@cache
def zero_point_rows(length: int, device: torch.device) -> torch.Tensor:
    """[256, length] int8, row i full of i - 128: a row for every zero point, kept for as long as the process lives."""
    return torch.arange(-128, 128, dtype=torch.int8, device=device)[:, None].repeat(1, length)


def conv2d_output_size(
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[int, int]:
    """Height and width of a convolution's output (torch.nn.Conv2d's formula)."""
    height, width = (
        (size[i] + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1) // stride[i] + 1 for i in range(2)
    )
    return height, width
