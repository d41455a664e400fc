"""``dq-runtime generate``: images of a pipeline, packed or not, as PNGs that hold their parameters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dq_runtime import __version__
from dq_runtime.calibration import ranks
from dq_runtime.cli import models, processes
from dq_runtime.cli.drawing import draw, takes
from dq_runtime.cli.errors import UserError, as_user_errors


@dataclass(frozen=True)
class Options:
    """The options of the command, as the user gave them."""

    model: str
    prompts: Sequence[str]
    output: Path
    seed: int
    batch: int
    steps: int
    guidance: float | None
    lora: Sequence[Path]
    scheduler: str | None
    device: str | None


def generate(options: Options) -> dict[str, Any]:
    """Draws ``batch`` images for each prompt; the i-th of a prompt has the seed ``seed + i``.

    Several processes share the prompts. The images of a prompt are drawn together, since the rounding of a sample
    depends on its batch.

    Returns:
        the files with their parameters, and the seconds of each call.

    Raises:
        UserError: see ``dq_runtime.cli.errors``.
    """
    with processes.together(options.device) as device:
        return _generate(options, device)


def _generate(options: Options, device: torch.device) -> dict[str, Any]:
    for option, value, least in (("--steps", options.steps, 1), ("--batch", options.batch, 1)):
        models.at_least(option, value, least)
    models.at_least("--seed", options.seed, 0)
    if options.output.exists() and not options.output.is_dir():
        raise UserError(f"{options.output} is a file: give a folder with -o")
    pipeline = models.load_pipeline(models.find(options.model), device)
    if options.scheduler is not None:
        pipeline.scheduler = _scheduler(pipeline, options.scheduler)
    for file in options.lora:
        models.load_lora(pipeline, file)
    models.make_fast(models.component_of(pipeline)[1], device)
    prompts: list[str | None] = list(options.prompts) or [None]
    if prompts == [None] and takes(pipeline, "prompt"):
        raise UserError(
            f"{options.model} needs at least one prompt: dq-runtime generate {options.model} 'a lighthouse'"
        )

    seeds = [options.seed + i for i in range(options.batch)]
    written, seconds = [], []
    for start in range(0, len(prompts), ranks.count()):
        at_once = prompts[start : start + ranks.count()]  # a prompt for each rank
        drawn = [draw(pipeline, prompt, seeds, options.steps, options.guidance) for prompt in ranks.part(at_once)]
        for prompt, (images, spent) in zip(at_once, ranks.joined(drawn), strict=True):
            seconds.append(spent)
            for image, seed in zip(images, seeds, strict=True):
                parameters = {
                    "prompt": prompt,
                    "seed": seed,
                    "steps": options.steps,
                    "guidance": options.guidance,
                    "scheduler": type(pipeline.scheduler).__name__,
                    "model": options.model,
                    "lora": [str(file) for file in options.lora],
                    "batch": options.batch,
                    "dq_runtime": __version__,
                }
                if ranks.is_first():
                    written.append({"file": str(_save(image, options.output, parameters)), **parameters})
    return {"images": written, "seconds": seconds}


def _scheduler(pipeline: Any, name: str) -> Any:
    """A scheduler of another class with the pipeline's noise schedule."""
    known = {scheduler.__name__: scheduler for scheduler in pipeline.scheduler.compatibles}
    if name not in known:
        raise UserError(
            f"--scheduler {name} does not fit; this pipeline takes {', '.join(sorted(known)) or 'no other'}"
        )
    with as_user_errors(ValueError, ImportError):
        return known[name].from_config(pipeline.scheduler.config)


def _save(image: np.ndarray, folder: Path, parameters: dict[str, Any]) -> Path:
    """Writes the image under the first free number; its text chunk ``parameters`` is JSON."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    folder.mkdir(parents=True, exist_ok=True)
    pixels = (255 * image.clip(0, 1)).round().astype(np.uint8)
    text = PngInfo()
    text.add_itxt("parameters", json.dumps(parameters, ensure_ascii=False))
    made = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    for number in count():
        file = folder / f"{number:04d}.png"
        try:
            with file.open("xb") as stream:
                made.save(stream, "PNG", pnginfo=text)
            return file
        except FileExistsError:
            continue
    raise AssertionError("count() does not end")
