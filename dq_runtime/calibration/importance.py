"""How much the model's error at each timestep changes the image.

A sampler integrates x / sqrt(ᾱ) over the noise level σ = sqrt((1 - ᾱ) / ᾱ). Its derivative is the predicted noise, so
an error e of that noise changes the result of a step from σ to σ' by (σ - σ') e. The remaining steps shrink this: if
images were normal with unit variance, the steps from σ' down to 0 would divide it by sqrt(1 + σ'²). The importance of a
timestep is the square of both factors: the squared error of the image for a squared error of 1 in the prediction.

In flow matching x = (1 - σ) x0 + σ ε is integrated over σ itself, and its derivative is predicted. Here the steps from
σ' down to 0 divide an error by sqrt((1 - σ')² + σ'²).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

SMALLEST_ALPHA = 2.0**-24  # keeps the noise level finite if the schedule ends in pure noise
SMALLEST_IMPORTANCE = 1e-9  # relative to the largest: every timestep counts


def timestep_importance(scheduler: Any, timesteps: Sequence[float]) -> list[float]:
    """The squared error of the image that a squared error of 1 in the prediction causes, for each timestep.

    Args:
        scheduler: the sampling scheduler. If it has no ``alphas_cumprod`` or does not sample with them (None, flow
            sigmas), diffusers' default noise schedule is used: an approximate schedule is better than none.
        timesteps: those of a sampling run, sorted, in the unit of the model's timestep argument. In flow matching
            that is σ, or σ times the scheduler's number of training timesteps.

    Returns:
        a positive number for each timestep; all 1 if the timesteps are not positions in a noise schedule.
    """
    if isinstance(scheduler, (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler)):
        return _flow_importance(scheduler, timesteps)
    if not _has_noise_schedule(scheduler):
        scheduler = DDPMScheduler()
    alphas = torch.as_tensor(scheduler.alphas_cumprod).double().cpu().clamp(SMALLEST_ALPHA, 1 - SMALLEST_ALPHA).numpy()
    if timesteps[0] < 0 or timesteps[-1] > len(alphas) - 1:
        return [1.0] * len(timesteps)
    levels = np.exp(np.interp(timesteps, np.arange(len(alphas)), 0.5 * np.log((1 - alphas) / alphas)))
    importance = [
        (level - following) ** 2 / (1 + following**2) * _noise_per_prediction(scheduler, level)
        for following, level in itertools.pairwise([0.0, *levels])
    ]
    return _at_least_smallest(importance)


def _flow_importance(scheduler: Any, timesteps: Sequence[float]) -> list[float]:
    unit = 1 if timesteps[-1] <= 1 else scheduler.config.num_train_timesteps
    levels = [timestep / unit for timestep in timesteps]
    if levels[0] < 0 or levels[-1] > 1 or scheduler.config.get("invert_sigmas"):
        return [1.0] * len(timesteps)
    return _at_least_smallest(
        [
            (level - following) ** 2 / ((1 - following) ** 2 + following**2)
            for following, level in itertools.pairwise([0.0, *levels])
        ]
    )


def _at_least_smallest(importance: Sequence[float]) -> list[float]:
    smallest = SMALLEST_IMPORTANCE * float(max(importance)) or 1.0  # equal values if all are zero
    return [max(float(value), smallest) for value in importance]


def _has_noise_schedule(scheduler: Any) -> bool:
    if getattr(scheduler, "alphas_cumprod", None) is None:
        return False
    config = scheduler.config
    return not (config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction")


def _noise_per_prediction(scheduler: Any, level: float) -> float:
    """The squared error of the noise for a squared error of 1 in the UNet's prediction."""
    prediction_type = scheduler.config.get("prediction_type", "epsilon")
    if prediction_type == "v_prediction":
        return 1 / (1 + level**2)
    return 1 / level**2 if prediction_type == "sample" else 1.0
