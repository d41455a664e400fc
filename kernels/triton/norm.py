"""Normalization fused with quantization on GPUs: the int8 input of the next layer, in one pass over x.

    group norm:  q = quantize(silu((x - mean_bg) rstd_bg weight_k + bias_k))     mean, rstd over a group's pixels
    layer norm:  q = quantize((x - mean_m) rstd_m weight_k + bias_k)             over a token's channels

Group norm needs its statistics first: a sum and a centred sum of squares of every channel over every run of
``STATISTICS_ROWS`` pixels. The epilogue of the convolution that made x writes them, or a pass of their own does. They
are merged group by group with Chan's formula, without cancellation and always in the same order. The group norm of a
concatenation reads its two sources in place.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dq_kernels.records import Norm, Quantizer
from dq_kernels.shapes import STATISTICS_ROWS, quantized_shape
from dq_kernels.triton.intrinsics import exp, follow_previous_kernel, reciprocal
from dq_kernels.triton.launch import cdiv, launch_options, next_power_of_2
from dq_kernels.triton.quantization import padded_position, quantize_tile, select_timestep

BLOCK_LENGTH, BLOCK_CHANNELS = 32, 128
STATISTICS_CHANNELS = 64
LAYER_NORM_TILE, LAYER_NORM_WARPS = 8192, 4  # elements of a program, and its warps


@triton.jit
def channel_statistics_kernel(
    x_ptr,
    out_ptr,
    length,
    channels,
    stride_b,
    stride_l,
    stride_k,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """x [B, L, K] (strided) -> out [B, L / ROWS, 2, K]: sum and centred sum of squares of each run of rows."""
    follow_previous_kernel(PDL)
    run, sample = tl.program_id(0), tl.program_id(2)
    row = run * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (row < length)[:, None] & (k < channels)[None, :]
    x_ptrs = x_ptr + sample.to(tl.int64) * stride_b + row[:, None] * stride_l + k[None, :] * stride_k
    x = tl.load(x_ptrs, mask=inside, other=0.0).to(tl.float32)
    total = tl.sum(x, 0)
    count = tl.minimum(length - run * ROWS, ROWS)
    centred = tl.where(inside, x - (total / count)[None, :], 0.0)
    out_ptrs = out_ptr + (sample * tl.num_programs(0) + run) * 2 * channels + k
    tl.store(out_ptrs, total, mask=k < channels)
    tl.store(out_ptrs + channels, tl.sum(centred * centred, 0), mask=k < channels)


@triton.jit
def group_statistics_kernel(
    statistics_ptr,
    skip_statistics_ptr,
    out_ptr,
    num_runs,
    length,
    channels,
    skip_channels,
    eps,
    NUM_GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """Merges a group's channels and runs, of one or two sources: [B, L / ROWS, 2, K] -> out [B, groups, 2]."""
    follow_previous_kernel(PDL)
    group, sample = tl.program_id(0), tl.program_id(1)
    group_size = (channels + skip_channels) // NUM_GROUPS
    within = tl.arange(0, BLOCK_K)
    k = group * group_size + within
    first = within < group_size
    second = first & (k >= channels)
    first = first & (k < channels)
    count = group_size * length
    total = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
    for start in range(0, num_runs, BLOCK_R):
        run = start + tl.arange(0, BLOCK_R)
        row_inside = (run < num_runs)[:, None]
        rows = sample * num_runs + run
        total += tl.load(
            statistics_ptr + rows[:, None] * 2 * channels + k[None, :], mask=row_inside & first[None, :], other=0.0
        )
        if skip_statistics_ptr is not None:
            total += tl.load(
                skip_statistics_ptr + rows[:, None] * 2 * skip_channels + (k - channels)[None, :],
                mask=row_inside & second[None, :],
                other=0.0,
            )
    mean = tl.sum(tl.sum(total, 0), 0) / count
    squares = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
    for start in range(0, num_runs, BLOCK_R):
        run = start + tl.arange(0, BLOCK_R)
        row_inside = (run < num_runs)[:, None]
        rows = sample * num_runs + run
        mask = row_inside & first[None, :]
        ptrs = statistics_ptr + rows[:, None] * 2 * channels + k[None, :]
        total = tl.load(ptrs, mask=mask, other=0.0)
        centred = tl.load(ptrs + channels, mask=mask, other=0.0)
        if skip_statistics_ptr is not None:
            skip_mask = row_inside & second[None, :]
            ptrs = skip_statistics_ptr + rows[:, None] * 2 * skip_channels + (k - channels)[None, :]
            total += tl.load(ptrs, mask=skip_mask, other=0.0)
            centred += tl.load(ptrs + skip_channels, mask=skip_mask, other=0.0)
            mask = mask | skip_mask
        run_length = tl.maximum(tl.minimum(length - run * ROWS, ROWS), 1).to(tl.float32)[:, None]
        shift = total / run_length - mean
        squares += tl.where(mask, centred + run_length * shift * shift, 0.0)
    variance = tl.sum(tl.sum(squares, 0), 0) / count
    out_ptrs = out_ptr + (sample * NUM_GROUPS + group) * 2
    tl.store(out_ptrs, mean)
    tl.store(out_ptrs + 1, 1 / tl.sqrt_rn(variance + eps))


