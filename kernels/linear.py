"""INT4 linear layer on the GPU: int8 activations x packed INT4 weights -> float.

    y_mn = act_scale_t weight_scale_n (sum_k q_x q_w - zp_t sum_k q_w) + bias_n + residual_mn

The weight is operand A, that is, the kernel computes Y^T = W X^T: ``wgmma`` takes A from registers, so the unpacked
nibbles never travel through shared memory. One packed block meets two activation blocks (the two halves of K) in two
dots. The unpacked values are 16 q_w; the accumulator is divided by 16, exactly, at the end. All tiles of the packed
weight fit in L2, so consecutive programs walk along N and share one tile of activations.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dq_kernels.packing import unpack_int4_x16
from dq_kernels.tuning import launch_config, use_ptx


@triton.jit
def int4_linear_kernel(
    x_ptr,
    weight_ptr,
    weight_scale_ptr,
    weight_sum_ptr,
    act_scale_ptr,
    act_zero_point_ptr,
    timestep_index_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    num_rows,
    rows_per_sample,
    num_timesteps,
    out_channels,
    half_channels,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    TILE_IN_SAMPLE: tl.constexpr,
    PTX: tl.constexpr,
):
    """One [BLOCK_N, BLOCK_M] tile of Y^T.

    x [M, K] int8, weight [N, K/2] uint8, residual and out [M, N]; TILE_IN_SAMPLE: no tile has rows of two samples.
    """
    num_tiles_n = tl.cdiv(out_channels, BLOCK_N)
    first_row = tl.program_id(0) // num_tiles_n * BLOCK_M
    n = (tl.program_id(0) % num_tiles_n * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    m = (first_row + tl.arange(0, BLOCK_M))[None, :]
    n_inside = n < out_channels
    m_inside = m < num_rows

    # Rows beyond the edge repeat row 0; they are never stored.
    k = tl.arange(0, BLOCK_K)
    weight_ptrs = weight_ptr + tl.where(n_inside, n, 0) * half_channels + k[None, :]
    x_ptrs = x_ptr + tl.where(m_inside, m, 0) * (2 * half_channels) + k[:, None]
    accumulator = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
    for start in range(0, half_channels, BLOCK_K):
        if EVEN_K:
            packed = tl.load(weight_ptrs)
            x_low = tl.load(x_ptrs)
            x_high = tl.load(x_ptrs + half_channels)
        else:
            inside = start + k < half_channels
            packed = tl.load(weight_ptrs, mask=inside[None, :], other=0)
            x_low = tl.load(x_ptrs, mask=inside[:, None], other=0)
            x_high = tl.load(x_ptrs + half_channels, mask=inside[:, None], other=0)
        w_low, w_high = unpack_int4_x16(packed, PTX)
        accumulator = tl.dot(w_low, x_low, accumulator, out_dtype=tl.int32)
        accumulator = tl.dot(w_high, x_high, accumulator, out_dtype=tl.int32)
        weight_ptrs += BLOCK_K
        x_ptrs += BLOCK_K

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
    offsets = m * out_channels + n
    if residual_ptr is not None:
        y += tl.load(residual_ptr + offsets, mask=n_inside & m_inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, y.to(out_ptr.dtype.element_ty), mask=n_inside & m_inside)


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
    """Launches ``int4_linear_kernel``; arguments and result as in ``reference.int4_linear``."""
    out_channels, half_channels = weight.shape
    num_rows = x.numel() // x.shape[-1]
    rows_per_sample = num_rows // x.shape[0]
    out = torch.empty(*x.shape[:-1], out_channels, dtype=out_dtype, device=x.device)
    config = launch_config(num_rows, out_channels)
    grid = (triton.cdiv(out_channels, config.block_n) * triton.cdiv(num_rows, config.block_m),)
    int4_linear_kernel[grid](
        x,
        weight,
        weight_scale,
        weight_sum,
        act_scale,
        act_zero_point,
        timestep_index,
        bias,
        residual,
        out,
        num_rows,
        rows_per_sample,
        act_scale.numel(),
        out_channels,
        half_channels,
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
