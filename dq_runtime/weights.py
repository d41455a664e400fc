"""Weight quantization without data: DilateQuant's dilation, one scale per output channel, rounding to nearest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from dq_kernels.ops import INT4_MAX, INT4_MIN, pack_int4

CANDIDATES = 64
SMALLEST_CLIP = 0.4  # relative to the largest magnitude
VALUES_AT_ONCE = 2**18  # of which there are copies in fp32 at a time; these fit into a processor's cache


def weight_dilation(weight: torch.Tensor, max_dilation: float) -> torch.Tensor:
    """DilateQuant's rule: s_k = min over n and taps of max|w_n| / |w_nk|, at most ``max_dilation``.

    Args:
        weight: [N, K, ...] float. Layers that share their input use the element-wise minimum of their dilations.
        max_dilation: the largest s.

    Returns:
        [K] fp32, at least 1; exactly 1 for saturated channels and for channels whose weights are all zero.
    """
    dilation = torch.full(weight.shape[1:2], torch.inf, dtype=torch.float32, device=weight.device)
    for rows in in_parts(weight):
        magnitude = rows.float().abs().reshape(*rows.shape[:2], -1)  # [rows, K, taps]
        largest = magnitude.amax((1, 2))
        ratio = torch.where(magnitude > 0, largest[:, None, None] / magnitude, torch.inf)
        dilation = torch.minimum(dilation, ratio.amin((0, 2)))
    return torch.where(dilation.isfinite(), dilation, 1.0).clamp(1.0, max_dilation)


def shared_weight_dilation(weights: Sequence[torch.Tensor], max_dilation: float) -> torch.Tensor:
    """DilateQuant's rule for layers that share their input."""
    return torch.stack([weight_dilation(weight, max_dilation) for weight in weights]).amin(0)


def in_parts(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """Some output channels of a weight [N, ...] after the others, so that copies of a large one are never whole."""
    yield from weight.detach().split(max(1, VALUES_AT_ONCE // max(1, weight[0].numel())))


def quantize_dilated(
    weight: torch.Tensor, dilation: torch.Tensor, candidates: int = CANDIDATES
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dilates a layer's weights and rounds them (see ``quantize_weight``), a part of them at a time.

    Args:
        weight: [N, K, ...] float.
        dilation: [K] fp32.

    Returns:
        values [N, ..., K] int8, and weight_scale [N] fp32.
    """
    parts = [quantize_weight(rows.float().movedim(1, -1) * dilation, candidates) for rows in in_parts(weight)]
    values, scales = zip(*parts, strict=True)
    return torch.cat(values), torch.cat(scales)


def quantize_weight(weight: torch.Tensor, candidates: int = CANDIDATES) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds (dilated) weights to 4 bits, with the scale of least squared error.

    Args:
        weight: [N, ...] float; there are several copies of it in fp32 during the search.
        candidates: number of scales tried for each output channel; with one, the largest magnitude becomes 7.

    Returns:
        values [N, ...] int8 in [-8, 7], and weight_scale [N] fp32; their product approximates ``weight``.
    """
    rows = weight.detach().float().flatten(1)
    largest = rows.abs().amax(1, keepdim=True)
    rows = torch.where(largest > 0, rows / largest, 0.0)  # in [-1, 1], so that no square underflows
    best_clip, best_error = torch.ones_like(largest), torch.full_like(largest, torch.inf)
    clips = torch.linspace(1.0, SMALLEST_CLIP, candidates, dtype=torch.float32)[:, None, None].to(rows.device)
    at_once = max(1, VALUES_AT_ONCE // max(1, rows.numel()))
    # Changed in place: allocation would take longer than the arithmetic.
    steps = torch.empty(min(at_once, candidates), *rows.shape, dtype=torch.float32, device=rows.device)
    for some in clips.split(at_once):
        scale = some / INT4_MAX
        rounded = torch.div(rows, scale, out=steps[: len(some)]).add_(0.5).floor_().clamp_(INT4_MIN, INT4_MAX)
        error, best = rounded.mul_(scale).sub_(rows).square_().sum(2, keepdim=True).min(0)
        best_clip = torch.where(error < best_error, some.take(best), best_clip)
        best_error = torch.minimum(error, best_error)
    weight_scale = (best_clip * largest / INT4_MAX).clamp(min=torch.finfo(torch.float32).tiny).flatten()
    return round_to_int4(rows / (best_clip / INT4_MAX)).to(torch.int8).view(weight.shape), weight_scale


def layer_tensors(
    layer: nn.Linear | nn.Conv2d,
    values: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_dilation: torch.Tensor,
    act_scale: torch.Tensor | None,
    act_zero_point: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """The state dict of a packed layer (see ``QuantizedLayer``).

    Args:
        layer: the floating-point layer. The bias gets its dtype.
        values: [N, K] or [N, KH, KW, K] int8.
        bias: [N], or None.
    """
    tensors = {
        "packed_weight": pack_int4(values.contiguous()),
        "weight_scale": weight_scale.clone(),
        "weight_sum": values.flatten(1).sum(1, dtype=torch.int32),
        "weight_dilation": weight_dilation.clone(),
    }
    if act_scale is not None and act_zero_point is not None:  # else they are computed at run time
        tensors |= {"act_scale": act_scale.clone(), "act_zero_point": act_zero_point.clone()}
    if bias is not None:
        tensors["bias"] = bias.detach().to(layer.weight.dtype)
    return tensors


def round_to_int4(steps: torch.Tensor) -> torch.Tensor:
    """Rounds weights in steps of their scale to the nearest 4-bit values, as floats, out of place."""
    return (steps + 0.5).floor_().clamp_(INT4_MIN, INT4_MAX)
