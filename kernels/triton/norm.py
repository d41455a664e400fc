"""Normalization fused with quantization on GPUs: the int8 input of the next layer, in one pass over x.

    group norm:  q = quantize(silu((x - mean_bg) rstd_bg weight_k + bias_k))     mean, rstd over a group's pixels
    layer norm:  q = quantize((x - mean_m) rstd_m weight_k + bias_k)             over a token's channels

Group norm needs its statistics first: a sum and a centred sum of squares of every channel over every run of
``STATISTICS_ROWS`` pixels. The epilogue of the convolution that made x writes them, or a pass of their own does. Every
program merges those of its groups with Chan's formula, without cancellation and always in the same order. The group
norm of a concatenation reads its two sources in place.

A program works on whole groups and reads 8 bytes of statistics a channel and run, from the L2 cache. Launches are
therefore of few programs: with 64 runs (64 x 64 pixels), 256 programs of 120 channels read 16 MB, which take about as
long as the launch that they save. More runs are merged before, by a launch of their own.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dq_kernels.records import Norm, Quantizer
from dq_kernels.shapes import STATISTICS_ROWS, quantized_shape
from dq_kernels.triton.intrinsics import exp, follow_previous_kernel, reciprocal
from dq_kernels.triton.launch import cdiv, launch_options, next_power_of_2
from dq_kernels.triton.quantization import NOT_FINITE, padded_position, quantize_tile, select_timestep

BLOCK_LENGTH, BLOCK_CHANNELS = 32, 128
BLOCK_RUNS = 16  # of statistics that a program reads at a time; with more, registers spill
STATISTICS_CHANNELS = 64
PROGRAMS = 256  # of a group norm's launch, about: two on each multiprocessor of the largest GPUs
MAX_RUNS, MERGED_RUNS = 64, 16  # of the statistics that a program of the group norm reads; merged into one, if more
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


@triton.jit(do_not_specialize=["num_runs", "length"])
def merge_runs_kernel(
    statistics_ptr,
    out_ptr,
    num_runs,
    length,
    channels,
    ROWS: tl.constexpr,
    MERGED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """Statistics of runs of ROWS rows [B, L / ROWS, 2, K] -> of runs of MERGED ROWS [B, L / (MERGED ROWS), 2, K]."""
    follow_previous_kernel(PDL)
    first, sample = tl.program_id(0) * MERGED, tl.program_id(2)
    run = first + tl.arange(0, MERGED)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (run < num_runs)[:, None] & (k < channels)[None, :]
    ptrs = statistics_ptr + (sample * num_runs + run)[:, None] * 2 * channels + k[None, :]
    total = tl.load(ptrs, mask=inside, other=0.0)
    centred = tl.load(ptrs + channels, mask=inside, other=0.0)
    rows = tl.maximum(tl.minimum(length - run * ROWS, ROWS), 1).to(tl.float32)[:, None]
    sum_of_all = tl.sum(total, 0)
    shift = total / rows - (sum_of_all / tl.minimum(length - first * ROWS, MERGED * ROWS))[None, :]
    squares = tl.where(inside, centred + rows * shift * shift, 0.0)
    out_ptrs = out_ptr + (sample * tl.num_programs(0) + tl.program_id(0)) * 2 * channels + k
    tl.store(out_ptrs, sum_of_all, mask=k < channels)
    tl.store(out_ptrs + channels, tl.sum(squares, 0), mask=k < channels)


@triton.jit
def _sum_in_groups(v, member):
    """v [K] -> the sum over each channel's group [K]; member [groups, K] is true where a channel lies in a group."""
    total = tl.sum(tl.where(member, v[None, :], 0.0), 1)
    return tl.sum(tl.where(member, total[:, None], 0.0), 0)


