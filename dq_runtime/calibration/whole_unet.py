"""The prediction error of the whole UNet for several quantizations of its layers.

The best quantization of each layer may not be the best for the whole UNet: errors of one layer pass through the other
layers, and some of them add up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dq_runtime.architectures.supported import architecture_of
from dq_runtime.calibration.batches import MixedBatches
from dq_runtime.calibration.collect import CalibrationSet
from dq_runtime.calibration.replay import squared_error
from dq_runtime.calibration.simulated import simulated
from dq_runtime.config import DilateQuantConfig
from dq_runtime.timesteps import TimestepGrid

SAMPLES, BATCH_SIZE = 256, 16  # for the comparison


@torch.no_grad()
def prediction_errors(
    unet: Any,
    layers: Mapping[str, nn.Linear | nn.Conv2d],
    candidates: Sequence[Mapping[str, Mapping[str, torch.Tensor]]],
    sharing: Sequence[Sequence[str]],
    calibration_set: CalibrationSet,
    config: DilateQuantConfig,
) -> list[float]:
    """The image error that each of several quantizations of one floating-point UNet causes.

    Args:
        layers: the layers to quantize.
        candidates: the layers' state dicts in each quantization (see ``QuantizedLayer``).
        sharing: groups of layer names. The layers of a group share their input and one input quantizer.
        config: with ``timesteps``.

    Returns:
        for each candidate, the sum over all calibrated timesteps of the prediction's mean squared error times the
        timestep's importance (see ``timestep_importance``).
    """
    assert config.timesteps is not None
    grid, result = TimestepGrid(config.timesteps).to(unet.device), architecture_of(unet).result
    samples = min(SAMPLES, calibration_set.num_samples)
    batch_size = min(BATCH_SIZE, max(call.sample.shape[0] for call in calibration_set.calls))  # known to fit in memory
    batches = MixedBatches(calibration_set, samples, batch_size, seed=0)

    def predictions(tensors: Mapping[str, Mapping[str, torch.Tensor]], quantized: bool) -> list[torch.Tensor]:
        with simulated(unet, layers, tensors, sharing, config, grid) as simulated_layers:
            for layer in simulated_layers.values():
                layer.quantized = quantized
            return [result(batches[i].run(unet)).cpu() for i in batches.training]

    targets = predictions(candidates[0], quantized=False)
    errors = []
    for tensors in candidates:
        outputs = zip(batches.training, predictions(tensors, quantized=True), targets, strict=True)
        # The division by its share makes a timestep's weight independent of how often it was drawn.
        weighted = [squared_error(y, target) * batches.importance(i) / batches.share(i) for i, y, target in outputs]
        errors.append(torch.cat(weighted).mean().item())
    return errors
