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
    largest = torch.where(largest > 0, largest, 1.0)
    best_scale, best_error = largest / INT4_MAX, torch.full_like(largest, torch.inf)
    for clip in torch.linspace(SMALLEST_CLIP, 1.0, CANDIDATES):
        scale = largest * clip / INT4_MAX
        error = (_round(rows, scale) * scale - rows).square().sum(1, keepdim=True)
        best_scale = torch.where(error < best_error, scale, best_scale)
        best_error = torch.minimum(error, best_error)
    return _round(rows, best_scale).to(torch.int8).view(weight.shape), best_scale.flatten()


def _round(rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.floor(rows / scale + 0.5).clamp_(INT4_MIN, INT4_MAX)
