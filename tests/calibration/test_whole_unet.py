"""What a quantized UNet predicts decides whether it is dilated at all."""

import copy
import importlib
import math

import pytest
import torch
from distilling import FEW_BLOCKS
from tiny_unets import unet2d

import dq_runtime
from dq_runtime import DilateQuantConfig, QuantConv2d, QuantLinear, calibrate, record
from dq_runtime.calibration.importance import timestep_importance

TIMESTEPS = [20.0, 400.0, 950.0]
module = importlib.import_module("dq_runtime.calibration.calibrate")  # the package has a function of that name


@pytest.fixture(scope="module")
def stock():
    return unet2d()


@pytest.fixture(scope="module")
def calibration_set(stock):
    """One sample of each timestep."""
    with record(stock) as calls, torch.no_grad():
        for seed, timestep in enumerate(TIMESTEPS):
            stock(torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed)), timestep)
    return calls


def calibrated(stock, calibration_set, dilation="joint", distillation=None, **options):
    config = DilateQuantConfig(activation_bits=4, **{**FEW_BLOCKS, "dilation": dilation, **options})
    return calibrate(copy.deepcopy(stock), calibration_set, config, distillation)


def image_error(quantized, stock, calibration_set):
    """What the packed UNet's errors do to the image: by the timesteps' importance."""
    importance = timestep_importance(calibration_set.scheduler, TIMESTEPS)
    errors = [(call.run(quantized).sample - call.run(stock).sample).square().mean() for call in calibration_set.calls]
    return sum(factor * error for factor, error in zip(importance, errors, strict=True)).item()


def dilations(unet):
    layers = [layer for layer in unet.modules() if isinstance(layer, (QuantLinear, QuantConv2d))]
    return torch.cat([layer.weight_dilation for layer in layers])


@pytest.mark.parametrize("timestep_groups", [None, 2])
def test_the_errors_are_those_of_the_packed_unets(stock, calibration_set, monkeypatch, timestep_groups):
    """Of more than one batch, no larger than what was recorded."""
    seen = []

    def noting(*args):
        seen.extend(original(*args))
        return seen

    original = module.prediction_errors
    monkeypatch.setattr(module, "prediction_errors", noting)
    sizes = []
    handle = stock.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(kwargs["sample"])), with_kwargs=True
    )
    chosen = calibrated(stock, calibration_set, timestep_groups=timestep_groups)
    without = calibrated(stock, calibration_set, "none", timestep_groups=timestep_groups)
    handle.remove()

    assert len(seen) == 2
    assert set(sizes) == {1}
    assert seen[1] == pytest.approx(image_error(without, stock, calibration_set), rel=1e-3)
    dilated = not torch.equal(dilations(chosen), dilations(without))
    assert seen[0 if dilated else 1] == pytest.approx(image_error(chosen, stock, calibration_set), rel=1e-3)


def test_dilation_that_harms_the_whole_unet_is_left_out(stock, calibration_set, monkeypatch, log):
    """Were each layer's choice a bad one, every layer would do without."""
    monkeypatch.setattr(module, "joint_dilation", lambda weights, *_: 8 ** torch.linspace(-1, 1, weights[0].shape[1]))
    chosen, without = (calibrated(stock, calibration_set, dilation) for dilation in ("joint", "none"))

    assert "Not dilated" in log.text
    expected = without.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in chosen.state_dict().items())


@pytest.mark.parametrize(("errors", "stays"), [([1.0, 1.1], True), ([1.0, 1.01], False), ([math.nan, 1.0], False)])
def test_dilation_that_clearly_helps_the_whole_unet_stays(errors, stays, stock, calibration_set, monkeypatch, log):
    monkeypatch.setattr(module, "prediction_errors", lambda *_: errors)
    dilation = dilations(calibrated(stock, calibration_set))

    assert bool(dilation.min() < 1 < dilation.max()) == stays
    assert ("Not dilated" in log.text) != stays


@pytest.mark.parametrize("options", [{"dilation": "weight"}, {"distillation": dq_runtime.Distillation(4, 2, 0)}])
def test_where_a_rule_was_asked_for_or_training_follows_nothing_is_compared(
    stock, calibration_set, monkeypatch, options
):
    monkeypatch.setattr(module, "prediction_errors", lambda *_: pytest.fail("compared"))

    assert dilations(calibrated(stock, calibration_set, **options)).max() > 1


def test_the_unet_that_is_compared_is_the_users_own_again(stock, calibration_set, monkeypatch):
    """Also where comparing fails."""
    unet = copy.deepcopy(stock).train()
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}

    def broken(*_):
        raise MemoryError

    monkeypatch.setattr("dq_runtime.calibration.whole_unet.squared_error", broken)
    with pytest.raises(MemoryError):
        calibrate(unet, calibration_set, distillation=None)

    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())
    assert all(module.training for module in unet.modules())
    assert all(parameter.requires_grad for parameter in unet.parameters())
    assert not unet._forward_pre_hooks


def test_the_joint_rule_is_told_how_much_timesteps_matter_and_which_share_a_scale(stock, calibration_set, monkeypatch):
    told = []

    def noting(weights, per_timestep, bits, max_dilation, importance, groups):
        told.append((len(per_timestep), list(importance), list(groups)))
        return torch.ones(weights[0].shape[1])

    monkeypatch.setattr(module, "joint_dilation", noting)
    calibrated(stock, calibration_set, timestep_groups=2)

    importance = timestep_importance(calibration_set.scheduler, TIMESTEPS)
    assert told
    assert all(what == (3, importance, [0, 0, 1]) for what in told)
