"""Weight Dilation (DilateQuant, arXiv 2409.14307): stretch unsaturated input channels of the weights.

An input channel is unsaturated if none of its weights is the largest of its output channel. Multiplying it by s > 1
and dividing its activations by s leaves the layer's result and every weight range as they were, while the activations'
range can only shrink.
"""

from __future__ import annotations

import torch


def weight_dilation(weight: torch.Tensor, max_dilation: float) -> torch.Tensor:
    """The paper's rule: s_k = min over n and taps of max|w_n| / |w_nk|, at most ``max_dilation``.

    Args:
        weight: [N, K, ...] float. Layers that share their input share the element-wise minimum of their dilations.
        max_dilation: the largest s.

    Returns:
        [K] fp32, at least 1; exactly 1 for saturated channels and for channels whose weights are all zero.
    """
    magnitude = weight.detach().float().abs().reshape(*weight.shape[:2], -1)  # [N, K, taps]
    largest = magnitude.amax((1, 2))
    ratio = torch.where(magnitude > 0, largest[:, None, None] / magnitude, torch.inf)
    dilation = ratio.amin((0, 2))
    return torch.where(dilation.isfinite(), dilation, 1.0).clamp(1.0, max_dilation)
