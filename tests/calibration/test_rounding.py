"""Calibration and training round activations to the integers that the operators compute.

``kernels/reference.py`` defines the formula. The search for ranges and the training multiply in another order, so
values within fp32's error of a half step are left out.
"""

import pytest
import torch

from dq_kernels import reference
from dq_kernels.ops import Quantizer
from dq_runtime.calibration.simulated import InputQuantizer
from dq_runtime.calibration.temporal import rounded
from dq_runtime.timesteps import TimestepGrid

SCALE, ZERO_POINT = torch.tensor([0.011, 0.3, 0.07]), torch.tensor([-5, 6, 0], dtype=torch.int32)
SAMPLES, CHANNELS = 3, 64


def quantizer(dilation, bits):
    return Quantizer(dilation, SCALE, ZERO_POINT, torch.tensor([1, 2, 0], dtype=torch.int32), bits)


def activations(dilation):
    """Values inside and outside of every range, none near the middle between two steps."""
    x = torch.randn(SAMPLES, 500, CHANNELS, generator=torch.Generator().manual_seed(0)) * 5
    steps = x.double() / dilation / SCALE[[1, 2, 0]].view(-1, 1, 1)
    return torch.where(((steps - steps.floor()) - 0.5).abs() < 1e-4, 0.0, x)


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_training_rounds_to_the_integers_of_the_operators(bits):
    dilation = torch.linspace(1, 4, CHANNELS)
    x, expected = activations(dilation), quantizer(dilation, bits)
    grid = TimestepGrid([0.0, 10.0, 20.0])
    grid.index = expected.timestep_index
    tensors = {"weight_dilation": dilation, "act_scale": SCALE, "act_zero_point": ZERO_POINT}

    y = InputQuantizer(tensors, bits, grid)(x, channel_dim=-1)

    rows = expected.timestep_index.long()
    integers = (y / SCALE[rows].view(-1, 1, 1)).round() + ZERO_POINT[rows].view(-1, 1, 1)
    assert torch.equal(integers.to(torch.int8), reference.quantize(x, expected))
    assert integers.unique().numel() == 2**bits


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_the_search_for_ranges_rounds_to_the_integers_of_the_operators(bits):
    dilation = torch.ones(CHANNELS)
    x, expected = activations(dilation), quantizer(dilation, bits)
    rows = expected.timestep_index.long()
    scale, zero_point = SCALE[rows].view(-1, 1, 1), ZERO_POINT[rows].view(-1, 1, 1)

    integers = (rounded(x, scale, zero_point, bits) / scale).round() + zero_point

    assert torch.equal(integers.to(torch.int8), reference.quantize(x, expected))
