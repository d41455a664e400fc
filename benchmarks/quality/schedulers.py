"""Calibration on each sampler's own trajectories: is the error that of DDIM?

    python -m benchmarks.quality.schedulers [--task digits/cross_attention] [--seeds 3] [--output FILE]

For each sampler a UNet is calibrated on that sampler's calls, without dilation or training. It draws
from the same noise as fp32 with the same sampler; stochastic samplers add the same noise to both. The figures are the
root mean squared error of the images, and its ratio to DDIM's.
"""

from __future__ import annotations

from copy import deepcopy
from statistics import mean
from typing import Any

import diffusers

import dq_runtime
from benchmarks.quality.study import BATCH, FIRST_IMAGE_SEED, slug, task_parser, write_report
from examples.small_unets.task import Task
from examples.small_unets.tasks import TASKS

IMAGES, SAMPLES, STEPS = 100, 50, 20
CONFIG = dq_runtime.DilateQuantConfig(dilation="none")
DDIM = "DDIMScheduler"
SAMPLERS = (
    DDIM,
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverSinglestepScheduler",
    "DDPMScheduler",
)


def new_scheduler(task: Task, name: str) -> Any:
    """The sampler with the noise schedule that the UNet was trained with."""
    options: dict[str, Any] = {} if name == DDIM else {"timestep_spacing": "leading"}  # at 999 nothing can be predicted
    return getattr(diffusers, name).from_config(task.noise_scheduler().config, **options)


def error_of(task: Task, unet: Any, name: str, seed: int) -> float:
    """The root mean squared error of the images of a UNet that was calibrated on the sampler's own trajectories."""
    condition = task.condition(task.labels(SAMPLES))
    calibration_set = dq_runtime.collect_from_scheduler(
        unet, new_scheduler(task, name), task.noise(SAMPLES, seed), STEPS, condition, BATCH
    )
    quantized = dq_runtime.calibrate(deepcopy(unet), calibration_set, CONFIG, distillation=None)
    drawn, expected = (
        task.sample(model, task.labels(IMAGES), FIRST_IMAGE_SEED + seed, STEPS, new_scheduler(task, name))
        for model in (quantized, unet)
    )
    return float((drawn - expected).square().mean().sqrt())


def main() -> None:
    parser = task_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    task = TASKS[arguments.task]
    unet = task.unet()
    errors: dict[str, list[float]] = {}
    for name in SAMPLERS:
        errors[name] = [error_of(task, unet, name, seed) for seed in range(arguments.seeds)]
        print(f"{name:34s} {mean(errors[name]) / mean(errors[DDIM]):.3f} {errors[name]}", flush=True)
    rows = [
        {"sampler": name, "rmse": values, "ratio_to_ddim": mean(values) / mean(errors[DDIM])}
        for name, values in errors.items()
    ]
    report = {"task": arguments.task, "images": IMAGES, "steps": STEPS, "rows": rows}
    options = f"--task {arguments.task} --seeds {arguments.seeds}"
    write_report("schedulers", options, slug(arguments.task), report, arguments.output)


if __name__ == "__main__":
    main()
