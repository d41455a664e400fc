"""Sampling at timesteps outside the calibration: DDIM-20's scales with other samplers.

    python -m benchmarks.quality.unseen_timesteps [--task digits/cross_attention] [--bits 8] [--seeds 3] [--output FILE]

A UNet is calibrated on DDIM with 20 steps. With each sampler it samples from the same noise as fp32, with

- the scales of the nearest timestep, the default;
- scales and zero points interpolated between the two neighbours;
- scales searched on the sampler's own steps, a bound for any rule that selects among DDIM-20's scales;
- scales and weights calibrated on the sampler's own steps.

The figures are PSNR to fp32 with the same sampler, for each seed of calibration data, training and images. Weights are
rounded with error feedback, without training, so that only the calibration data differs.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, LCMScheduler

import dq_runtime
from benchmarks.quality.study import BATCH, CALIBRATION_SAMPLES, FIRST_IMAGE_SEED, slug, task_parser, write_report
from dq_runtime.calibration.temporal import sample_inputs, temporal_quantizer
from dq_runtime.convert import convert, plan_conversion
from dq_runtime.evaluation.metrics import psnr
from dq_runtime.layers import quantized_layers
from examples.small_unets.tasks import TASKS

IMAGES = 200
SAMPLERS: dict[str, tuple[Any, int]] = {
    "DDIM, 20 steps": (DDIMScheduler, 20),
    "DDIM, 50 steps": (DDIMScheduler, 50),
    "Euler, 20 steps": (EulerDiscreteScheduler, 20),
    "DPM-Solver++, 20 steps": (DPMSolverMultistepScheduler, 20),
    "LCM, 4 steps": (LCMScheduler, 4),
}

Tables = dict[str, dict[str, torch.Tensor]]  # layer -> act_scale and act_zero_point, [T]


def interpolated(unet: Any, timesteps: list[float]) -> Tables:
    """A quantized UNet's tables, interpolated at other timesteps."""

    def at(table: torch.Tensor) -> torch.Tensor:
        values = np.interp(timesteps, unet.config.quantization_config.timesteps, table.double().numpy())
        return torch.from_numpy(values if table.is_floating_point() else values.round()).to(table.dtype)

    return {
        name: {"act_scale": at(layer.act_scale), "act_zero_point": at(layer.act_zero_point)}
        for name, layer in quantized_layers(unet).items()
    }


def searched(unet: Any, stock: Any, calibration_set: dq_runtime.CalibrationSet) -> Tables:
    """A quantized UNet's tables, searched on the timesteps of a calibration set with the same dilation."""
    config = unet.config.quantization_config
    tables = {}
    for name, rows in sample_inputs(stock, plan_conversion(stock, config).layers, calibration_set).items():
        dilation = quantized_layers(unet)[name].weight_dilation
        scale, zero_point = temporal_quantizer(rows, dilation, config.activation_bits_of(name))
        tables[name] = {"act_scale": scale, "act_zero_point": zero_point}
    return tables


def with_tables(unet: Any, stock: Any, timesteps: list[float], tables: Tables) -> Any:
    """A copy of a quantized UNet with other tables for other timesteps."""
    tensors = {name: layer.state_dict() | tables[name] for name, layer in quantized_layers(unet).items()}
    copy = deepcopy(stock)
    convert(copy, replace(unet.config.quantization_config, timesteps=timesteps), tensors)
    return copy


def main() -> None:
    parser = task_parser(__doc__)
    parser.add_argument("--bits", type=int, choices=(4, 6, 8), default=8, help="activation bits (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    task = TASKS[arguments.task]
    unet = task.unet()
    labels, classifier = task.labels(IMAGES), task.classifier()

    def scheduler(name: str) -> Any:
        # At timestep 999 the sample is pure noise: there is nothing to predict
        options = {} if name.startswith("DDIM") else {"timestep_spacing": "leading"}
        options |= {"original_inference_steps": 20} if name.startswith("LCM") else {}
        return SAMPLERS[name][0].from_config(task.noise_scheduler().config, **options)

    def collected(name: str, seed: int) -> dq_runtime.CalibrationSet:
        return dq_runtime.collect_from_scheduler(
            unet, scheduler(name), task.noise(CALIBRATION_SAMPLES, seed), SAMPLERS[name][1],
            task.condition(task.labels(CALIBRATION_SAMPLES)), BATCH,
        )  # fmt: skip

    def calibrated(calibration_set: dq_runtime.CalibrationSet, seed: int) -> Any:
        config = dq_runtime.DilateQuantConfig(activation_bits=arguments.bits)
        settings = dq_runtime.Distillation(iterations=0, seed=seed)
        return dq_runtime.calibrate(deepcopy(unet), calibration_set, config, settings)

    first = next(iter(SAMPLERS))
    results: dict[str, dict[str, list[dict[str, float]]]] = {name: {} for name in SAMPLERS}
    for seed in range(arguments.seeds):
        foreign = calibrated(collected(first, seed), seed)
        for name, (_, steps) in SAMPLERS.items():
            models = {"fp32": unet, "nearest": foreign}
            if name != first:
                own = collected(name, seed)
                for which, tables in (
                    ("interpolated", interpolated(foreign, own.timesteps)),
                    ("own_scales", searched(foreign, unet, own)),
                ):
                    models[which] = with_tables(foreign, unet, own.timesteps, tables)
                models["own_calibration"] = calibrated(own, seed)
            reference = None
            for which, model in models.items():
                images = task.sample(model, labels, FIRST_IMAGE_SEED + seed, steps, scheduler(name))
                reference = images if reference is None else reference
                with torch.no_grad():
                    accuracy = (classifier(images).argmax(1) == labels).float().mean().item()
                result = {"accuracy": accuracy}
                if which != "fp32":
                    result["psnr_db"] = float(psnr(images, reference).mean())
                results[name].setdefault(which, []).append(result)
                print(f"seed {seed}  {name:24s} {which:16s} {result}", flush=True)
    report = {
        "task": arguments.task,
        "activation_bits": arguments.bits,
        "images": IMAGES,
        "rows": [{"sampler": name, **summary(by_scales)} for name, by_scales in results.items()],
    }
    options = f"--task {arguments.task} --bits {arguments.bits} --seeds {arguments.seeds}"
    write_report("unseen_timesteps", options, f"{slug(arguments.task)}_w4a{arguments.bits}", report, arguments.output)


def summary(by_scales: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Accuracy, PSNR and the gain over the nearest timestep's scales, from the seeds' results by kind of scales."""
    psnr_db = {which: [result["psnr_db"] for result in seeds] for which, seeds in by_scales.items() if which != "fp32"}
    gains = {
        which: [there - nearest for there, nearest in zip(values, psnr_db["nearest"], strict=True)]
        for which, values in psnr_db.items()
        if which != "nearest"
    }
    return {
        "accuracy": {which: mean(result["accuracy"] for result in seeds) for which, seeds in by_scales.items()},
        "psnr_db": psnr_db,
        "gain_db": {
            which: {"mean": mean(values), "std": stdev(values) if len(values) > 1 else None}
            for which, values in gains.items()
        },
    }


if __name__ == "__main__":
    main()
