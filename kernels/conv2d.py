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

import torch
import triton
import triton.language as tl

from dq_kernels.packing import unpack_int4_x16
from dq_kernels.tuning import launch_config, use_ptx


@triton.jit
def int4_conv2d_kernel(
    x_ptr,
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
    batch,
    height,
    width,
    out_height,
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
    PTX: tl.constexpr,
):
    """One [BLOCK_N, BLOCK_M] tile of Y^T.

    x [B, H, W, K] int8, weight [N, KH, KW, K/2] uint8, channel_add [B, N], residual and out [B, OH, OW, N].
    """
    num_tiles_n = tl.cdiv(out_channels, BLOCK_N)
    n = (tl.program_id(0) % num_tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = (tl.program_id(0) // num_tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    n_inside = n < out_channels
    m_inside = m < batch * out_height * out_width

    # Rows beyond the edge repeat pixel 0; they are never stored.
    pixel = tl.where(m_inside, m, 0)
    sample = pixel // (out_height * out_width)
    top = (pixel // out_width) % out_height * STRIDE_H - PAD_H
    left = pixel % out_width * STRIDE_W - PAD_W
    t = tl.load(timestep_index_ptr + sample)
    t = tl.minimum(tl.maximum(t, 0), num_timesteps - 1)
    zero_point = tl.load(act_zero_point_ptr + t)
    quantized_zero = zero_point.to(tl.int8)[None, :]

    k = tl.arange(0, BLOCK_K)
    num_blocks_k = tl.cdiv(half_channels, BLOCK_K)
    weight_rows = weight_ptr + tl.where(n_inside, n, 0)[:, None] * (KERNEL_H * KERNEL_W * half_channels) + k[None, :]
    accumulator = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
    for step in range(0, KERNEL_H * KERNEL_W * num_blocks_k):
        tap = step // num_blocks_k
        start = (step % num_blocks_k) * BLOCK_K
        row = top + tap // KERNEL_W * DILATION_H
        column = left + tap % KERNEL_W * DILATION_W
        in_image = ((row >= 0) & (row < height) & (column >= 0) & (column < width))[None, :]
        x_ptrs = (
            x_ptr + (((sample * height + row) * width + column) * (2 * half_channels))[None, :] + start + k[:, None]
        )
        weight_ptrs = weight_rows + tap * half_channels + start
        if EVEN_K:
            packed = tl.load(weight_ptrs)
        else:
            # Where the weight reads as 0, the activation does not count, but it must not be read from elsewhere.
            in_channels = start + k < half_channels
            packed = tl.load(weight_ptrs, mask=in_channels[None, :], other=0)
            in_image = in_image & in_channels[:, None]
        x_low = tl.load(x_ptrs, mask=in_image, other=quantized_zero)
        x_high = tl.load(x_ptrs + half_channels, mask=in_image, other=quantized_zero)
        w_low, w_high = unpack_int4_x16(packed, PTX)
        accumulator = tl.dot(w_low, x_low, accumulator, out_dtype=tl.int32)
        accumulator = tl.dot(w_high, x_high, accumulator, out_dtype=tl.int32)

    weight_sum = tl.load(weight_sum_ptr + n, mask=n_inside, other=0)
    y = ((accumulator >> 4) - weight_sum[:, None] * zero_point[None, :]).to(tl.float32)
    y *= tl.load(act_scale_ptr + t)[None, :]
    y *= tl.load(weight_scale_ptr + n, mask=n_inside, other=0.0)[:, None]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n_inside, other=0.0).to(tl.float32)[:, None]

    inside = n_inside[:, None] & m_inside[None, :]
    if channel_add_ptr is not None:
        channel_add = tl.load(channel_add_ptr + sample[None, :] * out_channels + n[:, None], mask=inside, other=0.0)
        y += channel_add.to(tl.float32)
    offsets = m[None, :] * out_channels + n[:, None]
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
    num_rows = batch * out_height * out_width
    config = launch_config(num_rows, out_channels)
    grid = (triton.cdiv(out_channels, config.block_n) * triton.cdiv(num_rows, config.block_m),)
    int4_conv2d_kernel[grid](
        x,
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
        batch,
        height,
        width,
        out_height,
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
        PTX=use_ptx(),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


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