@triton.jit
def group_norm_quantize_kernel(
    x_ptr,
    skip_ptr,
    statistics_ptr,
    weight_ptr,
    bias_ptr,
    weight_dilation_ptr,
    act_scale_ptr,
    act_zero_point_ptr,
    timestep_index_ptr,
    out_ptr,
    num_timesteps,
    height,
    width,
    channels,
    skip_channels,
    stride_b,
    stride_l,
    stride_k,
    skip_stride_b,
    skip_stride_l,
    skip_stride_k,
    NUM_GROUPS: tl.constexpr,
    SILU: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PTX: tl.constexpr,
    PDL: tl.constexpr,
):
    """One tile of one sample: x [H * W, K] beside skip [H * W, K2] (strided) -> out [padded H * W, K + K2]."""
    follow_previous_kernel(PDL)
    sample = tl.program_id(2)
    position = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    length = (height + 2 * PAD_H) * (width + 2 * PAD_W)
    out_channels = channels + skip_channels
    k_inside = k < out_channels

    t = select_timestep(timestep_index_ptr + sample, num_timesteps)
    inverse_scale = tl.math.div_rn(1.0, tl.load(act_scale_ptr + t))
    inverse_dilation = tl.math.div_rn(1.0, tl.load(weight_dilation_ptr + k, mask=k_inside, other=1.0))
    zero_point = tl.load(act_zero_point_ptr + t)
    group = tl.where(k_inside, k, 0) // (out_channels // NUM_GROUPS)
    mean = tl.load(statistics_ptr + (sample * NUM_GROUPS + group) * 2)
    scale = tl.load(statistics_ptr + (sample * NUM_GROUPS + group) * 2 + 1)
    scale *= tl.load(weight_ptr + k, mask=k_inside, other=0.0).to(tl.float32)
    shift = tl.load(bias_ptr + k, mask=k_inside, other=0.0).to(tl.float32)

    source, inside = padded_position(position, height, width, PAD_H, PAD_W)
    x = tl.load(
        x_ptr + sample.to(tl.int64) * stride_b + source[:, None] * stride_l + k[None, :] * stride_k,
        mask=inside[:, None] & (k < channels)[None, :],
        other=0.0,
    ).to(tl.float32)
    if skip_ptr is not None:
        skip_ptr += sample.to(tl.int64) * skip_stride_b
        x += tl.load(
            skip_ptr + source[:, None] * skip_stride_l + (k - channels)[None, :] * skip_stride_k,
            mask=inside[:, None] & ((k >= channels) & k_inside)[None, :],
            other=0.0,
        ).to(tl.float32)
    y = (x - mean[None, :]) * scale[None, :] + shift[None, :]
    if SILU:
        y *= reciprocal(1 + exp(-y, PTX), PTX)
    q = quantize_tile(y, inverse_dilation[None, :], inverse_scale, zero_point, BITS, PTX)
    # Borders hold the quantized zero, not the norm of 0.
    quantized_zero = tl.minimum(tl.maximum(zero_point, -(2 ** (BITS - 1))), 2 ** (BITS - 1) - 1)
    q = tl.where(inside[:, None], q, quantized_zero)
    tl.store(
        out_ptr + sample.to(tl.int64) * length * out_channels + position[:, None] * out_channels + k[None, :],
        q.to(tl.int8),
        mask=(position < length)[:, None] & k_inside[None, :],
    )


@triton.jit
def layer_norm_quantize_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    weight_dilation_ptr,
    act_scale_ptr,
    act_zero_point_ptr,
    timestep_index_ptr,
    out_ptr,
    num_timesteps,
    num_rows,
    rows_per_sample,
    channels,
    eps,
    BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PTX: tl.constexpr,
    PDL: tl.constexpr,
):
    """Some rows of x [M, K], whole -> out [M, K]."""
    follow_previous_kernel(PDL)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    k_inside = k < channels
    inside = (row < num_rows)[:, None] & k_inside[None, :]
    offsets = row.to(tl.int64)[:, None] * channels + k[None, :]

    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, 1) / channels
    centred = tl.where(inside, x - mean[:, None], 0.0)
    rstd = 1 / tl.sqrt_rn(tl.sum(centred * centred, 1) / channels + eps)
    y = centred * rstd[:, None]
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + k, mask=k_inside, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + k, mask=k_inside, other=0.0).to(tl.float32)[None, :]

    sample = tl.minimum(row, num_rows - 1) // rows_per_sample
    t = select_timestep(timestep_index_ptr + sample, num_timesteps)
    inverse_scale = tl.math.div_rn(1.0, tl.load(act_scale_ptr + t))
    inverse_dilation = tl.math.div_rn(1.0, tl.load(weight_dilation_ptr + k, mask=k_inside, other=1.0))
    zero_point = tl.load(act_zero_point_ptr + t)
    q = quantize_tile(y, inverse_dilation[None, :], inverse_scale[:, None], zero_point[:, None], BITS, PTX)
    tl.store(out_ptr + offsets, q.to(tl.int8), mask=inside)


