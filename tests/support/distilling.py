"""Distilling tiny UNets: what the tests of distillation and those of its interruption share."""

import copy
from types import SimpleNamespace

import numpy as np
import tiny_unets
import torch
from diffusers import UNet2DConditionModel

from dq_runtime import Distillation, QuantConv2d, QuantLinear, calibrate, record

TIMESTEPS = (10, 500, 900)
# A noise schedule in which these three matter about the same: each level lies far above the one before.
_LEVELS = np.exp(np.interp(np.arange(1000), TIMESTEPS, np.log([1e-3, 3e-2, 0.9])))
EQUAL = SimpleNamespace(alphas_cumprod=1 / (1 + _LEVELS**2), config={"prediction_type": "sample"})
SMALL = {"samples": 24, "batch_size": 6, "iterations": 2, "error_feedback": True, "polish_iterations": 0}
UNTRAINED = {**SMALL, "iterations": 0, "error_feedback": False}


NARROW = {"block_out_channels": (16, 32), "norm_num_groups": 4}


def unet2d(**arguments):
    return tiny_unets.unet2d(**NARROW | arguments)


def unet2d_condition(**arguments):
    return tiny_unets.unet2d_condition(**NARROW | {"cross_attention_dim": 12} | arguments)


@torch.no_grad()
def recorded(unet, rows=8, timesteps=TIMESTEPS, scheduler=EQUAL, **arguments):
    """A call for each timestep, of samples whose size falls with it."""
    generator = torch.Generator().manual_seed(1)
    with record(unet, scheduler) as calibration_set:
        for timestep in timesteps:
            sample = torch.randn(rows, unet.config.in_channels, 8, 8, generator=generator) * (0.5 + timestep / 900)
            if isinstance(unet, UNet2DConditionModel):
                arguments["encoder_hidden_states"] = torch.randn(rows, 5, 12, generator=generator).to(unet.dtype)
            unet(sample.to(unet.dtype), timestep, **arguments)
    return calibration_set


def distilled(unet, calibration_set, config=None, **settings):
    """A quantized copy of the UNet."""
    return calibrate(copy.deepcopy(unet), calibration_set, config, Distillation(**SMALL | settings))


@torch.no_grad()
def output_error(quantized, unet, calibration_set):
    """Relative squared error on what was recorded."""
    error = total = 0.0
    for call in calibration_set.calls:
        expected = call.run(unet).sample.double()
        error += (call.run(quantized).sample.double() - expected).square().sum().item()
        total += expected.square().sum().item()
    return error / total


def quantized_layers(unet):
    return {name: module for name, module in unet.named_modules() if isinstance(module, (QuantLinear, QuantConv2d))}


def assert_same_state(actual, expected):
    actual, expected = actual.state_dict(), expected.state_dict()
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def snapshot(unet):
    modules = [(name, id(module), module.training) for name, module in unet.named_modules()]
    parameters = [(name, id(parameter), parameter.requires_grad) for name, parameter in unet.named_parameters()]
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in unet.modules()]
    return modules, parameters, hooks, dict(unet.config), copy.deepcopy(unet)


def assert_unchanged(unet, before):
    assert snapshot(unet)[:-1] == before[:-1]
    assert_same_state(unet, before[-1])


class Subject:
    """A UNet, its calibration set, and what comes of them without and with distillation."""

    def __init__(self, unet, config):
        self.unet, self.config = unet, config
        self.calibration_set = recorded(unet)
        self.rounded = calibrate(copy.deepcopy(unet), self.calibration_set, config, distillation=None)
        self.distilled = self.distil()

    def distil(self, config=None, **settings):
        return distilled(self.unet, self.calibration_set, config or self.config, **settings)

    def error(self, quantized):
        return output_error(quantized, self.unet, self.calibration_set)


FEW_BLOCKS = {"dilation": "weight", "modules_to_not_convert": ["conv_in", "conv_out", "mid_block", "up_blocks"]}


def messages(log, level):
    return [entry.getMessage() for entry in log.records if entry.levelno == level]


def interrupt(monkeypatch, owner, name, at):
    """Makes the ``at``-th call of a method, counted from 0, a Ctrl-C; returns the arguments of all calls."""
    original, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(args)
        if len(calls) == at + 1:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return calls
