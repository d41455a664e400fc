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
from dq_runtime.calibration import ranks
from dq_runtime.calibration.batches import MixedBatches
from dq_runtime.calibration.collect import CalibrationSet, RecordedCall
from dq_runtime.calibration.replay import squared_error
from dq_runtime.calibration.simulated import simulated
from dq_runtime.config import DilateQuantConfig
from dq_runtime.timesteps import TimestepGrid

SAMPLES, BATCH_SIZE = 256, 16  # for the comparison
MEASURED_CALLS = 4  # for the signal-to-noise ratio
StateDicts = Mapping[str, Mapping[str, torch.Tensor]]


def prediction_errors(
    unet: Any,
    layers: Mapping[str, nn.Linear | nn.Conv2d],
    candidates: Sequence[StateDicts],
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
    batch_size = min(BATCH_SIZE, max(call.sample.shape[0] for call in calibration_set.calls))  # known to fit in memory
    batches = MixedBatches(calibration_set, min(SAMPLES, calibration_set.num_samples), batch_size, seed=0)
    calls = [batches[i] for i in batches.training]
    targets, *predictions = _predictions(unet, layers, candidates, sharing, calls, config)
    errors = []
    for outputs in predictions:
        # The division by its share makes a timestep's weight independent of how often it was drawn.
        weighted = [
            squared_error(y, target) * batches.importance(i) / batches.share(i)
            for i, y, target in zip(batches.training, outputs, targets, strict=True)
        ]
        errors.append(torch.cat(weighted).mean().item())
    return ranks.from_first(errors)  # so that all decide alike


def prediction_snr(
    unet: Any,
    layers: Mapping[str, nn.Linear | nn.Conv2d],
    tensors: StateDicts,
    sharing: Sequence[Sequence[str]],
    calibration_set: CalibrationSet,
    config: DilateQuantConfig,
) -> float:
    """Signal-to-noise ratio, in dB, of the quantized UNet's prediction: the mean over a few calibration calls."""
    calls = calibration_set.calls[:: -(-len(calibration_set.calls) // MEASURED_CALLS)]
    targets, outputs = _predictions(unet, layers, [tensors], sharing, calls, config)
    least = torch.finfo(torch.float32).tiny
    ratios = [
        target.float().square().flatten(1).mean(1).clamp(min=least) / squared_error(y, target).clamp(min=least)
        for y, target in zip(outputs, targets, strict=True)
    ]
    return float(10 * torch.cat(ratios).log10().mean())


@torch.no_grad()
def _predictions(
    unet: Any,
    layers: Mapping[str, nn.Linear | nn.Conv2d],
    candidates: Sequence[StateDicts],
    sharing: Sequence[Sequence[str]],
    calls: Sequence[RecordedCall],
    config: DilateQuantConfig,
) -> list[Sequence[torch.Tensor]]:
    """The floating-point predictions of the calls, and then those of each candidate. Ranks share the calls."""
    assert config.timesteps is not None
    grid, result = TimestepGrid(config.timesteps).to(unet.device), architecture_of(unet).result
    predictions = []
    for tensors, quantized in [(candidates[0], False), *((tensors, True) for tensors in candidates)]:
        with simulated(unet, layers, tensors, sharing, config, grid) as simulated_layers:
            for layer in simulated_layers.values():
                layer.quantized = quantized
            predictions.append(ranks.joined([result(call.run(unet)).cpu() for call in ranks.part(calls)]))
    return predictions