def channel_statistics(x: Tensor) -> Tensor:
    """As ``reference.channel_statistics``, of x [B, H, W, K] with any strides."""
    batch, height, width, channels = x.shape
    flat = x.reshape(batch, height * width, channels)
    num_runs = cdiv(height * width, STATISTICS_ROWS)
    out = torch.empty(batch, num_runs, 2, channels, dtype=torch.float32, device=x.device)
    channel_statistics_kernel[(num_runs, cdiv(channels, STATISTICS_CHANNELS), batch)](
        flat,
        out,
        height * width,
        channels,
        *flat.stride(),
        ROWS=STATISTICS_ROWS,
        BLOCK_K=STATISTICS_CHANNELS,
        num_warps=4,
        **launch_options(ptx=False),
        enable_fp_fusion=True,
    )
    return out


def group_norm_quantize(
    x: Tensor, num_groups: int, norm: Norm, quantizer: Quantizer, silu: bool, skip: Tensor | None,
    statistics: Tensor | None, skip_statistics: Tensor | None, padding: tuple[int, int],
) -> Tensor:  # fmt: skip
    """As ``reference.group_norm_quantize``; statistics that are not given are computed."""
    batch, height, width, channels = x.shape
    statistics = channel_statistics(x) if statistics is None else statistics
    skip_channels = 0
    if skip is not None:
        skip_channels = skip.shape[-1]
        skip_statistics = channel_statistics(skip) if skip_statistics is None else skip_statistics
    out_channels = channels + skip_channels
    group_statistics = torch.empty(batch, num_groups, 2, dtype=torch.float32, device=x.device)
    group_statistics_kernel[(num_groups, batch)](
        statistics,
        skip_statistics,
        group_statistics,
        statistics.shape[1],
        height * width,
        channels,
        skip_channels,
        norm.eps,
        NUM_GROUPS=num_groups,
        ROWS=STATISTICS_ROWS,
        BLOCK_R=32,
        BLOCK_K=next_power_of_2(out_channels // num_groups),
        num_warps=4,
        **launch_options(ptx=False),
        enable_fp_fusion=True,
    )
    flat = x.reshape(batch, height * width, channels)
    flat_skip = flat if skip is None else skip.reshape(batch, height * width, skip_channels)
    out = torch.empty(quantized_shape((batch, height, width, out_channels), padding), dtype=torch.int8, device=x.device)
    length = out.shape[1] * out.shape[2]
    grid = (cdiv(length, BLOCK_LENGTH), cdiv(out_channels, BLOCK_CHANNELS), batch)
    group_norm_quantize_kernel[grid](
        flat,
        None if skip is None else flat_skip,
        group_statistics,
        norm.weight,
        norm.bias,
        quantizer.dilation,
        quantizer.scale,
        quantizer.zero_point,
        quantizer.timestep_index,
        out,
        quantizer.scale.numel(),
        height,
        width,
        channels,
        skip_channels,
        *flat.stride(),
        *flat_skip.stride(),
        NUM_GROUPS=num_groups,
        SILU=silu,
        PAD_H=padding[0],
        PAD_W=padding[1],
        BITS=quantizer.bits,
        BLOCK_L=BLOCK_LENGTH,
        BLOCK_K=BLOCK_CHANNELS,
        **launch_options(),
        num_warps=4,
        enable_fp_fusion=False,
    )
    return out


def layer_norm_quantize(x: Tensor, norm: Norm, quantizer: Quantizer) -> Tensor:
    """As ``reference.layer_norm_quantize``."""
    channels, num_rows = x.shape[-1], x.numel() // x.shape[-1]
    out = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    block_k = next_power_of_2(channels)
    block_m = max(1, LAYER_NORM_TILE // block_k)
    layer_norm_quantize_kernel[(cdiv(num_rows, block_m),)](
        x,
        norm.weight,
        norm.bias,
        quantizer.dilation,
        quantizer.scale,
        quantizer.zero_point,
        quantizer.timestep_index,
        out,
        quantizer.scale.numel(),
        num_rows,
        num_rows // x.shape[0],
        channels,
        norm.eps,
        BITS=quantizer.bits,
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        **launch_options(),
        num_warps=LAYER_NORM_WARPS,
        enable_fp_fusion=False,
    )
    return out
