"""Activation scales that are computed at run time, for models that were quantized without calibration.

A dynamic quantizer is an ordinary one with a table that is made for the call: a row for each sample.
"""

from __future__ import annotations

import torch

from dq_kernels.ops import Quantizer

LEAST_SCALE = 2.0**-126  # its inverse is finite


class LastQuantizer:
    """The quantizer of a layer's last int8 input in this thread; the product of that input needs it."""

    def __init__(self) -> None:
        self.quantizer: Quantizer | None = None


def dynamic_quantizer(x: torch.Tensor, dilation: torch.Tensor, bits: int) -> Quantizer:
    """The quantizer whose range is that of each sample, zero included. NaN and infinity make a sample's scale NaN.

    Args:
        x: [B, ..., K] float.
        dilation: [K] fp32.
    """
    rows = x.detach().unsqueeze(1).flatten(1, -2)  # [B, positions, K]
    least, most = (extreme.float() / dilation for extreme in torch.aminmax(rows, dim=1))
    low, high = least.amin(1).clamp(max=0), most.amax(1).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=LEAST_SCALE)
    scale = torch.where(scale.isfinite(), scale, torch.nan)
    lowest = -(2 ** (bits - 1))
    zero_point = (torch.nan_to_num(-low / scale) + 0.5).floor().clamp(0, 2**bits - 1).to(torch.int32) + lowest
    index = torch.arange(len(x), dtype=torch.int32, device=x.device)
    return Quantizer(dilation, scale, zero_point, index, bits)
