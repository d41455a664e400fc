"""INT4 linear layers on the GPU: ``gemm`` over rows of tokens, to floats or straight to the next layer's int8."""

from __future__ import annotations

import torch

from dq_kernels import gemm
from dq_kernels.tuning import launch_config


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
    """As ``reference.int4_linear``."""
    out = torch.empty(*x.shape[:-1], weight.shape[0], dtype=out_dtype, device=x.device)
    config = launch_config("linear", x.numel() // x.shape[-1], weight.shape[0], x.shape[-1])
    gemm.launch(
        config, x, weight, weight_scale, weight_sum, act_scale, act_zero_point, timestep_index, bias, out,
        residual=residual,
    )  # fmt: skip
    return out


def int4_linear_quantize(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_sum: torch.Tensor,
    act_scale: torch.Tensor,
    act_zero_point: torch.Tensor,
    timestep_index: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    next_dilation: torch.Tensor,
    next_scale: torch.Tensor,
    next_zero_point: torch.Tensor,
    next_bits: int,
) -> torch.Tensor:
    """As ``reference.int4_linear_quantize``."""
    out_channels = next_dilation.numel()
    out = torch.empty(*x.shape[:-1], out_channels, dtype=torch.int8, device=x.device)
    op = "linear_geglu" if activation == "geglu" else "linear"
    config = launch_config(op, x.numel() // x.shape[-1], out_channels, x.shape[-1])
    gemm.launch(
        config, x, weight, weight_scale, weight_sum, act_scale, act_zero_point, timestep_index, bias, out,
        activation=activation, next_dilation=next_dilation, next_scale=next_scale, next_zero_point=next_zero_point,
        next_bits=next_bits,
    )  # fmt: skip
    return out
