"""Weight quantization: one symmetric scale per output channel, rounding to nearest or with error feedback."""

from __future__ import annotations

import logging

import torch
from torch import nn

from dq_kernels.ops import INT4_MAX, INT4_MIN, pack_int4

logger = logging.getLogger("dq_runtime")

CANDIDATES = 64
SMALLEST_CLIP = 0.4  # of the largest magnitude
DAMPING = (0.01, 0.1, 1.0, 10.0)  # of the second moments' mean, added to their diagonal; more where less fails
BLOCK = 64  # columns between two updates of all that are left
MAX_COLUMNS = 4608  # that share their errors: bounds the memory and time of error feedback in wide convolutions


def quantize_weight(weight: torch.Tensor, candidates: int = CANDIDATES) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds (dilated) weights to 4 bits, with the scale of least squared error.

    Args:
        weight: [N, ...] float.
        candidates: scales to try for each output channel.

    Returns:
        values [N, ...] int8 in [-8, 7], and weight_scale [N] fp32; their product approximates ``weight``.
    """
    rows = weight.detach().float().flatten(1)
    largest = rows.abs().amax(1, keepdim=True)
    rows = torch.where(largest > 0, rows / largest, 0.0)  # in [-1, 1], so that no square underflows
    best_clip, best_error = torch.ones_like(largest), torch.full_like(largest, torch.inf)
    for clip in torch.linspace(SMALLEST_CLIP, 1.0, candidates):
        scale = clip.to(rows) / INT4_MAX
        error = (_round(rows / scale) * scale - rows).square().sum(1, keepdim=True)
        best_clip = torch.where(error < best_error, clip.to(rows), best_clip)
        best_error = torch.minimum(error, best_error)
    weight_scale = (best_clip * largest / INT4_MAX).clamp(min=torch.finfo(torch.float32).tiny).flatten()
    return _round(rows / (best_clip / INT4_MAX)).to(torch.int8).view(weight.shape), weight_scale


@torch.no_grad()
def round_with_feedback(steps: torch.Tensor, second_moment: torch.Tensor) -> torch.Tensor:
    """Moves weights so that each one's rounding error is made up for by those that are rounded after it.

    Least squares in the layer's output, greedily, column by column, the column with the largest inputs first: Optimal
    Brain Quantization in the order of GPTQ (arXiv 2210.17323).

    Args:
        steps: [N, K] fp32, weights in steps of their scale.
        second_moment: [K, K] fp32, the sum of x x^T over the layer's inputs x (dilated and quantized).

    Returns:
        [N, K] fp32: each weight just before it was rounded; rounding them to nearest gives the result.

    Raises:
        ValueError: if the second moments are not finite.
    """
    if not bool(second_moment.isfinite().all()):
        raise ValueError("the inputs' second moments hold NaN or infinity")
    order = second_moment.diagonal().argsort(descending=True)
    left = steps[:, order].clone()
    moved = torch.empty_like(left)
    factor = _inverse_factor(second_moment[order][:, order])
    for start in range(0, left.shape[1], BLOCK):
        block = slice(start, start + BLOCK)
        triangle, columns, errors = factor[block, block], left[:, block], torch.empty_like(left[:, block])
        for j in range(columns.shape[1]):
            moved[:, start + j] = columns[:, j]
            errors[:, j] = (columns[:, j] - _round(columns[:, j])) / triangle[j, j]
            columns[:, j:] -= torch.outer(errors[:, j], triangle[j, j:])
        left[:, start + BLOCK :] -= errors @ factor[block, start + BLOCK :]
    return moved[:, order.argsort()]


def _inverse_factor(second_moment: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the damped matrix's inverse: row j says how column j's error spreads."""
    matrix = second_moment.double()
    mean = matrix.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    eye = torch.eye(len(matrix), device=matrix.device, dtype=torch.float64)
    for damping in DAMPING:
        factor, failed = torch.linalg.cholesky_ex(matrix + damping * mean * eye)
        if not failed:
            return torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True).float()
    raise ValueError("the inputs' second moments are no positive matrix")


def layer_tensors(
    layer: nn.Linear | nn.Conv2d,
    values: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_dilation: torch.Tensor,
    act_scale: torch.Tensor,
    act_zero_point: torch.Tensor,
    bias: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """The state dict of a packed layer (see ``QuantizedLayer``).

    Args:
        layer: the floating-point one, whose dtype the bias gets.
        values: [N, K] or [N, KH, KW, K] int8.
        bias: [N], or None.
    """
    tensors = {
        "weight": pack_int4(values.contiguous()),
        "weight_scale": weight_scale.clone(),
        "weight_sum": values.flatten(1).sum(1, dtype=torch.int32),
        "weight_dilation": weight_dilation.clone(),
        "act_scale": act_scale.clone(),
        "act_zero_point": act_zero_point.clone(),
    }
    if bias is not None:
        tensors["bias"] = bias.detach().to(layer.weight.dtype)
    return tensors


def _round(steps: torch.Tensor) -> torch.Tensor:
    return (steps + 0.5).floor_().clamp_(INT4_MIN, INT4_MAX)