@triton.jit
def _group_moments(
    statistics_ptr, skip_statistics_ptr, k, k_inside, member, num_runs, rows, length, channels, skip_channels,
    GROUP_SIZE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Mean and variance of each channel's group [K]: Chan's formula over the group's channels and all runs."""
    first, second = k_inside & (k < channels), k_inside & (k >= channels)
    count = GROUP_SIZE * length
    total = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
    for start in range(0, num_runs, BLOCK_R):
        run = start + tl.arange(0, BLOCK_R)[:, None]
        ptrs = statistics_ptr + run * 2 * channels + k[None, :]
        total += tl.load(ptrs, mask=(run < num_runs) & first[None, :], other=0.0)
        if skip_statistics_ptr is not None:
            ptrs = skip_statistics_ptr + run * 2 * skip_channels + (k - channels)[None, :]
            total += tl.load(ptrs, mask=(run < num_runs) & second[None, :], other=0.0)
    mean = _sum_in_groups(tl.sum(total, 0), member) / count
    squares = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
    for start in range(0, num_runs, BLOCK_R):
        run = start + tl.arange(0, BLOCK_R)[:, None]
        mask = (run < num_runs) & first[None, :]
        ptrs = statistics_ptr + run * 2 * channels + k[None, :]
        total = tl.load(ptrs, mask=mask, other=0.0)
        centred = tl.load(ptrs + channels, mask=mask, other=0.0)
        if skip_statistics_ptr is not None:
            mask = (run < num_runs) & second[None, :]
            ptrs = skip_statistics_ptr + run * 2 * skip_channels + (k - channels)[None, :]
            total += tl.load(ptrs, mask=mask, other=0.0)
            centred += tl.load(ptrs + skip_channels, mask=mask, other=0.0)
        run_length = tl.maximum(tl.minimum(length - run * rows, rows), 1).to(tl.float32)
        shift = total / run_length - mean[None, :]
        squares += tl.where((run < num_runs) & k_inside[None, :], centred + run_length * shift * shift, 0.0)
    return mean, _sum_in_groups(tl.sum(squares, 0), member) / count


@triton.jit(do_not_specialize=["num_timesteps", "num_runs", "run_length", "positions", "height", "width"])
def group_norm_quantize_kernel(
    x_ptr,
    skip_ptr,
    statistics_ptr,
    skip_statistics_ptr,
    weight_ptr,
    bias_ptr,
    weight_dilation_ptr,
    act_scale_ptr,
    act_zero_point_ptr,
    plain_dilation_ptr,
    plain_scale_ptr,
    plain_zero_point_ptr,
    timestep_index_ptr,
    out_ptr,
    plain_out_ptr,
    num_timesteps,
    num_runs,
    run_length,
    positions,
    eps,
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
    GROUP_SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    SILU: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    BITS: tl.constexpr,
    PLAIN_BITS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PTX: tl.constexpr,
    PDL: tl.constexpr,
):
    """Some positions and GROUPS whole groups of one sample.

    x [H * W, K] beside skip [H * W, K2] (strided), statistics [runs, 2, K] -> out [padded H * W, K + K2] and, without
    norm and padding, plain_out [H * W, K + K2].
    """
    follow_previous_kernel(PDL)
    sample = tl.program_id(2)
    within = tl.arange(0, BLOCK_K)
    k = tl.program_id(1) * (GROUPS * GROUP_SIZE) + within
    length = (height + 2 * PAD_H) * (width + 2 * PAD_W)
    out_channels = channels + skip_channels
    k_inside = (within < GROUPS * GROUP_SIZE) & (k < out_channels)

    t = select_timestep(tl.load(timestep_index_ptr + sample), num_timesteps)
    inverse_scale = tl.math.div_rn(1.0, tl.load(act_scale_ptr + t))
    inverse_dilation = tl.math.div_rn(1.0, tl.load(weight_dilation_ptr + k, mask=k_inside, other=1.0))
    zero_point = tl.load(act_zero_point_ptr + t)
    # Borders hold the quantized zero, not the norm of 0.
    quantized_zero = tl.minimum(tl.maximum(zero_point, -(2 ** (BITS - 1))), 2 ** (BITS - 1) - 1)
    weight = tl.load(weight_ptr + k, mask=k_inside, other=0.0).to(tl.float32)
    shift = tl.load(bias_ptr + k, mask=k_inside, other=0.0).to(tl.float32)
    statistics_ptr += sample * num_runs * 2 * channels
    x_ptr += sample.to(tl.int64) * stride_b
    out_ptr += sample.to(tl.int64) * length * out_channels
    if skip_ptr is not None:
        skip_statistics_ptr += sample * num_runs * 2 * skip_channels
        skip_ptr += sample.to(tl.int64) * skip_stride_b
    if plain_out_ptr is not None:
        plain_inverse_scale = tl.math.div_rn(1.0, tl.load(plain_scale_ptr + t))
        plain_inverse_dilation = tl.math.div_rn(1.0, tl.load(plain_dilation_ptr + k, mask=k_inside, other=1.0))
        plain_zero_point = tl.load(plain_zero_point_ptr + t)
        plain_out_ptr += sample.to(tl.int64) * height * width * out_channels

    member = (within // GROUP_SIZE)[None, :] == tl.arange(0, BLOCK_G)[:, None]
    mean, variance = _group_moments(
        statistics_ptr, skip_statistics_ptr, k, k_inside, member, num_runs, run_length, height * width, channels,
        skip_channels, GROUP_SIZE, BLOCK_R, BLOCK_K,
    )  # fmt: skip
    scale = weight / tl.sqrt_rn(variance + eps)
    # A pixel that is not finite makes its group's mean the same, so the pixels need no check.
    is_lost = k_inside & ((mean + scale + shift) * 0 != 0)
    tl.store(timestep_index_ptr + sample + tl.zeros_like(k), NOT_FINITE, mask=is_lost)

    for start in range(0, positions, BLOCK_L):
        position = tl.program_id(0) * positions + start + tl.arange(0, BLOCK_L)
        source, inside = padded_position(position, height, width, PAD_H, PAD_W)
        x = tl.load(
            x_ptr + source[:, None] * stride_l + k[None, :] * stride_k,
            mask=inside[:, None] & (k_inside & (k < channels))[None, :],
            other=0.0,
        ).to(tl.float32)
        if skip_ptr is not None:
            x += tl.load(
                skip_ptr + source[:, None] * skip_stride_l + (k - channels)[None, :] * skip_stride_k,
                mask=inside[:, None] & (k_inside & (k >= channels))[None, :],
                other=0.0,
            ).to(tl.float32)
        y = (x - mean[None, :]) * scale[None, :] + shift[None, :]
        if SILU:
            y *= reciprocal(1 + exp(-y, PTX), PTX)
        q = quantize_tile(y, inverse_dilation[None, :], inverse_scale, zero_point, BITS, PTX)
        q = tl.where(inside[:, None], q, quantized_zero)
        tl.store(
            out_ptr + position[:, None] * out_channels + k[None, :],
            q.to(tl.int8),
            mask=(position < length)[:, None] & k_inside[None, :],
        )
        if plain_out_ptr is not None:
            q = quantize_tile(
                x, plain_inverse_dilation[None, :], plain_inverse_scale, plain_zero_point, PLAIN_BITS, PTX
            )
            tl.store(
                plain_out_ptr + source[:, None] * out_channels + k[None, :],
                q.to(tl.int8),
                mask=inside[:, None] & k_inside[None, :],
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
    weight = tl.full((BLOCK_K,), 1.0, dtype=tl.float32)
    bias = tl.zeros((BLOCK_K,), dtype=tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + k, mask=k_inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + k, mask=k_inside, other=0.0).to(tl.float32)
    # A value of x or of the parameters that is not finite makes rstd NaN: parameters add 0 or NaN to the squares.
    zero_or_nan = tl.broadcast_to(((weight + bias) * 0)[None, :], centred.shape)
    rstd = 1 / tl.sqrt_rn(tl.sum(tl.fma(centred, centred, zero_or_nan), 1) / channels + eps)
    y = centred * rstd[:, None] * weight[None, :] + bias[None, :]

    sample = tl.minimum(row, num_rows - 1) // rows_per_sample
    t = select_timestep(tl.load(timestep_index_ptr + sample), num_timesteps)
    inverse_scale = tl.math.div_rn(1.0, tl.load(act_scale_ptr + t))
    inverse_dilation = tl.math.div_rn(1.0, tl.load(weight_dilation_ptr + k, mask=k_inside, other=1.0))
    zero_point = tl.load(act_zero_point_ptr + t)
    q = quantize_tile(y, inverse_dilation[None, :], inverse_scale[:, None], zero_point[:, None], BITS, PTX)
    tl.store(out_ptr + offsets, q.to(tl.int8), mask=inside)
    tl.store(timestep_index_ptr + sample, NOT_FINITE, mask=(row < num_rows) & (rstd * 0 != 0))


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


def merge_runs(statistics: Tensor, length: int) -> Tensor:
    """Statistics of runs that are ``MERGED_RUNS`` times as long."""
    batch, num_runs, _, channels = statistics.shape
    out = statistics.new_empty(batch, cdiv(num_runs, MERGED_RUNS), 2, channels)
    merge_runs_kernel[(out.shape[1], cdiv(channels, STATISTICS_CHANNELS), batch)](
        statistics,
        out,
        num_runs,
        length,
        channels,
        ROWS=STATISTICS_ROWS,
        MERGED=MERGED_RUNS,
        BLOCK_K=STATISTICS_CHANNELS,
        num_warps=4,
        **launch_options(ptx=False),
        enable_fp_fusion=True,
    )
    return out


def group_tile(group_size: int) -> dict[str, int]:
    """Constants of ``group_norm_quantize_kernel`` for groups of so many channels.

    The first channel of every program is a multiple of 8 where the groups permit it: accesses are 16 bytes wide.
    """
    block_k = max(BLOCK_CHANNELS, next_power_of_2(group_size))
    groups, aligned = block_k // group_size, 8 // math.gcd(group_size, 8)
    groups -= groups % aligned if groups > aligned else 0
    return {
        "GROUP_SIZE": group_size,
        "GROUPS": groups,
        "BLOCK_L": max(1, BLOCK_LENGTH * BLOCK_CHANNELS // block_k),
        "BLOCK_G": next_power_of_2(groups),
        "BLOCK_K": block_k,
        "BLOCK_R": max(1, BLOCK_RUNS * BLOCK_CHANNELS // block_k),
    }


def group_norm_quantize(
    x: Tensor, num_groups: int, norm: Norm, quantizer: Quantizer, silu: bool, skip: Tensor | None,
    statistics: Tensor | None, skip_statistics: Tensor | None, padding: tuple[int, int],
    plain_quantizer: Quantizer | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As ``reference.group_norm_quantize``; statistics that are not given are computed."""
    batch, height, width, channels = x.shape
    statistics = channel_statistics(x) if statistics is None else statistics
    skip_channels = 0
    if skip is not None:
        skip_channels = skip.shape[-1]
        skip_statistics = channel_statistics(skip) if skip_statistics is None else skip_statistics
    run_length = STATISTICS_ROWS
    if statistics.shape[1] > MAX_RUNS:
        run_length *= MERGED_RUNS
        statistics = merge_runs(statistics, height * width)
        skip_statistics = None if skip_statistics is None else merge_runs(skip_statistics, height * width)
    out_channels = channels + skip_channels
    flat = x.reshape(batch, height * width, channels)
    flat_skip = flat if skip is None else skip.reshape(batch, height * width, skip_channels)
    out = torch.empty(quantized_shape((batch, height, width, out_channels), padding), dtype=torch.int8, device=x.device)
    plain_shape = (0 if plain_quantizer is None else batch, height, width, out_channels)
    plain_out = torch.empty(plain_shape, dtype=torch.int8, device=x.device)
    tile = group_tile(out_channels // num_groups)
    tiles, columns = cdiv(out.shape[1] * out.shape[2], tile["BLOCK_L"]), cdiv(num_groups, tile["GROUPS"])
    tiles_each = max(1, tiles * columns * batch // PROGRAMS)
    group_norm_quantize_kernel[(cdiv(tiles, tiles_each), columns, batch)](
        flat,
        None if skip is None else flat_skip,
        statistics,
        skip_statistics,
        norm.weight,
        norm.bias,
        quantizer.dilation,
        quantizer.scale,
        quantizer.zero_point,
        None if plain_quantizer is None else plain_quantizer.dilation,
        None if plain_quantizer is None else plain_quantizer.scale,
        None if plain_quantizer is None else plain_quantizer.zero_point,
        quantizer.timestep_index,
        out,
        None if plain_quantizer is None else plain_out,
        quantizer.scale.numel(),
        statistics.shape[1],
        run_length,
        tiles_each * tile["BLOCK_L"],
        norm.eps,
        height,
        width,
        channels,
        skip_channels,
        *flat.stride(),
        *flat_skip.stride(),
        SILU=silu,
        PAD_H=padding[0],
        PAD_W=padding[1],
        BITS=quantizer.bits,
        PLAIN_BITS=8 if plain_quantizer is None else plain_quantizer.bits,
        **tile,
        **launch_options(),
        num_warps=4,
        enable_fp_fusion=False,
    )
    return out, plain_out


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
