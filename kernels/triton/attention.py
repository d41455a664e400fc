"""Attention in int8 on GPUs: both products use int8 matrix instructions, and no probability is stored in memory.

    s_mn = (q8_m . k8_n) scale_m scale_b / sqrt(D)                  p_mn = exp(s_mn - max_n s_mn)
    y_m = sum_n p8_mn v8_n scale_b / sum_n p_mn + mean of v         p8 = floor(255 p + 0.5) / 255

No calibration is needed. Each query has a scale of its own, and so has each block b of ``BLOCK_KEYS`` keys or values:
the largest magnitude / 127. The means over all tokens are subtracted from keys and values before quantization. The mean
of the keys shifts all scores of a query equally, which softmax ignores (the smoothing of SageAttention, arXiv
2410.02367); the mean of the values is added to the result, since probabilities add up to 1. The common part of all
tokens so uses no range, and probabilities that round to 0 contribute the values' mean instead of nothing.

The means follow from the sums that the projection's GEMM has written (the statistics of ``int4_conv2d``), so one launch
prepares all keys and values. Few keys are prepared by each program that reads them, which saves that launch, too.

Probabilities are rounded to 8 bits relative to the largest one of their query so far (online softmax, in the order of
FlashAttention-2). int8 stores p8 - 128, and the sums of v8 correct for it.

Non-finite inputs make every result NaN that depends on them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dq_kernels.records import Quantizer
from dq_kernels.shapes import BLOCK_KEYS, FEW_KEYS
from dq_kernels.triton.intrinsics import floor_to_int, follow_previous_kernel, round_to_int
from dq_kernels.triton.launch import cdiv, launch_options, next_power_of_2
from dq_kernels.triton.quantization import NOT_FINITE, any_not_finite, quantize_tile, select_timestep

SMALLEST = tl.constexpr(1e-30)  # smaller magnitudes count as 0: the inverse of their scale would be infinite
LOG2_E = 1.4426950408889634
LOG2_255 = tl.constexpr(7.994353436858858)
BLOCK_RUNS = 16  # sums of runs of tokens that are loaded at a time


@triton.jit
def quantize_to_127(x, PER_ROW: tl.constexpr, PTX: tl.constexpr):
    """x in steps of its largest magnitude / 127 as int8, and the step, of a row or of all; NaN if x is not finite."""
    if PER_ROW:
        largest, zero_or_nan = tl.max(tl.abs(x), 1)[:, None], tl.sum(x * 0, 1)[:, None]
    else:
        largest, zero_or_nan = tl.max(tl.max(tl.abs(x), 1), 0), tl.sum(tl.sum(x * 0, 1), 0)
    scale = tl.where(largest > SMALLEST, tl.math.div_rn(largest, 127.0), 1.0) + zero_or_nan
    return floor_to_int(x * tl.math.div_rn(1.0, scale) + 0.5, PTX).to(tl.int8), scale


@triton.jit
def mean_of_tokens(x_ptr, channel, inside, num_rows, length, stride_l, stride_k, BLOCK_N: tl.constexpr):
    """The sum of rows of x over the number of tokens, [BLOCK_D]: the rows are tokens, or sums of runs of them."""
    n = tl.arange(0, BLOCK_N)
    total = tl.zeros(channel.shape, dtype=tl.float32)
    for start in range(0, num_rows, BLOCK_N):
        row = start + n
        x = tl.load(
            x_ptr + row[:, None] * stride_l + channel[None, :] * stride_k,
            mask=(row < num_rows)[:, None] & inside[None, :],
            other=0.0,
        )
        total += tl.sum(x.to(tl.float32), 0)
    return tl.math.div_rn(total, length.to(tl.float32))


@triton.jit
def quantize_block(
    x_ptr, mean, block, channel, inside, length, stride_l, stride_k, BLOCK_N: tl.constexpr, PTX: tl.constexpr
):
    """A block of keys or values less the mean: int8 [BLOCK_N, BLOCK_D], 0 outside, and the step."""
    token = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (token < length)[:, None] & inside[None, :]
    x = tl.load(x_ptr + token[:, None] * stride_l + channel[None, :] * stride_k, mask=inside, other=0.0)
    return quantize_to_127(tl.where(inside, x.to(tl.float32) - mean[None, :], 0.0), False, PTX)


@triton.jit(do_not_specialize=["length", "num_runs"])
def quantize_keys_values_kernel(
    key_ptr,
    value_ptr,
    key_sums_ptr,
    value_sums_ptr,
    key8_ptr,
    value8_ptr,
    scales_ptr,
    value8_sums_ptr,
    value_mean_ptr,
    length,
    num_runs,
    key_stride_b,
    key_stride_l,
    key_stride_k,
    value_stride_b,
    value_stride_l,
    value_stride_k,
    sums_stride_b,
    sums_stride_r,
    HEAD_CHANNELS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_RUNS: tl.constexpr,
    PTX: tl.constexpr,
    PDL: tl.constexpr,
):
    """One block of one head: key, value [B, S, H D] (strided) -> int8, padded with zeros.

    The sums are of runs of tokens, [B, runs, H D]. key8 [B, H, blocks, BLOCK_N, BLOCK_D]; value8 [B, H, blocks,
    BLOCK_D, BLOCK_N], since int8 matrix instructions need a contiguous reduction dimension; scales [B, H, blocks, 2]
    fp32; value8_sums [B, H, blocks, BLOCK_D] int32; value_mean [B, H D] fp32.
    """
    follow_previous_kernel(PDL)
    block, head, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    n, d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    channel, inside = head * HEAD_CHANNELS + d, d < HEAD_CHANNELS
    place = ((sample * heads + head) * tl.num_programs(0) + block).to(tl.int64)
    tile = place * (BLOCK_N * BLOCK_D)
    first_sum = sample.to(tl.int64) * sums_stride_b

    mean = mean_of_tokens(key_sums_ptr + first_sum, channel, inside, num_runs, length, sums_stride_r, 1, BLOCK_RUNS)
    key_ptr += sample.to(tl.int64) * key_stride_b
    key8, step = quantize_block(key_ptr, mean, block, channel, inside, length, key_stride_l, key_stride_k, BLOCK_N, PTX)
    tl.store(key8_ptr + tile + n[:, None] * BLOCK_D + d[None, :], key8)
    tl.store(scales_ptr + place * 2, step)

    mean = mean_of_tokens(value_sums_ptr + first_sum, channel, inside, num_runs, length, sums_stride_r, 1, BLOCK_RUNS)
    value_ptr += sample.to(tl.int64) * value_stride_b
    value8, step = quantize_block(
        value_ptr, mean, block, channel, inside, length, value_stride_l, value_stride_k, BLOCK_N, PTX
    )
    tl.store(value8_ptr + tile + d[:, None] * BLOCK_N + n[None, :], tl.trans(value8))
    tl.store(scales_ptr + place * 2 + 1, step)
    tl.store(value8_sums_ptr + place * BLOCK_D + d, tl.sum(value8.to(tl.int32), 0))
    if block == 0:
        tl.store(value_mean_ptr + sample * heads * HEAD_CHANNELS + channel, mean, mask=inside)


@triton.jit(do_not_specialize=["num_timesteps", "query_length", "key_length"])
def int8_attention_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    scales_ptr,
    value8_sums_ptr,
    value_mean_ptr,
    next_dilation_ptr,
    next_scale_ptr,
    next_zero_point_ptr,
    timestep_index_ptr,
    out_ptr,
    num_timesteps,
    query_length,
    key_length,
    score_scale,
    stride_b,
    stride_l,
    stride_k,
    key_stride_b,
    key_stride_l,
    key_stride_k,
    value_stride_b,
    value_stride_l,
    value_stride_k,
    HEAD_CHANNELS: tl.constexpr,
    NEXT_BITS: tl.constexpr,
    EVEN_KEYS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PTX: tl.constexpr,
    PDL: tl.constexpr,
):
    """Some queries of one head: query [B, L, H D] (strided) and keys and values -> out [B, L, H D].

    Keys and values come from ``quantize_keys_values_kernel``; without ``scales_ptr`` they are float [B, S, H D]
    (strided), and are prepared here. ``score_scale`` is log2(e) / sqrt(D). With ``next_*`` the result is the next
    layer's int8. EVEN_KEYS: the last block is full.
    """
    follow_previous_kernel(PDL)
    head, sample = tl.program_id(1), tl.program_id(2)
    heads, num_blocks = tl.num_programs(1), tl.cdiv(key_length, BLOCK_N)
    n, d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = head * HEAD_CHANNELS + d
    d_inside = d < HEAD_CHANNELS
    inside = (m < query_length)[:, None] & d_inside[None, :]

    query_ptr += sample.to(tl.int64) * stride_b
    query = tl.load(query_ptr + m[:, None] * stride_l + channel[None, :] * stride_k, mask=inside, other=0.0)
    query = query.to(tl.float32)
    query8, query_scale = quantize_to_127(query, True, PTX)
    query_scale *= score_scale

    if scales_ptr is None:
        key_ptr += sample.to(tl.int64) * key_stride_b
        value_ptr += sample.to(tl.int64) * value_stride_b
        key_mean = mean_of_tokens(
            key_ptr, channel, d_inside, key_length, key_length, key_stride_l, key_stride_k, BLOCK_N
        )
        value_mean = mean_of_tokens(
            value_ptr, channel, d_inside, key_length, key_length, value_stride_l, value_stride_k, BLOCK_N
        )
    else:
        first = (sample * heads + head).to(tl.int64) * num_blocks
        key_ptrs = key_ptr + first * (BLOCK_N * BLOCK_D) + n[None, :] * BLOCK_D + d[:, None]
        value_ptrs = value_ptr + first * (BLOCK_N * BLOCK_D) + d[None, :] * BLOCK_N + n[:, None]
        scales_ptr += first * 2
        sums_ptrs = value8_sums_ptr + first * BLOCK_D + d[None, :]
    largest = tl.full((BLOCK_M, 1), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M, 1), dtype=tl.float32)
    result = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    for block in range(num_blocks):
        if scales_ptr is None:
            key8, key_scale = quantize_block(
                key_ptr, key_mean, block, channel, d_inside, key_length, key_stride_l, key_stride_k, BLOCK_N, PTX
            )
            key8 = tl.trans(key8)
        else:
            key8, key_scale = tl.load(key_ptrs), tl.load(scales_ptr + 2 * block)
            key_ptrs += BLOCK_N * BLOCK_D
        scale = query_scale * key_scale + SMALLEST  # with 0, keys beyond the end would count
        score = tl.dot(query8, key8, out_dtype=tl.int32).to(tl.float32)
        if not EVEN_KEYS:
            # Scores beyond the end become very small by arithmetic: AMD's compiler spills the masks of comparisons.
            beyond = (block * BLOCK_N + n - (key_length - 1)).to(tl.float32)
            score -= tl.maximum(beyond, 0.0)[None, :] * 1e36
        highest = tl.max(score, 1)[:, None]
        so_far = tl.maximum(largest, highest * scale)
        fade = tl.exp2(largest - so_far)
        # At most 255 however it is rounded: the logarithm of 255 plus two numbers that are not positive.
        p = tl.exp2((score - highest) * scale + (tl.minimum(highest * scale - so_far, 0.0) + LOG2_255))
        total = total * fade + tl.sum(p, 1)[:, None]
        p8 = (round_to_int(p, PTX) - 128).to(tl.int8)
        if scales_ptr is None:
            value8, value_scale = quantize_block(
                value_ptr, value_mean, block, channel, d_inside, key_length, value_stride_l, value_stride_k, BLOCK_N,
                PTX,
            )  # fmt: skip
            value8_sum = tl.sum(value8.to(tl.int32), 0)[None, :]
        else:
            value8, value_scale, value8_sum = (
                tl.load(value_ptrs),
                tl.load(scales_ptr + 2 * block + 1),
                tl.load(sums_ptrs),
            )
            value_ptrs += BLOCK_N * BLOCK_D
            sums_ptrs += BLOCK_D
        product = tl.dot(p8, value8, out_dtype=tl.int32) + 128 * value8_sum
        result = result * fade + product.to(tl.float32) * value_scale
        largest = so_far
    if scales_ptr is not None:
        value_mean = tl.load(value_mean_ptr + sample * heads * HEAD_CHANNELS + channel, mask=d_inside, other=0.0)
    result = result / total + value_mean[None, :]

    if next_scale_ptr is not None:
        t = select_timestep(tl.load(timestep_index_ptr + sample), num_timesteps)
        inverse_scale = tl.math.div_rn(1.0, tl.load(next_scale_ptr + t))
        inverse_dilation = tl.math.div_rn(1.0, tl.load(next_dilation_ptr + channel, mask=d_inside, other=1.0))
        zero_point = tl.load(next_zero_point_ptr + t)
        tl.store(timestep_index_ptr + sample, NOT_FINITE, mask=any_not_finite(result))
        result = quantize_tile(result, inverse_dilation[None, :], inverse_scale, zero_point, NEXT_BITS, PTX)
    out_ptr += sample.to(tl.int64) * query_length * (heads * HEAD_CHANNELS)
    tl.store(
        out_ptr + m[:, None] * (heads * HEAD_CHANNELS) + channel[None, :],
        result.to(out_ptr.dtype.element_ty),
        mask=inside,
    )


def int8_attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """As ``reference.int8_attention``."""
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    _launch(query, key, value, heads, out, None, None)
    return out


def int8_attention_quantize(
    query: Tensor, key: Tensor, value: Tensor, heads: int, quantizer: Quantizer, statistics: Tensor | None = None
) -> Tensor:
    """As ``reference.int8_attention_quantize``."""
    out = torch.empty(query.shape, dtype=torch.int8, device=query.device)
    _launch(query, key, value, heads, out, quantizer, statistics)
    return out


def _launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    out: Tensor,
    quantizer: Quantizer | None,
    statistics: Tensor | None,
) -> None:
    batch, query_length, channels = query.shape
    key_length, head_channels = key.shape[1], channels // heads
    block_d = padded_head_channels(head_channels)
    has_few_keys = key_length <= FEW_KEYS
    prepared: tuple[Any, ...] = (key, value, None, None, None)
    if not has_few_keys:
        prepared = _prepared(key, value, heads, block_d, statistics)
    block_m, num_warps, num_stages = tile_of(block_d, has_few_keys)
    int8_attention_kernel[(cdiv(query_length, block_m), heads, batch)](
        query,
        *prepared,
        None if quantizer is None else quantizer.dilation,
        None if quantizer is None else quantizer.scale,
        None if quantizer is None else quantizer.zero_point,
        None if quantizer is None else quantizer.timestep_index,
        out,
        0 if quantizer is None else quantizer.scale.numel(),
        query_length,
        key_length,
        LOG2_E * head_channels**-0.5,
        *query.stride(),
        *key.stride(),
        *value.stride(),
        HEAD_CHANNELS=head_channels,
        NEXT_BITS=8 if quantizer is None else quantizer.bits,
        EVEN_KEYS=key_length % BLOCK_KEYS == 0,
        BLOCK_M=block_m,
        BLOCK_N=BLOCK_KEYS,
        BLOCK_D=block_d,
        num_warps=num_warps,
        num_stages=num_stages,
        **launch_options(),
        enable_fp_fusion=True,
    )


def _prepared(
    key: Tensor, value: Tensor, heads: int, block_d: int, statistics: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Keys and values in int8, their scales, the sums of the values in int8, and the values' mean."""
    batch, length, channels = key.shape
    if statistics is None:
        key_sums, value_sums = (x.sum(1, keepdim=True, dtype=torch.float32) for x in (key, value))
    else:
        key_sums, value_sums = statistics[:, :, 0].chunk(2, dim=-1)
    num_runs, device = key_sums.shape[1], key.device
    num_blocks = cdiv(length, BLOCK_KEYS)
    blocks = (batch, heads, num_blocks)
    prepared = (
        torch.empty(*blocks, BLOCK_KEYS, block_d, dtype=torch.int8, device=device),
        torch.empty(*blocks, block_d, BLOCK_KEYS, dtype=torch.int8, device=device),
        torch.empty(*blocks, 2, dtype=torch.float32, device=device),
        torch.empty(*blocks, block_d, dtype=torch.int32, device=device),
        torch.empty(batch, channels, dtype=torch.float32, device=device),
    )
    quantize_keys_values_kernel[(num_blocks, heads, batch)](
        key,
        value,
        key_sums,
        value_sums,
        *prepared,
        length,
        num_runs,
        *key.stride(),
        *value.stride(),
        *key_sums.stride()[:2],
        HEAD_CHANNELS=channels // heads,
        BLOCK_N=BLOCK_KEYS,
        BLOCK_D=block_d,
        BLOCK_RUNS=BLOCK_RUNS,
        num_warps=quantizer_warps(block_d),
        **launch_options(),
        enable_fp_fusion=False,
    )
    return prepared


def padded_head_channels(head_channels: int) -> int:
    """The channels of a head in memory: a power of two, and at least the reduction of one int8 matrix instruction."""
    return max(32, next_power_of_2(head_channels))


def tile_of(block_d: int, has_few_keys: bool = False) -> tuple[int, int, int]:
    """Queries, warps and pipeline stages of a program, chosen from the compiler's report: none spills registers."""
    if has_few_keys:
        return (64, 4, 2) if block_d <= 64 else (64, 8, 1)
    return (64, 4, 3) if block_d <= 64 else (128, 8, 3)


def quantizer_warps(block_d: int) -> int:
    """Warps of a program that quantizes a block of keys and values: each thread has 32 elements."""
    return block_d * BLOCK_KEYS // (32 * 32)
