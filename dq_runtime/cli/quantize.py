"""``dq-runtime quantize``: from a floating-point pipeline to a packed one, calibrated on images of its own."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dq_runtime
from dq_runtime import CalibrationSet, DilateQuantConfig, Distillation
from dq_runtime.calibration import ranks
from dq_runtime.calibration.settings import ERROR_FEEDBACK
from dq_runtime.cli import models, processes
from dq_runtime.cli.console import duration, say, size
from dq_runtime.cli.drawing import BATCH, record, takes
from dq_runtime.cli.errors import UserError, as_user_errors
from dq_runtime.cli.estimate import Estimate, Probe, Remaining, estimate, probe
from dq_runtime.cli.prompts import CALIBRATION_PROMPTS
from dq_runtime.cli.work_folder import WorkFolder, folder_size
from dq_runtime.convert import plan_conversion
from dq_runtime.layers import quantized_layers

PRESETS = {
    "fast": ERROR_FEEDBACK,
    "balanced": Distillation(gradient_checkpointing=True),
    "best": Distillation(gradient_checkpointing=True, polish_iterations=200),
}
UNCONDITIONAL_IMAGES = 32  # that a model without prompts draws
PROBE_STEPS = 2


@dataclass(frozen=True)
class Options:
    """The options of the command, as the user gave them."""

    model: str
    output: Path
    preset: str
    bits: int
    steps: int
    samples: int
    keep: tuple[str, ...]
    lora: Path | None
    prompts: Path | None
    seed: int
    device: str | None


def quantize(options: Options) -> dict[str, Any]:
    """Runs the command; a repeated call continues an interrupted one. Several processes share the work.

    Returns:
        the report: output, sizes in bytes, seconds, number of layers.

    Raises:
        UserError: see ``dq_runtime.cli.errors``.
    """
    with processes.together(options.device) as device:
        return _quantize(options, device)


def _quantize(options: Options, device: torch.device) -> dict[str, Any]:
    start = time.perf_counter()
    prompts = _check(options)
    settings = asdict(options) | {"prompts": prompts, "device": device.type}
    work = WorkFolder(options.output, settings | {name: str(settings[name]) for name in ("output", "lora")})
    source = models.find(options.model)
    pipeline, name, model = models.load_any(source, device)
    if options.prompts is not None and not takes(pipeline, "prompt"):
        raise UserError(f"{options.model} takes no prompts: leave out --prompts")
    before = folder_size(source.path if pipeline is None or source.kind == models.FILE else source.path / name)
    changed = () if options.lora is None else _bake(pipeline, options.lora)
    config = _config(model, options)
    distillation = replace(PRESETS[options.preset], samples=options.samples, seed=options.seed, folder=work.blocks)
    call = record(pipeline, model, prompts[:1], 1, PROBE_STEPS, options.seed).calls[-1]
    measured = probe(model, plan_conversion(model, config).layers, call)
    calls = options.steps * (len(prompts) if takes(pipeline, "prompt") else UNCONDITIONAL_IMAGES // BATCH)
    rows = call.sample.shape[0] if takes(pipeline, "prompt") else BATCH  # two with guidance
    row_bytes = call.sample[:1].nbytes
    expected = estimate(measured, calls, rows, row_bytes, _bytes_beside(pipeline, model), distillation)
    _announce(options, measured, expected, work, folder_size(source.path))
    if ranks.is_first():  # all have looked at the folder before they recorded the call together
        work.create()
    if not work.resumes:
        calibration_set = record(pipeline, model, prompts, UNCONDITIONAL_IMAGES, options.steps, options.seed)
        if ranks.is_first():
            calibration_set.save(work.calls)
        ranks.exchange(None)  # the file is written
    _move_others(pipeline, model)
    remaining = Remaining(measured, expected, work.finished_blocks())

    def progress(block: str, number: int, count: int) -> None:
        remaining(block, number, count)

    with as_user_errors(ValueError, TypeError):
        dq_runtime.calibrate(model, CalibrationSet.load(work.calls), config, replace(distillation, progress=progress))
    if ranks.is_first():
        work.publish(source, pipeline, name, model, changed)
    after = folder_size(options.output if source.kind == models.MODEL else options.output / name)
    return {
        "output": str(options.output),
        "component": name,
        "layers": len(quantized_layers(model)),
        "bytes_before": before,
        "bytes_after": after,
        "seconds": time.perf_counter() - start,
    }


def _check(options: Options) -> list[str]:
    """The prompts. UserError for values out of range, before anything is loaded."""
    if options.preset not in PRESETS:
        raise UserError(f"--preset must be {', '.join(PRESETS)}, got {options.preset}")
    if options.bits not in (8, 6, 4):
        raise UserError(f"--bits must be 8, 6 or 4, got {options.bits}")
    for option, value, least in (("--steps", options.steps, 2), ("--samples", options.samples, 1)):
        models.at_least(option, value, least)
    models.at_least("--seed", options.seed, 0)
    return list(CALIBRATION_PROMPTS) if options.prompts is None else models.read_prompts(options.prompts)


def _bake(pipeline: Any | None, file: Path) -> tuple[str, ...]:
    """Merges a LoRA into the pipeline; the names of the text encoders that it changed."""
    if pipeline is None:
        raise UserError("--lora needs a whole pipeline: give its folder instead of the UNet's")
    models.load_lora(pipeline, file)
    adapters = pipeline.get_list_adapters()
    pipeline.fuse_lora(components=list(adapters))
    pipeline.unload_lora_weights()
    return tuple(name for name in adapters if name.startswith("text_encoder"))


def _config(model: Any, options: Options) -> DilateQuantConfig:
    kept = [*models.not_converted_by_default(model), *options.keep]
    with as_user_errors(ValueError):
        config = DilateQuantConfig(activation_bits=options.bits, modules_to_not_convert=kept)
        unmatched = plan_conversion(model, config).unmatched
    for entry in options.keep:
        if f"modules_to_not_convert: {entry!r}" in unmatched:
            raise UserError(f"--keep {entry} matches no layer: give a layer's dotted name or part of one (mid_block)")
    return config


def _announce(options: Options, measured: Probe, expected: Estimate, work: WorkFolder, source_bytes: int) -> None:
    """Prints what the command will take. UserError if the disk is too small for it."""
    say(
        f"{options.model}, W4A{options.bits}, preset {options.preset}, {len(measured.blocks)} blocks"
        + ("; continues an interrupted run" if work.resumes else "")
    )
    needed = int(expected.disk) + source_bytes
    say(
        f"estimate from calls of {1000 * measured.seconds_of(1):.3g} ms (may be off by a factor of two): "
        f"{duration(expected.seconds)}, of which recording {duration(expected.collecting)}; memory "
        f"{size(expected.memory)}; disk {size(needed)}"
    )
    if work.free_bytes() < needed:
        raise UserError(
            f"{work.folder}: {size(work.free_bytes())} are free on the disk, and up to {size(needed)} are needed. Free "
            "some, or give OUT on another disk"
        )


def _others(pipeline: Any | None, model: Any) -> list[nn.Module]:
    """The pipeline's other components with weights."""
    components = [] if pipeline is None else pipeline.components.values()
    return [component for component in components if isinstance(component, nn.Module) and component is not model]


def _bytes_beside(pipeline: Any | None, model: Any) -> int:
    return sum(parameter.nbytes for component in _others(pipeline, model) for parameter in component.parameters())


def _move_others(pipeline: Any | None, model: Any) -> None:
    """Training needs the model alone on the GPU."""
    if model.device.type == "cuda":
        for component in _others(pipeline, model):
            component.to("cpu")
        torch.cuda.empty_cache()
