"""Named groups of arguments that operators, layers and benchmarks pass as one.

Symbols: N output channels, K input channels (K' = K padded to even), T timestep groups, B samples.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

NOT_FINITE = -1  # in a timestep index, like all negatives: the sample had a NaN or an infinity, which int8 cannot hold


class Quantizer(NamedTuple):
    """The quantizer of one activation: q = clamp(floor(x / dilation_k / scale_t + 0.5) + zero_point_t).

    Attributes:
        dilation: [K] fp32, by which input channels are divided (Weight Dilation).
        scale: [T] fp32.
        zero_point: [T] int32.
        timestep_index: [B] int32, the row of ``scale`` and ``zero_point`` for each sample; clamped to [0, T - 1].
            Operators that quantize make it negative (see ``reference``), so a call of a model has one index.
        bits: 2 to 8; q lies in [-2^(bits-1), 2^(bits-1) - 1] and is stored as int8.
    """

    dilation: Tensor
    scale: Tensor
    zero_point: Tensor
    timestep_index: Tensor
    bits: int


class PackedWeight(NamedTuple):
    """An INT4 weight, symmetric, with one scale per output channel.

    Attributes:
        values: uint8 from ``packing.pack_int4``: [N, K'/2], or [N, KH, KW, K'/2] of a convolution.
        scale: [N] fp32.
        sum: [N] int32, the sum of each output channel's 4-bit values.
    """

    values: Tensor
    scale: Tensor
    sum: Tensor


class Norm(NamedTuple):
    """The parameters of a normalization.

    Attributes:
        weight, bias: [K] float, or None.
        eps: is added to the variance.
    """

    weight: Tensor | None
    bias: Tensor | None
    eps: float
