"""Every scheduler of diffusers that samples images with a UNet: its timesteps are recorded, and each has a row."""

import diffusers
import pytest
import tiny_unets
import torch

import dq_runtime
from dq_runtime.calibration.importance import timestep_importance
from dq_runtime.timesteps import TimestepGrid

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # NumPy's, of some schedulers

STEPS = 4
SCHEDULERS = [
    "CMStochasticIterativeScheduler", "CogVideoXDDIMScheduler", "DDIMInverseScheduler", "DDIMParallelScheduler",
    "DDIMScheduler", "DDPMParallelScheduler", "DDPMScheduler", "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
    "EDMDPMSolverMultistepScheduler", "EDMEulerScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler",
    "HeunDiscreteScheduler", "IPNDMScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler",
    "LCMScheduler", "LMSDiscreteScheduler", "PNDMScheduler", "SASolverScheduler", "TCDScheduler", "UnCLIPScheduler",
    "UniPCMultistepScheduler",
]  # fmt: skip
# Two calls for a step, at fractions of timesteps.
TWO_STAGES = {"HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"}
FLOW_SIGMAS = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


@pytest.fixture(scope="module")
def unet():
    return tiny_unets.unet2d(block_out_channels=(8, 16), norm_num_groups=4, down_block_types=("DownBlock2D",) * 2,
                             up_block_types=("UpBlock2D",) * 2)  # fmt: skip


def collect(unet, scheduler):
    torch.manual_seed(0)
    return dq_runtime.collect_from_scheduler(unet, scheduler, torch.randn(2, 3, 8, 8), STEPS)


@pytest.mark.supports(
    "Schedulers",
    "all that sample with a UNet, epsilon or flow",
    "timesteps are recorded, fractions and repeats included, and have rows of their own",
)
@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name in SCHEDULERS]
    + [(name, FLOW_SIGMAS) for name in SCHEDULERS if name.startswith(("DEIS", "DPMSolverM", "UniPC"))],
)
def test_each_timestep_that_a_scheduler_gives_has_its_own_row(unet, name, options):
    if not hasattr(diffusers, name):
        pytest.skip("this version of diffusers does not have it")
    scheduler = getattr(diffusers, name)(**options)
    calibration_set = collect(unet, scheduler)
    given = [float(timestep) for timestep in scheduler.timesteps.float()]  # the last run's

    assert [float(call.timestep) for call in calibration_set.calls] == given
    rows = {timestep: row for row, timestep in enumerate(sorted(set(given)))}
    grid = TimestepGrid(calibration_set.timesteps)
    for timestep in scheduler.timesteps:
        assert grid.nearest(timestep, 2, torch.device("cpu")).tolist() == [rows[float(timestep.float())]] * 2
    assert (len(given) > STEPS) is (name in TWO_STAGES | {"PNDMScheduler", "FlowMatchHeunDiscreteScheduler"})
    importance = timestep_importance(scheduler, calibration_set.timesteps)
    assert len(importance) == len(rows)
    assert min(importance) > 0


@pytest.mark.supports(
    "Schedulers",
    "steps that need more than prediction, timestep and sample",
    "`collect_from_scheduler` refuses them: run their pipeline inside `record()`",
)
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("RePaintScheduler", "it needs original_image, mask"),
        ("KarrasVeScheduler", "it needs sample_hat"),
        ("ScoreSdeVeScheduler", "has no step"),
    ],
)
def test_schedulers_of_other_steps_are_refused_with_the_remedy(unet, name, reason):
    with pytest.raises(TypeError, match=rf"^{name} .*{reason}.*Run its pipeline inside record"):
        collect(unet, getattr(diffusers, name)())
