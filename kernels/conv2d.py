"""INT4 convolution on the GPU: ``gemm`` over the pixels of images that ``quantize`` has padded."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dq_kernels import gemm
from dq_kernels.gemm import STATISTICS_ROWS
from dq_kernels.tuning import launch_config


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
    skip: torch.Tensor | None,
    skip_weight: torch.Tensor | None,
    skip_weight_sum: torch.Tensor | None,
    skip_act_scale: torch.Tensor | None,
    skip_act_zero_point: torch.Tensor | None,
    stride: tuple[int, int],
    dilation: tuple[int, int],
    upsample: bool,
    out_dtype: torch.dtype,
    with_statistics: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``reference.int4_conv2d``."""
    batch, out_channels, kernel_size = x.shape[0], weight.shape[0], (weight.shape[1], weight.shape[2])
    size = conv2d_output_size(x.shape[1:3], kernel_size, stride, dilation, upsample)
    out = torch.empty(batch, *size, out_channels, dtype=out_dtype, device=x.device)
    statistics = torch.empty(
        statistics_shape(batch, size, out_channels, with_statistics), dtype=torch.float32, device=x.device
    )
    config = launch_config(
        gemm_name(kernel_size, stride), batch * size[0] * size[1], out_channels, weight.numel() // out_channels * 2
    )
    gemm.launch(
        config.with_whole_runs(STATISTICS_ROWS) if with_statistics else config,
        x, weight, weight_scale, weight_sum, act_scale, act_zero_point, timestep_index, bias, out,
        channel_add=channel_add, residual=residual, skip=skip, skip_weight=skip_weight,
        skip_weight_sum=skip_weight_sum, skip_act_scale=skip_act_scale, skip_act_zero_point=skip_act_zero_point,
        statistics=statistics if with_statistics else None, kernel_size=kernel_size, stride=stride, dilation=dilation,
        upsample=upsample,
    )  # fmt: skip
    return out, statistics


def gemm_name(kernel_size: tuple[int, int], stride: tuple[int, int]) -> str:
    """Under which operator a convolution is tuned: one of single pixels is a linear layer."""
    return "linear" if (*kernel_size, *stride) == (1, 1, 1, 1) else "conv2d"


def conv2d_output_size(
    padded_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    upsample: bool,
) -> tuple[int, int]:
    """Height and width of the result for a padded image (torch.nn.Conv2d's formula); twice the image's if upsampled."""
    if upsample:
        return 2 * (padded_size[0] - 2), 2 * (padded_size[1] - 2)
    height, width = ((padded_size[i] - dilation[i] * (kernel_size[i] - 1) - 1) // stride[i] + 1 for i in range(2))
    return height, width


def statistics_shape(batch: int, size: Sequence[int], channels: int, wanted: bool) -> tuple[int, int, int, int]:
    """[B, pixels / STATISTICS_ROWS, 2, N], or nothing at all."""
    return (batch, size[0] * size[1] // STATISTICS_ROWS, 2, channels) if wanted else (0, 0, 2, channels)
