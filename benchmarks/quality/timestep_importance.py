"""Compares the effect of a prediction error at each timestep on the image with ``timestep_importance``.

    python -m benchmarks.quality.timestep_importance [--task digits/cross_attention] [--output FILE]

The floating-point UNet samples without an error, and with a small random error added to its prediction at one timestep.
The squared error of the images, divided by that of the prediction, is compared with the closed form.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.quality.study import STEPS, slug, task_parser, write_report
from dq_runtime.calibration.importance import timestep_importance
from examples.small_unets.tasks import TASKS

IMAGES = 64
ERROR = 0.02  # standard deviation; that of a prediction is about 1
SEED = 55


def measured_importance(task_name: str) -> dict[float, float]:
    """The measured importance of each timestep."""
    task, generator = TASKS[task_name], torch.Generator().manual_seed(SEED + 1)
    unet, scheduler = task.unet(), task.noise_scheduler()
    scheduler.set_timesteps(STEPS)
    error = ERROR * torch.randn(IMAGES, *task.image_shape, generator=generator)

    def draw(wrong_at: float | None) -> torch.Tensor:
        def add_error(module: Any, arguments: Any, output: Any) -> None:
            if arguments[1] == wrong_at:
                output.sample = output.sample + error

        handle = unet.register_forward_hook(add_error)
        try:
            return task.sample(unet, task.labels(IMAGES), SEED, STEPS)
        finally:
            handle.remove()

    right = draw(None)
    return {
        timestep: float((draw(timestep) - right).square().mean() / error.square().mean())
        for timestep in map(float, scheduler.timesteps.flip(0))
    }


def main() -> None:
    parser = task_parser(__doc__)
    arguments = parser.parse_args()
    measured = measured_importance(arguments.task)
    expected = timestep_importance(TASKS[arguments.task].noise_scheduler(), list(measured))
    rows = [
        {"timestep": timestep, "measured": value, "closed_form": closed_form, "ratio": value / closed_form}
        for (timestep, value), closed_form in zip(measured.items(), expected, strict=True)
    ]
    for row in rows:
        print(f"{row['timestep']:5.0f}  {row['measured']:.2e}  {row['closed_form']:.2e}  {row['ratio']:.2f}")
    results = {"task": arguments.task, "images": IMAGES, "rows": rows}
    options = f"--task {arguments.task}"
    write_report("timestep_importance", options, slug(arguments.task), results, arguments.output)


if __name__ == "__main__":
    main()
