"""Shapes and limits of the operators' arguments and results, for every backend."""

from __future__ import annotations

from collections.abc import Sequence

STATISTICS_ROWS = 64  # pixels for which the group norm's statistics have one entry
BLOCK_KEYS = 64  # keys, or values, of int8 attention that share a scale
FEW_KEYS = 2 * BLOCK_KEYS  # beyond these, a launch of its own prepares keys and values of int8 attention
MAX_HEAD_CHANNELS = 128  # of int8 attention
MAX_FLOAT_KEYS, MAX_FLOAT_HEAD_CHANNELS = 128, 256  # of attention in floating point
MAX_LAYER_NORM_CHANNELS = 8192  # one program holds a row
# 16 q_w (q_x - zero_point) is at most 16 * 8 * 255 in magnitude; int32 holds so many products of one sum.
MAX_REDUCTION = (2**31 - 1) // (16 * 8 * 255)


def quantized_shape(shape: Sequence[int], padding: Sequence[int]) -> list[int]:
    """[B, ..., K padded to even]; an image [B, H, W, K] gets its borders."""
    size = list(shape)
    size[-1] += size[-1] % 2
    if any(padding):
        size[1] += 2 * padding[0]
        size[2] += 2 * padding[1]
    return size


def conv2d_output_size(
    padded_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    upsample: bool,
) -> tuple[int, int]:
    """Height and width of the result for a padded image (torch.nn.Conv2d's formula); upsampled: twice the image's."""
    if upsample:
        return 2 * (padded_size[0] - 2), 2 * (padded_size[1] - 2)
    height, width = ((padded_size[i] - dilation[i] * (kernel_size[i] - 1) - 1) // stride[i] + 1 for i in range(2))
    return height, width


def statistics_shape(batch: int, size: Sequence[int], channels: int, wanted: bool) -> tuple[int, int, int, int]:
    """[B, pixels / STATISTICS_ROWS, 2, N]; without elements if no statistics are wanted."""
    return (batch, size[0] * size[1] // STATISTICS_ROWS, 2, channels) if wanted else (0, 0, 2, channels)
