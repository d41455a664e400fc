"""Quantizes the UNet of a Stable Diffusion pipeline and draws the same prompts with the original and with INT4.

    python examples/stable_diffusion.py MODEL [--activation-bits 8] [--steps 25] [--polish 200] [--output out/sd]

MODEL is a folder or a repository name that diffusers can load: SD1.x, SD2.x, SDXL or a model derived from them. On a
GPU both models run in fp16, and the INT4 UNet is fused and replayed as CUDA graphs. On a CPU both run in fp32. The
script needs ``transformers`` and the extra ``evaluation``.

It writes ``unet/`` (the packed checkpoint), ``grid.png`` (the original above INT4, from the same noise) and
``report.json``. To resume an interrupted run, repeat the command: it reuses the recorded calls in ``calls.pt`` and the
finished blocks in ``blocks/``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

import dq_runtime
from dq_runtime.cli.prompts import CALIBRATION_PROMPTS as BUILT_IN
from dq_runtime.cli.prompts import COMPARISON_PROMPTS as PROMPTS  # calibration does not use them
from dq_runtime.evaluation.footprint import footprint
from dq_runtime.evaluation.metrics import psnr, ssim
from dq_runtime.evaluation.plots import plot_image_grid

CALIBRATION_PROMPTS = BUILT_IN[:16]
FIRST_SEED = 1000  # of the compared images; calibration uses smaller seeds


def draw(pipeline: Any, prompts: Sequence[str], steps: int) -> tuple[torch.Tensor, float]:
    """Draws one image per prompt, each from its own noise.

    Returns:
        images [B, 3, H, W] in [-1, 1] on the CPU, and the shortest time of an image in seconds.
    """
    images, seconds = [], []
    for i, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(FIRST_SEED + i)
        start = time.perf_counter()
        image = pipeline(prompt, num_inference_steps=steps, generator=generator, output_type="pt").images
        images.append(2 * image.float().cpu() - 1)
        seconds.append(time.perf_counter() - start)
    return torch.cat(images), min(seconds)  # the first time includes compilation and graph capture


def collect(pipeline: Any, prompts: Sequence[str], steps: int, file: Path) -> dq_runtime.CalibrationSet:
    """Records the UNet's calls while the pipeline draws these prompts, or loads them from an existing file."""
    if not file.exists():
        calls = [
            {"prompt": prompt, "num_inference_steps": steps, "generator": torch.Generator().manual_seed(i)}
            | {"output_type": "latent"}
            for i, prompt in enumerate(prompts)
        ]
        dq_runtime.collect_from_pipeline(pipeline, calls).save(file)
    return dq_runtime.CalibrationSet.load(file)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--activation-bits", type=int, default=8, choices=(8, 6, 4))
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--polish", type=int, default=0, help="iterations of training the whole UNet after its blocks")
    parser.add_argument("--samples", type=int, help="number of training samples (default: that of Distillation)")
    parser.add_argument("--prompts", type=Path, help="file of calibration prompts, one per line, like those to come")
    parser.add_argument("--output", type=Path, default=Path("out/sd"))
    arguments = parser.parse_args()
    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    lines = arguments.prompts.read_text().splitlines() if arguments.prompts else CALIBRATION_PROMPTS
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)

    pipeline = DiffusionPipeline.from_pretrained(arguments.model, torch_dtype=dtype).to(device)
    reference, fp_seconds = draw(pipeline, PROMPTS, arguments.steps)
    fp_mb = footprint(pipeline.unet).unet / 1e6
    calibration_set = collect(pipeline, [line for line in lines if line.strip()], arguments.steps, output / "calls.pt")

    samples = {} if arguments.samples is None else {"samples": arguments.samples}
    distillation = dq_runtime.Distillation(
        folder=output / "blocks", polish_iterations=arguments.polish, gradient_checkpointing=True, **samples
    )
    config = dq_runtime.DilateQuantConfig(activation_bits=arguments.activation_bits)
    start = time.perf_counter()
    dq_runtime.calibrate(pipeline.unet, calibration_set, config, distillation)
    calibration_seconds = time.perf_counter() - start
    pipeline.unet.save_pretrained(output / "unet")

    pipeline.unet = type(pipeline.unet).from_pretrained(output / "unet", torch_dtype=dtype).to(device)
    if device == "cuda":
        dq_runtime.fuse(pipeline.unet)
        dq_runtime.enable_cuda_graphs(pipeline.unet)
    images, seconds = draw(pipeline, PROMPTS, arguments.steps)

    name = f"INT4 W4A{arguments.activation_bits}"
    plot_image_grid({str(dtype).removeprefix("torch."): reference, name: images}).savefig(output / "grid.png")
    report = {
        "model": arguments.model,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "psnr_db": psnr(images, reference).tolist(),
        "ssim": ssim(images, reference),
        "unet_mb": {"fp": fp_mb, "int4": footprint(pipeline.unet).unet / 1e6},
        "seconds_per_image": {"fp": fp_seconds, "int4": seconds},
        "calibration_seconds": calibration_seconds,
    }
    (output / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
