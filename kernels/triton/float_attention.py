"""Attention to few keys, such as a prompt's, in floating point: softmax(q k^T / sqrt(D)) v, quantized.

A program holds the scores of its queries with all keys, so the softmax is not online, and a head's channels pass in
chunks. The result is written as the next layer's int8 alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dq_kernels.records import Quantizer
from dq_kernels.triton.intrinsics import follow_previous_kernel
from dq_kernels.triton.launch import cdiv, launch_options, next_power_of_2
from dq_kernels.triton.quantization import NOT_FINITE, any_not_finite, quantize_tile, select_timestep

BLOCK_QUERIES, CHUNK, NUM_WARPS = 128, 32, 8
LOG2_E = 1.4426950408889634


@triton.jit(do_not_specialize=["num_timesteps", "query_length", "key_length"])
def attention_quantize_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    PTX: tl.constexpr,
    PDL: tl.constexpr,
):
    """Some queries of one head: query [B, L, H D], key and value [B, S, H D] (strided) -> out [B, L, H D].

    S is at most BLOCK_N; ``score_scale`` is log2(e) / sqrt(D).
    """
    follow_previous_kernel(PDL)
    head, sample = tl.program_id(1), tl.program_id(2)
    out_channels = tl.num_programs(1) * HEAD_CHANNELS
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n, d = tl.arange(0, BLOCK_N), tl.arange(0, CHUNK)
    m_inside, n_inside = m < query_length, n < key_length
    query_ptr += sample.to(tl.int64) * stride_b
    key_ptr += sample.to(tl.int64) * key_stride_b
    value_ptr += sample.to(tl.int64) * value_stride_b
    out_ptr += sample.to(tl.int64) * query_length * out_channels

    score = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in tl.static_range(0, HEAD_CHANNELS, CHUNK):
        inside = start + d < HEAD_CHANNELS
        channel = head * HEAD_CHANNELS + start + d
        query = tl.load(
            query_ptr + m[:, None] * stride_l + channel[None, :] * stride_k,
            mask=m_inside[:, None] & inside[None, :],
            other=0.0,
        )
        key = tl.load(
            key_ptr + n[None, :] * key_stride_l + channel[:, None] * key_stride_k,
            mask=n_inside[None, :] & inside[:, None],
            other=0.0,
        )
        score = tl.dot(query, key.to(query.dtype), score, input_precision="ieee")
    score = tl.where(n_inside[None, :], score * score_scale, float("-inf"))
    p = tl.exp2(score - tl.max(score, 1)[:, None])
    inverse_total = 1 / tl.sum(p, 1)[:, None]

    t = select_timestep(tl.load(timestep_index_ptr + sample), num_timesteps)
    inverse_scale = tl.math.div_rn(1.0, tl.load(next_scale_ptr + t))
    zero_point = tl.load(next_zero_point_ptr + t)
    for start in tl.static_range(0, HEAD_CHANNELS, CHUNK):
        inside = start + d < HEAD_CHANNELS
        channel = head * HEAD_CHANNELS + start + d
        value = tl.load(
            value_ptr + n[:, None] * value_stride_l + channel[None, :] * value_stride_k,
            mask=n_inside[:, None] & inside[None, :],
            other=0.0,
        )
        y = tl.dot(p.to(value.dtype), value, input_precision="ieee") * inverse_total
        inverse_dilation = tl.math.div_rn(1.0, tl.load(next_dilation_ptr + channel, mask=inside, other=1.0))
        tl.store(timestep_index_ptr + sample, NOT_FINITE, mask=any_not_finite(y))
        q = quantize_tile(y, inverse_dilation[None, :], inverse_scale, zero_point, NEXT_BITS, PTX)
        tl.store(
            out_ptr + m[:, None] * out_channels + channel[None, :],
            q.to(tl.int8),
            mask=m_inside[:, None] & inside[None, :],
        )


def attention_quantize(query: Tensor, key: Tensor, value: Tensor, heads: int, quantizer: Quantizer) -> Tensor:
    """As ``reference.attention_quantize``."""
    batch, query_length, channels = query.shape
    head_channels, key_length = channels // heads, key.shape[1]
    out = torch.empty(query.shape, dtype=torch.int8, device=query.device)
    attention_quantize_kernel[(cdiv(query_length, BLOCK_QUERIES), heads, batch)](
        query,
        key,
        value,
        quantizer.dilation,
        quantizer.scale,
        quantizer.zero_point,
        quantizer.timestep_index,
        out,
        quantizer.scale.numel(),
        query_length,
        key_length,
        LOG2_E * head_channels**-0.5,
        *query.stride(),
        *key.stride(),
        *value.stride(),
        HEAD_CHANNELS=head_channels,
        NEXT_BITS=quantizer.bits,
        BLOCK_M=BLOCK_QUERIES,
        BLOCK_N=max(16, next_power_of_2(key_length)),
        CHUNK=CHUNK,
        num_warps=NUM_WARPS,
        **launch_options(),
        enable_fp_fusion=False,
    )
    return out
