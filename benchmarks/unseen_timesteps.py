"""Sampling at timesteps that no calibration has seen: DDIM-20's scales under other samplers.

    python benchmarks/unseen_timesteps.py [--task digits/cross_attention] [--bits 8] [--output FILE]

For each sampler the UNet is calibrated twice, on DDIM with 20 steps and on the sampler's own steps, and draws the same
noise as fp32. The loss is what foreign scales cost, in dB of PSNR to fp32 with the same sampler. Weights are rounded
with error feedback, without training, so that nothing but the calibration data differs.
"""

from __future__ import annotations

import argparse
import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import environment
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, LCMScheduler
from quality import BATCH, CALIBRATION_SAMPLES, FIRST_IMAGE_SEED, ROOT
from tasks import TASKS

import dq_runtime
from dq_runtime.evaluation.metrics import psnr

IMAGES = 200
SAMPLERS: dict[str, tuple[Any, int]] = {
    "DDIM, 20 steps": (DDIMScheduler, 20),
    "DDIM, 50 steps": (DDIMScheduler, 50),
    "Euler, 20 steps": (EulerDiscreteScheduler, 20),
    "DPM-Solver++, 20 steps": (DPMSolverMultistepScheduler, 20),
    "LCM, 4 steps": (LCMScheduler, 4),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="digits/cross_attention")
    parser.add_argument("--bits", type=int, choices=(4, 6, 8), default=8, help="of activations")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    task = TASKS[arguments.task]
    unet = task.unet()

    def scheduler(name: str) -> Any:
        # From timestep 999 on, nothing of the image is left to predict
        options = {} if name.startswith("DDIM") else {"timestep_spacing": "leading"}
        options |= {"original_inference_steps": 20} if name.startswith("LCM") else {}
        return SAMPLERS[name][0].from_config(task.noise_scheduler().config, **options)

    def calibrated(name: str) -> Any:
        calibration_set = dq_runtime.collect_from_scheduler(
            unet, scheduler(name), task.noise(CALIBRATION_SAMPLES, 0), SAMPLERS[name][1],
            task.condition(task.labels(CALIBRATION_SAMPLES)), BATCH,
        )  # fmt: skip
        config = dq_runtime.DilateQuantConfig(activation_bits=arguments.bits)
        return dq_runtime.calibrate(deepcopy(unet), calibration_set, config, dq_runtime.Distillation(iterations=0))

    first = next(iter(SAMPLERS))
    foreign = calibrated(first)
    rows = []
    for name, (_, steps) in SAMPLERS.items():
        own = foreign if name == first else calibrated(name)
        images = [
            task.sample(model, task.labels(IMAGES), FIRST_IMAGE_SEED, steps, scheduler(name))
            for model in (unet, foreign, own)
        ]
        with torch.no_grad():
            judged = [task.classifier()(batch).argmax(1) == task.labels(IMAGES) for batch in images]
        foreign_db, own_db = (float(psnr(drawn, images[0]).mean()) for drawn in images[1:])
        rows.append(
            {
                "sampler": name,
                "psnr_db": foreign_db,
                "psnr_db_own_grid": own_db,
                "loss_db": own_db - foreign_db,
                **{
                    f"accuracy_{which}": right.float().mean().item()
                    for which, right in zip(("fp32", "ddim20_grid", "own_grid"), judged, strict=True)
                },
            }
        )
        print(f"{name:24s} DDIM-20's scales {foreign_db:.1f} dB, its own {own_db:.1f} dB", flush=True)
    slug = arguments.task.replace("/", "_")
    output = arguments.output or ROOT / "benchmarks" / "results" / f"unseen_timesteps_{slug}.json"
    report = {
        "command": f"python benchmarks/unseen_timesteps.py --task {arguments.task} --bits {arguments.bits}",
        "environment": environment.describe(),
        "task": arguments.task,
        "activation_bits": arguments.bits,
        "images": IMAGES,
        "rows": rows,
    }
    output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
