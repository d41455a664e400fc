"""Sampling with a quantized UNet: every sample uses its own timestep's row, in any order of a scheduler's calls.

The oracle is the same UNet with plain float layers that round their input and their weight, and that find the row by a
search in Python.
"""

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler
from torch import nn

from dq_runtime.layers import quantized_layers

STEPS = 6
# Given one input, a layer and its oracle differ by fp32's rounding alone.
LAYER_TOLERANCE = 1e-6
# Over a whole UNet that rounding now and then puts an activation on the other side of a quantizer's step, and all that
# follows is rounded otherwise: two runs then differ by as much as the quantizer's own error, 0.027 at most here. A
# wrong row, which clips at 2.5 times the value or at 0.4 of it, costs 0.14 and more.
TOLERANCE = 0.05


def nearest_rows(unet, timestep, batch_size):
    """The row of each sample in plain Python: smallest distance, then smaller timestep."""
    grid = unet.config.quantization_config.timesteps
    timesteps = torch.as_tensor(timestep).reshape(-1).expand(batch_size).tolist()
    return [min(range(len(grid)), key=lambda row: (abs(grid[row] - t), row)) for t in timesteps]


class FakeQuantizedLayer(nn.Module):
    """A quantized layer in float arithmetic; ``oracle`` knows the rows."""

    def __init__(self, layer, oracle, fake_quantized):
        super().__init__()
        self.layer, self.rows, self.fake_quantized = [layer], oracle.rows, fake_quantized

    def forward(self, x):
        return self.fake_quantized(self.layer[0], x, self.rows).to(x.dtype)


class Oracle:
    """Called like the UNet that it is made from; ``wrong_by`` rows, to show that a wrong one would be noticed."""

    def __init__(self, unet, fake_quantized, wrong_by=0):
        self.rows, self.wrong_by = [], wrong_by
        for name, layer in quantized_layers(unet).items():
            parent, _, child = name.rpartition(".")
            setattr(unet.get_submodule(parent), child, FakeQuantizedLayer(layer, self, fake_quantized))
        for hook in unet.timestep_grid.hooks:
            hook.remove()
        self.unet = unet

    def __call__(self, sample, timestep, **arguments):
        num_rows = len(self.unet.config.quantization_config.timesteps)
        rows = nearest_rows(self.unet, timestep, sample.shape[0])
        self.rows[:] = [(row + self.wrong_by) % num_rows for row in rows]
        return self.unet(sample, timestep, **arguments)


@pytest.fixture
def oracle(subject, fake_quantized):
    return Oracle(subject.copy(), fake_quantized)


@pytest.fixture
def checked(subject, fake_quantized, relative_rms):
    """The quantized UNet, whose every layer is compared with the oracle at every call; and the list of those checks."""
    unet, rows, checks = subject.copy(), [], []

    def find_rows(unet, args):
        sample, timestep = args
        rows[:] = nearest_rows(unet, timestep, sample.shape[0])

    def check(layer, args, y):
        assert relative_rms(y, fake_quantized(layer, args[0], rows).float()) < LAYER_TOLERANCE, (layer.name, rows)
        checks.append(layer.name)

    unet.register_forward_pre_hook(find_rows)
    for layer in quantized_layers(unet).values():
        layer.register_forward_hook(check)
    return unet, checks


def draw(unet, scheduler, subject, timesteps=None):
    """A whole trajectory; with ``timesteps``, only over those, as image-to-image pipelines do."""
    sample = subject.sample * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps if timesteps is None else timesteps:
        prediction = unet(scheduler.scale_model_input(sample, timestep), timestep, **subject.arguments).sample
        sample = scheduler.step(prediction, timestep, sample).prev_sample
    return sample


def ddim():
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(STEPS)
    return scheduler


def euler():
    scheduler = EulerDiscreteScheduler(timestep_spacing="linspace")
    scheduler.set_timesteps(STEPS)
    assert any(timestep != timestep.round() for timestep in scheduler.timesteps)
    return scheduler


