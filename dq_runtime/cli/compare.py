"""``dq-runtime compare``: two pipelines draw from the same noise; the measures, and a page to look at."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dq_runtime
from dq_runtime import CalibrationSet
from dq_runtime.cli import models
from dq_runtime.cli.comparison_page import comparison_page
from dq_runtime.cli.drawing import draw, takes
from dq_runtime.cli.errors import UserError, as_user_errors
from dq_runtime.cli.prompts import COMPARISON_PROMPTS
from dq_runtime.evaluation.footprint import footprint
from dq_runtime.evaluation.layer_errors import layer_sqnr
from dq_runtime.evaluation.metrics import psnr, ssim
from dq_runtime.evaluation.plots import plot_activation_scales, plot_layer_sqnr
from dq_runtime.layers import is_quantized

IMAGES_WITHOUT_PROMPTS = 4
RECORDED_CALLS = 8  # of the first image, for the layers' errors


@dataclass(frozen=True)
class Side:
    """What one pipeline drew.

    Attributes:
        images: [B, C, H, W] in [-1, 1].
        seconds: the shortest time of an image; the first ones include compilation and graph capture.
        megabytes: of the UNet's tensors.
    """

    images: torch.Tensor
    seconds: float
    megabytes: float


def compare(
    names: tuple[str, str], prompts_file: Path | None, page: Path, steps: int, seed: int, device_name: str | None
) -> dict[str, Any]:
    """Draws with both pipelines, one image for each prompt, and writes the page.

    The layers' errors are measured if one pipeline is packed and the other is its original.

    Returns:
        PSNR of each image in dB, SSIM, seconds for an image, sizes, layers' SQNR in dB, and the page's path.

    Raises:
        UserError: see ``dq_runtime.cli.errors``.
    """
    models.at_least("--steps", steps, 1)
    models.at_least("--seed", seed, 0)
    if page.exists():
        raise UserError(f"{page} exists: give another file with -o, or remove it first")
    if not page.parent.is_dir():
        raise UserError(f"{page.parent}: there is no such folder; make it first, or give another file with -o")
    given = None if prompts_file is None else models.read_prompts(prompts_file)
    device = models.chosen_device(device_name)
    pipelines = [models.load_pipeline(models.find(name), device) for name in names]
    prompts: Sequence[str | None] = given or COMPARISON_PROMPTS
    if not takes(pipelines[0], "prompt"):
        prompts = [None] * IMAGES_WITHOUT_PROMPTS

    sqnr, figures = _layers(pipelines, prompts[0], steps, seed)
    sides = [_draw(pipeline, prompts, steps, seed, device) for pipeline in pipelines]
    shapes = [list(side.images.shape) for side in sides]
    if shapes[0] != shapes[1]:
        raise UserError(f"{names[0]} draws images {shapes[0]}, {names[1]} draws {shapes[1]}: they cannot be compared")
    with as_user_errors(ValueError):
        report = {
            "models": list(names),
            "prompts": list(prompts),
            "psnr_db": psnr(sides[1].images, sides[0].images).tolist(),
            "ssim": ssim(sides[1].images, sides[0].images),
            "seconds_per_image": [side.seconds for side in sides],
            "unet_megabytes": [side.megabytes for side in sides],
            "layer_sqnr_db": sqnr,
            "steps": steps,
            "seed": seed,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
            "page": str(page),
        }
    text = comparison_page(report, [side.images.numpy() for side in sides], figures)
    page.write_text(text, encoding="utf-8")
    return report


def _draw(pipeline: Any, prompts: Sequence[str | None], steps: int, seed: int, device: torch.device) -> Side:
    model = models.component_of(pipeline)[1]
    megabytes = footprint(model).unet / 1e6
    models.make_fast(model, device)
    images, times = [], []
    for i, prompt in enumerate(prompts):
        image, seconds = draw(pipeline, prompt, [seed + i], steps)
        images.append(image)
        times.append(seconds)
    stacked = torch.from_numpy(np.concatenate(images)).float().permute(0, 3, 1, 2)
    return Side(2 * stacked - 1, min(times), megabytes)


def _layers(
    pipelines: Sequence[Any], prompt: str | None, steps: int, seed: int
) -> tuple[dict[str, float], list[bytes]]:
    """SQNR of each layer in dB, and plots as PNGs; empty unless exactly one side is packed."""
    components = [models.component_of(pipeline)[1] for pipeline in pipelines]
    packed = [component for component in components if is_quantized(component)]
    figures = [plot_activation_scales(component) for component in packed]
    sqnr: dict[str, float] = {}
    if len(packed) == 1:
        original = components[1 - components.index(packed[0])]
        pipeline = pipelines[components.index(original)]
        with dq_runtime.record(original, pipeline.scheduler) as recorded:
            draw(pipeline, prompt, [seed], steps)
        every = max(1, len(recorded.calls) // RECORDED_CALLS)
        with as_user_errors(ValueError):
            sqnr = layer_sqnr(packed[0], original, CalibrationSet(recorded.calls[::every], pipeline.scheduler))
        figures.insert(0, plot_layer_sqnr(sqnr))
    return sqnr, [_png(figure) for figure in figures]


def _png(figure: Any) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()
