"""The importance of timesteps: closed forms, and what a sampler makes of an error in the prediction."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    LCMScheduler,
)

from dq_runtime.calibration.importance import timestep_importance

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def scheduler_of_levels(levels, prediction_type="epsilon"):
    """A scheduler whose timestep i has the noise level levels[i]: sqrt((1 - alpha) / alpha)."""
    alphas = 1 / (1 + torch.tensor(levels, dtype=torch.float64).square())
    return SimpleNamespace(alphas_cumprod=alphas, config={"prediction_type": prediction_type})


# From 4/3 down to 3/4 and from there to 0; 1 + (3/4)² = (5/4)², 1 + (4/3)² = (5/3)².
@pytest.mark.parametrize(
    ("prediction_type", "expected"),
    [
        ("epsilon", [(3 / 4) ** 2, (7 / 12) ** 2 / (5 / 4) ** 2]),
        ("v_prediction", [(3 / 4) ** 2 / (5 / 4) ** 2, (7 / 12) ** 2 / (5 / 4) ** 2 / (5 / 3) ** 2]),
        ("sample", [1, (7 / 12) ** 2 / (5 / 4) ** 2 / (4 / 3) ** 2]),
    ],
)
def test_two_steps_by_hand(prediction_type, expected):
    scheduler = scheduler_of_levels([0.1, 3 / 4, 1, 4 / 3, 5], prediction_type)

    assert timestep_importance(scheduler, [1, 3]) == pytest.approx(expected, rel=1e-9)


def test_a_scheduler_that_does_not_name_its_prediction_predicts_noise():
    scheduler = scheduler_of_levels([1.0, 2.0, 5.0])
    unnamed = SimpleNamespace(alphas_cumprod=scheduler.alphas_cumprod, config={})

    assert timestep_importance(unnamed, [0, 2]) == timestep_importance(scheduler, [0, 2])


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_all_schedulers_of_one_noise_schedule_agree(prediction_type):
    timesteps = [0, 1, 250, 251.5, 999]
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    arguments = {"prediction_type": prediction_type, **betas}

    expected = timestep_importance(DDIMScheduler(**arguments), timesteps)
    assert len(expected) == 5
    assert all(isinstance(importance, float) for importance in expected)
    for kind in (EulerDiscreteScheduler, DPMSolverMultistepScheduler, LCMScheduler):
        assert timestep_importance(kind(**arguments), timesteps) == pytest.approx(expected, rel=1e-6)


def exact_prediction(x, alpha, prediction_type):
    """For images that are normal with unit variance."""
    if prediction_type == "v_prediction":
        return torch.zeros_like(x)
    return x * (1 - alpha if prediction_type == "epsilon" else alpha).sqrt()


def final_squared_errors(scheduler, at, error=1e-2):
    """DDIM's squared error of the image over that of the prediction, which is wrong at one of the timesteps ``at``."""
    x = torch.full((len(at) + 1,), 0.8, dtype=torch.float64)  # one trajectory each, and one without error
    for timestep in scheduler.timesteps:
        alpha = scheduler.alphas_cumprod[timestep].double()
        prediction = exact_prediction(x, alpha, scheduler.config.prediction_type)
        if timestep.item() in at:
            prediction[at.index(timestep.item())] += error
        x = scheduler.step(prediction, timestep, x, eta=0.0).prev_sample
    return ((x[:-1] - x[-1]) / error).square().tolist()


# Steps are of finite length, so the exact trajectory itself is off: by 0.2 % of the image and by 2 %.
@pytest.mark.parametrize(("steps", "tolerance"), [(1000, 0.005), (100, 0.04)])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_importance_is_what_ddim_makes_of_an_error_where_images_are_normal(prediction_type, steps, tolerance):
    scheduler = DDIMScheduler(prediction_type=prediction_type, clip_sample=False)
    scheduler.set_timesteps(steps)
    timesteps = sorted(scheduler.timesteps.tolist())
    importance = dict(zip(timesteps, timestep_importance(scheduler, timesteps), strict=True))

    at = [timesteps[int(fraction * (steps - 1))] for fraction in (0, 0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98, 1)]
    for timestep, error in zip(at, final_squared_errors(scheduler, at), strict=True):
        assert importance[timestep] == pytest.approx(error, rel=tolerance), timestep


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_timesteps_of_unequal_distance_are_weighed_by_their_own_steps(prediction_type):
    scheduler = DDIMScheduler(prediction_type=prediction_type)
    levels = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt().double()
    prediction_factor = {"epsilon": 1, "v_prediction": 1 / (1 + levels[700] ** 2), "sample": 1 / levels[700] ** 2}

    for following in (100, 600, 699):
        _, importance = timestep_importance(scheduler, [following, 700])
        expected = (levels[700] - levels[following]) ** 2 / (1 + levels[following] ** 2)
        assert importance == pytest.approx(float(expected * prediction_factor[prediction_type]), rel=1e-4)


