"""Dilation: a factor per input channel that multiplies the weights and divides the activations.

The layer's result is unchanged. The factors change how much of their quantizers' ranges the channels use. Two rules:

- ``weight_dilation`` is DilateQuant's rule (arXiv 2409.14307). It stretches unsaturated input channels of the weights,
  in which no weight is the largest of its output channel. No weight range grows, and activation ranges only shrink.
- ``joint_dilation`` compares factors computed from the sizes of weights and activations, the rule above, and none.
  It takes the candidate with the least output error of the quantized layer on calibration data, where each timestep is
  weighted by its importance. A weight range may grow if activations gain more, and vice versa. The candidates include
  the exponents of SmoothQuant (arXiv 2211.10438) and AWQ (2306.00978). The best choice for each layer may not be the
  best for the whole model: see ``whole_unet``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dq_runtime.calibration.temporal import by_group, rounded, temporal_quantizer
from dq_runtime.weights import in_parts, quantize_dilated, shared_weight_dilation

# (a, b): s_k = (size of x_k)^a / (size of w_k)^b
EXPONENTS = ((0.0, 0.5), (0.0, 0.75), (0.25, 0.25), (0.25, 0.5), (0.5, 0.25), (0.5, 0.5))

# For the comparison of candidates: samples, and scales tried for each quantizer
VALUES_PER_TIMESTEP, LEAST_ROWS, SCALES = 2048, 8, 8


def joint_dilation(
    weights: Sequence[torch.Tensor],
    per_timestep: list[torch.Tensor],
    bits: int,
    max_dilation: float,
    importance: Sequence[float] | None = None,
    groups: Sequence[int] | None = None,
) -> torch.Tensor:
    """The candidate with the least squared error of the layers' outputs, weights and activations quantized.

    Args:
        weights: [N, K, ...] float, of layers that share their input.
        per_timestep: T tensors [rows, K], samples of that input. Each tap of a convolution is treated separately.
        bits: of the activations.
        max_dilation: upper bound of s; its inverse is the lower bound.
        importance: T factors of the squared errors (see ``timestep_importance``); equal by default.
        groups: index of the activation scale that each timestep uses; by default each has its own.

    Returns:
        [K] fp32.
    """
    factors = torch.tensor(importance or [1.0] * len(per_timestep), dtype=torch.float32, device=weights[0].device)
    groups = groups or range(len(per_timestep))
    few = max(LEAST_ROWS, VALUES_PER_TIMESTEP // weights[0].shape[1])
    some = [part[:few] for part in per_timestep]
    size_x = torch.cat(some).square().mean(0).sqrt()
    size_w = torch.stack([_rows(part).abs().amax(0) for weight in weights for part in in_parts(weight)]).amax(0)
    none = torch.ones_like(size_x)
    candidates = [none, shared_weight_dilation(weights, max_dilation)]
    candidates += [_from_sizes(size_x, size_w, a, b, max_dilation) for a, b in EXPONENTS]
    errors = _output_errors(weights, some, factors, groups, bits, candidates, SCALES)
    best = candidates[int(errors.argmin())]
    # The best of a few samples is used only if it beats no dilation on all samples.
    with_none, with_best = _output_errors(weights, per_timestep, factors, groups, bits, [none, best], 2 * SCALES)
    return best if bool(with_best < with_none) else none


def _from_sizes(size_x: torch.Tensor, size_w: torch.Tensor, a: float, b: float, max_dilation: float) -> torch.Tensor:
    """Factors from the sizes of inputs and weights, with median 1: only ratios of channels matter."""
    usable = (size_x > 0) & (size_w > 0)
    logarithm = torch.where(usable, a * size_x.log() - b * size_w.log(), 0.0)
    if not bool(usable.any()):
        return torch.ones_like(size_x)
    centred = torch.where(usable, logarithm - logarithm[usable].median(), 0.0)
    return centred.exp().clamp(1 / max_dilation, max_dilation)


def _output_errors(
    weights: Sequence[torch.Tensor],
    per_timestep: list[torch.Tensor],
    factors: torch.Tensor,
    groups: Sequence[int],
    bits: int,
    dilations: Sequence[torch.Tensor],
    scales: int,
) -> torch.Tensor:
    """The squared error of the layers' outputs with each dilation, weighted by the timesteps' factors.

    ``scales`` is the number of candidates in each quantizer's search.
    """
    x = torch.cat(per_timestep)
    rows = torch.tensor([len(part) for part in per_timestep], device=x.device)
    factor = factors.repeat_interleave(rows)[:, None]
    group = torch.tensor(list(groups), device=x.device).repeat_interleave(rows)
    inputs = by_group(per_timestep, groups)
    parts = [part for weight in weights for part in in_parts(weight)]
    expected = [x @ _rows(part).T for part in parts]
    errors = []
    for dilation in dilations:
        tables = temporal_quantizer(inputs, dilation, bits, scales)
        scale, zero_point = (table[group, None] for table in tables)
        quantized = rounded(x / dilation, scale, zero_point, bits)
        error = torch.zeros((), dtype=torch.float32, device=x.device)
        for part, y in zip(parts, expected, strict=True):
            values, weight_scale = quantize_dilated(part, dilation, scales)
            restored = values * weight_scale.view(-1, *[1] * (part.ndim - 1))
            error += ((quantized @ restored.flatten(0, -2).T - y).square() * factor).sum()
        errors.append(error)
    return torch.stack(errors)


def _rows(weight: torch.Tensor) -> torch.Tensor:
    """[N, K, ...] -> [N x taps, K] fp32."""
    return weight.detach().float().movedim(1, -1).flatten(0, -2)