def heun():
    scheduler = HeunDiscreteScheduler()
    scheduler.set_timesteps(STEPS // 2)
    assert len(scheduler.timesteps) > len(scheduler.timesteps.unique())
    return scheduler


def pndm():
    scheduler = PNDMScheduler(skip_prk_steps=True)
    scheduler.set_timesteps(STEPS)
    assert len(scheduler.timesteps) > len(scheduler.timesteps.unique())
    return scheduler


SCHEDULERS = pytest.mark.parametrize("new_scheduler", [ddim, euler, heun, pndm])


@pytest.mark.supports("Schedulers", "DDIM, Euler, Heun, PNDM", "each layer of each call uses the row of its timestep")
@SCHEDULERS
def test_every_layer_of_every_call_uses_the_row_of_the_scheduler_s_timestep(subject, checked, new_scheduler):
    unet, checks = checked
    scheduler = new_scheduler()

    draw(unet, scheduler, subject)

    assert len(checks) == len(quantized_layers(unet)) * len(scheduler.timesteps)


@SCHEDULERS
def test_trajectory_is_that_of_the_rounded_float_unet(subject, oracle, new_scheduler, relative_rms):
    expected = draw(oracle, new_scheduler(), subject)

    actual = draw(subject.quantized, new_scheduler(), subject)

    assert relative_rms(actual, expected) < TOLERANCE


@SCHEDULERS
def test_neighbouring_row_would_be_noticed(subject, fake_quantized, new_scheduler, relative_rms):
    """The tolerance above is narrow enough to detect it."""
    wrong = draw(Oracle(subject.copy(), fake_quantized, wrong_by=1), new_scheduler(), subject)

    assert relative_rms(wrong, draw(subject.quantized, new_scheduler(), subject)) > 2 * TOLERANCE


@pytest.mark.supports("Pipelines", "image to image", "trajectories may start midway")
def test_trajectory_may_start_midway(subject, oracle, checked, relative_rms):
    unet, checks = checked
    scheduler = ddim()
    start = scheduler.timesteps[STEPS // 2 :]
    expected = draw(oracle, ddim(), subject, start)

    draw(unet, ddim(), subject)  # no state of an earlier image may remain
    actual = draw(unet, scheduler, subject, start)

    assert relative_rms(actual, expected) < TOLERANCE
    assert len(checks) == len(quantized_layers(unet)) * (STEPS + len(start))


@pytest.mark.supports("Schedulers", "one-step models", "any timestep: the nearest row")
@pytest.mark.parametrize("timestep", [0, 1, 999])
def test_one_step_models_may_use_any_timestep(subject, oracle, checked, timestep, relative_rms):
    assert relative_rms(subject.call(checked[0], timestep), subject.call(oracle, timestep)) < TOLERANCE


def test_order_of_the_calls_does_not_matter(subject):
    timesteps = [750, 750, 0, 500, 250, 0, 750]
    expected = {timestep: subject.call(subject.copy(), timestep) for timestep in set(timesteps)}

    for timestep in timesteps:
        assert torch.equal(subject.call(subject.quantized, timestep), expected[timestep])


@pytest.mark.supports("Pipelines", "guidance", "in one call or in two")
def test_guidance_in_two_calls_is_guidance_in_one(subject, checked, relative_rms):
    unet, _ = checked
    negative = {name: -value for name, value in subject.arguments.items()}
    both = {name: torch.cat([negative[name], value]) for name, value in subject.arguments.items()}
    twice = torch.cat([subject.sample, subject.sample])

    for timestep in ddim().timesteps[::2]:
        together = unet(twice, timestep, **both).sample
        apart = [unet(subject.sample, timestep, **given).sample for given in (negative, subject.arguments)]

        assert relative_rms(torch.cat(apart), together) < TOLERANCE


@pytest.mark.supports("Schedulers", "batches of several timesteps", "each sample has its own row")
def test_batch_of_timesteps_is_its_samples_one_by_one(subject, checked, relative_rms):
    unet, _ = checked
    timesteps = torch.tensor([999, 1, 260, 260, 490])
    rows = torch.tensor([0, 1, 1, 0, 1])
    sample, arguments = subject.sample[rows], {name: value[rows] for name, value in subject.arguments.items()}

    together = unet(sample, timesteps, **arguments).sample

    for i, timestep in enumerate(timesteps):
        one = slice(i, i + 1)
        alone = unet(sample[one], timestep, **{name: value[one] for name, value in arguments.items()}).sample
        assert relative_rms(together[one], alone) < TOLERANCE


@pytest.mark.parametrize(
    "timestep", [torch.tensor(500), torch.tensor([500]), torch.tensor([500, 500]), 500.0], ids=repr
)
def test_forms_of_one_timestep_give_one_result(subject, timestep):
    assert torch.equal(subject.call(subject.quantized, timestep), subject.call(subject.quantized, 500))
