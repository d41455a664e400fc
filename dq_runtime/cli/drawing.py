"""Running pipelines: drawing images, and recording the calls of their UNet while they draw."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map_only

import dq_runtime
from dq_runtime import CalibrationSet
from dq_runtime.calibration import ranks
from dq_runtime.calibration.collect import RecordedCall
from dq_runtime.cli.errors import UserError, as_user_errors

BATCH = 16  # images without prompts that are recorded together


def takes(pipeline: Any | None, argument: str) -> bool:
    """True if a pipeline's call has this argument."""
    return pipeline is not None and argument in inspect.signature(pipeline.__call__).parameters


def draw(
    pipeline: Any, prompt: str | None, seeds: Sequence[int], steps: int, guidance: float | None = None
) -> tuple[np.ndarray, float]:
    """Draws one image for each seed.

    Args:
        prompt: None for a pipeline without prompts.

    Returns:
        images [B, H, W, 3 or 1] in [0, 1], and the seconds it took.

    Raises:
        UserError: if the pipeline needs a prompt, or has none, or no guidance.
    """
    name = type(pipeline).__name__
    arguments: dict[str, Any] = {"num_inference_steps": steps, "output_type": "np"}
    arguments["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
    if takes(pipeline, "prompt") != (prompt is not None):
        raise UserError(f"{name} takes no prompts: leave them out" if prompt else f"{name} needs at least one prompt")
    if prompt is None:
        arguments["batch_size"] = len(seeds)
    else:
        arguments |= {"prompt": prompt, "num_images_per_prompt": len(seeds)}
    if guidance is not None:
        if not takes(pipeline, "guidance_scale"):
            raise UserError(f"{name} has no guidance: leave out --guidance")
        arguments["guidance_scale"] = guidance
    start = time.perf_counter()
    with as_user_errors(ValueError):
        images = pipeline(**arguments).images
    return np.asarray(images), time.perf_counter() - start


def record(
    pipeline: Any | None, model: Any, prompts: Sequence[str], images: int, steps: int, seed: int
) -> CalibrationSet:
    """The calls of a model while it draws one image for each prompt or, without prompts, so many images.

    Ranks share the images, and all get all calls, in the order of one process.

    Args:
        pipeline: None for a UNet alone, which is sampled by DDIM.

    Raises:
        UserError: if the UNet alone needs prompts, or the pipeline refuses its arguments.
    """
    if takes(pipeline, "prompt"):
        calls = [
            {"prompt": prompt, "num_inference_steps": steps, "output_type": "latent"}
            | {"generator": torch.Generator().manual_seed(seed + i)}
            for i, prompt in enumerate(prompts)
        ]
        with as_user_errors(ValueError), _without_warnings_of_diffusers():
            own = calls[_own_part(len(calls))]
            recorded = dq_runtime.collect_from_pipeline(pipeline, own, model) if own else CalibrationSet()
        return _of_all_ranks(recorded, getattr(pipeline, "scheduler", None))
    return _record_without_prompts(pipeline, model, images, steps, seed)


@contextmanager
def _without_warnings_of_diffusers() -> Iterator[None]:
    """Built-in prompts may be longer than a tokenizer takes, and calibration does not mind that they are cut."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _record_without_prompts(pipeline: Any | None, model: Any, images: int, steps: int, seed: int) -> CalibrationSet:
    """The calls of an unconditional UNet, or of one with classes, which are drawn at random."""
    from diffusers import DDIMScheduler

    if model.config.get("cross_attention_dim") is not None and type(model).__name__ == "UNet2DConditionModel":
        raise UserError("This UNet reads prompts: give its pipeline's folder, which makes its inputs from them")
    generator = torch.Generator().manual_seed(seed)
    sides = model.config.sample_size
    height, width = (sides, sides) if isinstance(sides, int) else sides
    noise = torch.randn(images, model.config.in_channels, height, width, generator=generator)
    arguments = {}
    if model.config.get("num_class_embeds") is not None:
        arguments["class_labels"] = torch.randint(model.config.num_class_embeds, (images,), generator=generator)
    scheduler = DDIMScheduler() if pipeline is None else pipeline.scheduler
    batches = _own_part(-(-images // BATCH))  # whole ones: the rounding of a sample depends on its batch
    rows = slice(BATCH * batches.start, BATCH * batches.stop)
    noise, arguments = noise[rows], {name: value[rows] for name, value in arguments.items()}
    recorded = CalibrationSet()
    if len(noise):
        with as_user_errors(ValueError, TypeError):
            recorded = dq_runtime.collect_from_scheduler(model, scheduler, noise, steps, arguments, BATCH)
    return _of_all_ranks(recorded, scheduler)


def _own_part(count: int) -> slice:
    """This rank's contiguous part of so many items."""
    number, parts = ranks.number(), ranks.count()
    return slice(count * number // parts, count * (number + 1) // parts)


def _of_all_ranks(recorded: CalibrationSet, scheduler: Any) -> CalibrationSet:
    return CalibrationSet([call for calls in ranks.exchange(recorded.calls) for call in calls], scheduler)


def repeated(call: RecordedCall, times: int) -> RecordedCall:
    """The call with each of its samples so many times."""
    rows = call.sample.shape[0]

    def repeat(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.repeat_interleave(times, 0) if tensor.ndim and len(tensor) == rows else tensor

    arguments = {
        name: value if name in call.shared else tree_map_only(torch.Tensor, repeat, value)
        for name, value in call.arguments.items()
    }
    timestep = call.timestep if call.timestep.numel() == 1 else repeat(call.timestep)
    return RecordedCall(repeat(call.sample), timestep, arguments, call.shared)
