"""Activation quantization on the GPU: float -> int8, one scale and zero point per sample, chosen on the device.

    q_x = clamp(floor(x (1 / s_k) (1 / act_scale_t) + 0.5) + zp_t, -2^(b-1), 2^(b-1) - 1)

with s the weight dilation of input channel k and t the sample's timestep group. It is memory bound: one read of x,
one write of a byte per element. x may have any strides, so an NCHW tensor becomes NHWC int8 in the same pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK_LENGTH, BLOCK_CHANNELS = 64, 64


@triton.jit
def quantize_kernel(
    x_ptr,
    weight_dilation_ptr,
    act_scale_ptr,
    act_zero_point_ptr,
    timestep_index_ptr,
    out_ptr,
    num_timesteps,
    length,
    channels,
    out_channels,
    stride_b,
    stride_l,
    stride_k,
    BITS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of one sample: x [L, K] (strided) -> out [L, K padded to even] (contiguous)."""
    sample = tl.program_id(2)
    position = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)

    t = tl.load(timestep_index_ptr + sample)
    t = tl.minimum(tl.maximum(t, 0), num_timesteps - 1)
    inverse_scale = tl.math.div_rn(1.0, tl.load(act_scale_ptr + t))
    zero_point = tl.load(act_zero_point_ptr + t)
    inverse_dilation = tl.math.div_rn(1.0, tl.load(weight_dilation_ptr + k, mask=k < channels, other=1.0))

    # Channels beyond K (at most one) read as 0 and so become the zero point.
    x_ptr += sample.to(tl.int64) * stride_b
    x = tl.load(
        x_ptr + position[:, None] * stride_l + k[None, :] * stride_k,
        mask=(position < length)[:, None] & (k < channels)[None, :],
        other=0.0,
    ).to(tl.float32)

    q = tl.floor(x * inverse_dilation[None, :] * inverse_scale + 0.5) + zero_point
    q = tl.minimum(tl.maximum(q, -(2 ** (BITS - 1))), 2 ** (BITS - 1) - 1)

    out_ptr += sample.to(tl.int64) * length * out_channels
    tl.store(
        out_ptr + position[:, None] * out_channels + k[None, :],
        q.to(tl.int8),
        mask=(position < length)[:, None] & (k < out_channels)[None, :],
    )


def quantize(
    x: torch.Tensor,
    weight_dilation: torch.Tensor,
    act_scale: torch.Tensor,
    act_zero_point: torch.Tensor,
    timestep_index: torch.Tensor,
    bits: int,
) -> torch.Tensor:
    """Launches ``quantize_kernel``; arguments and result as in ``reference.quantize``."""
    channels = x.shape[-1]
    out_channels = channels + channels % 2
    flat = x.reshape(x.shape[0], -1, channels)
    out = torch.empty(*x.shape[:-1], out_channels, dtype=torch.int8, device=x.device)
    grid = (triton.cdiv(flat.shape[1], BLOCK_LENGTH), triton.cdiv(out_channels, BLOCK_CHANNELS), flat.shape[0])
    quantize_kernel[grid](
        flat,
        weight_dilation,
        act_scale,
        act_zero_point,
        timestep_index,
        out,
        act_scale.numel(),
        flat.shape[1],
        channels,
        out_channels,
        *flat.stride(),
        BITS=bits,
        BLOCK_L=BLOCK_LENGTH,
        BLOCK_K=BLOCK_CHANNELS,
        num_warps=4,
        enable_fp_fusion=False,  # a fused multiply-add would round ties another way than the other implementations
    )
    return out
