"""What the whole UNet predicts once it is quantized, beside what it predicts in floating point.

What is best for each layer by itself need not be best for all of them together: errors of one layer pass through the
others, and some of them add up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dq_runtime.calibration.batches import MixedBatches
from dq_runtime.calibration.collect import CalibrationSet
from dq_runtime.calibration.replay import result_tensor, squared_error
from dq_runtime.calibration.simulated import simulated
from dq_runtime.config import DilateQuantConfig
from dq_runtime.timesteps import TimestepGrid

SAMPLES, BATCH_SIZE = 256, 16  # to judge by


@torch.no_grad()
def prediction_errors(
    unet: Any,
    layers: Mapping[str, nn.Linear | nn.Conv2d],
    candidates: Sequence[Mapping[str, Mapping[str, torch.Tensor]]],
    sharing: Sequence[Sequence[str]],
    calibration_set: CalibrationSet,
    config: DilateQuantConfig,
) -> list[float]:
    """The mean squared error of the prediction with each of several quantizations of one floating-point UNet.

    Each timestep counts by what it does to the image (see ``timestep_importance``).

    Args:
        layers: those to be quantized.
        candidates: for each layer its state dict (see ``QuantizedLayer``).
        sharing: names of layers, each group seeing one tensor and sharing one input quantizer.
        config: with ``timesteps``.
    """
    assert config.timesteps is not None
    grid = TimestepGrid(config.timesteps).to(unet.device)
    batches = MixedBatches(calibration_set, min(SAMPLES, calibration_set.num_samples), BATCH_SIZE, seed=0)
    targets: list[torch.Tensor] = []
    errors = []
    for tensors in candidates:
        with simulated(unet, layers, tensors, sharing, config, grid) as stand_ins:
            targets = targets or [result_tensor(batches[i].run(unet)).cpu() for i in batches.training]
            for layer in stand_ins.values():
                layer.quantized = True
            weighted = [
                squared_error(result_tensor(batches[i].run(unet)), target).cpu()
                * batches.importance(i)
                / batches.share(i)  # however often a timestep is drawn
                for i, target in zip(batches.training, targets, strict=True)
            ]
        errors.append(torch.cat(weighted).mean().item())
    return errors