def test_fractional_timesteps_lie_between_their_neighbours():
    scheduler = DDIMScheduler()
    last, following = np.array(
        [timestep_importance(scheduler, [timestep, 900]) for timestep in (500, 500.01, 500.3, 500.7, 500.99, 501)]
    ).T

    assert (np.diff(last) > 0).all()
    assert (np.diff(following) < 0).all()


def test_fractional_timesteps_have_the_noise_level_that_the_sampler_gives_them():
    scheduler = EulerDiscreteScheduler(use_karras_sigmas=True)
    scheduler.set_timesteps(12)
    assert any(timestep % 1 for timestep in scheduler.timesteps.tolist())

    for timestep, sigma in zip(scheduler.timesteps.tolist(), scheduler.sigmas.tolist(), strict=False):
        (importance,) = timestep_importance(scheduler, [timestep])
        assert importance == pytest.approx(sigma**2, rel=1e-4)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler])
def test_a_schedule_that_ends_in_pure_noise_has_finite_importance(kind, prediction_type):
    scheduler = kind(prediction_type=prediction_type, rescale_betas_zero_snr=True)

    importance = timestep_importance(scheduler, [1, 500, 980, 999])
    assert np.isfinite(importance).all()
    assert min(importance) > 0


@pytest.mark.filterwarnings("error")
def test_alphas_of_exactly_one_and_zero_have_finite_importance():
    scheduler = SimpleNamespace(alphas_cumprod=torch.tensor([1.0, 0.5, 0.0]), config={"prediction_type": "sample"})

    importance = timestep_importance(scheduler, [0, 1, 2])
    assert np.isfinite(importance).all()
    assert importance[0] == pytest.approx(1)
    assert importance[1] == pytest.approx(1, rel=1e-3)
    assert importance[2] == pytest.approx(1 / 2, rel=1e-3)


@pytest.mark.parametrize(
    "scheduler",
    [
        None,
        DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", beta_end=0.5),
    ],
    ids=["none", "flow sigmas"],
)
def test_diffusers_default_schedule_stands_in_where_the_scheduler_does_not_tell(scheduler):
    timesteps = [1.0, 17.5, 900.0]

    assert timestep_importance(scheduler, timesteps) == timestep_importance(DDPMScheduler(), timesteps)


@pytest.mark.parametrize("timesteps", [[-1.55, 0.2, 1.64], [1, 500, 1400]], ids=["quarter logarithms", "too large"])
def test_timesteps_that_are_no_positions_in_a_schedule_matter_alike(timesteps):
    assert timestep_importance(EulerDiscreteScheduler(), timesteps) == [1, 1, 1]


def test_every_timestep_counts_even_where_the_schedule_stands_still():
    scheduler = scheduler_of_levels([0.5, 1.0, 1.0, 2.0])

    assert min(timestep_importance(scheduler, [0, 1, 2, 3])) > 0


# Flow matching: from 3/4 down to 1/4 and from there to 0; (3/4)² + (1/4)² = 5/8.
@pytest.mark.parametrize("timesteps", [[1 / 4, 3 / 4], [250, 750]], ids=["noise levels", "timesteps"])
@pytest.mark.parametrize("kind", [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler])
def test_two_steps_of_flow_matching_by_hand(kind, timesteps):
    assert timestep_importance(kind(shift=3.0), timesteps) == pytest.approx([1 / 16, 1 / 4 / (5 / 8)], rel=1e-9)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_importance_is_what_flow_matching_makes_of_an_error_where_images_are_normal(shift):
    error, steps = 10.0, 1000  # the trajectory is linear, and the scheduler computes in fp32
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    levels = scheduler.sigmas[:-1].double()
    importance = timestep_importance(scheduler, levels.flip(0).tolist())[::-1]

    at = [int(fraction * (steps - 1)) for fraction in (0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98, 1)]
    x = torch.full((len(at) + 1,), 0.8, dtype=torch.float64)  # one trajectory each, and one without error
    for i, timestep in enumerate(scheduler.timesteps):
        velocity = x * (2 * levels[i] - 1) / ((1 - levels[i]) ** 2 + levels[i] ** 2)
        if i in at:
            velocity[at.index(i)] += error
        x = scheduler.step(velocity, timestep, x).prev_sample
    errors = ((x[:-1] - x[-1]) / error).square().tolist()
    assert [importance[i] for i in at] == pytest.approx(errors, rel=0.04)


@pytest.mark.parametrize(
    ("scheduler", "timesteps"),
    [
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), [0.0, 0.5]),
        (FlowMatchEulerDiscreteScheduler(), [-0.5, 0.5]),
        (FlowMatchEulerDiscreteScheduler(), [1, 1400]),
        (FlowMatchEulerDiscreteScheduler(), [0.0]),
    ],
    ids=["inverted", "negative", "too large", "no noise"],
)
def test_timesteps_that_are_no_noise_levels_matter_alike(scheduler, timesteps):
    assert timestep_importance(scheduler, timesteps) == [1.0] * len(timesteps)
