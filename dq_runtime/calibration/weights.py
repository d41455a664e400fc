"""Weight quantization: one symmetric scale per output channel, chosen for the least squared error."""

from __future__ import annotations

import torch

from dq_kernels.ops import INT4_MAX, INT4_MIN

CANDIDATES = 64
SMALLEST_CLIP = 0.4  # of the largest magnitude


def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds (dilated) weights to 4 bits.

    Args:
        weight: [N, ...] float.

    Returns:
        values [N, ...] int8 in [-8, 7], and weight_scale [N] fp32; their product approximates ``weight``.
    """
    rows = weight.detach().float().flatten(1)
    largest = rows.abs().amax(1, keepdim=True)
    rows = torch.where(largest > 0, rows / largest, 0.0)  # in [-1, 1], so that no square underflows
    best_clip, best_error = torch.ones_like(largest), torch.full_like(largest, torch.inf)
    for clip in torch.linspace(SMALLEST_CLIP, 1.0, CANDIDATES):
        scale = clip.to(rows) / INT4_MAX
        error = (_round(rows, scale) * scale - rows).square().sum(1, keepdim=True)
        best_clip = torch.where(error < best_error, clip.to(rows), best_clip)
        best_error = torch.minimum(error, best_error)
    weight_scale = (best_clip * largest / INT4_MAX).clamp(min=torch.finfo(torch.float32).tiny).flatten()
    return _round(rows, best_clip / INT4_MAX).to(torch.int8).view(weight.shape), weight_scale


def _round(rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.floor(rows / scale + 0.5).clamp_(INT4_MIN, INT4_MAX)
