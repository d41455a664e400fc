"""Collecting calibration data: records all calls of the model in a sampling trajectory, with their inputs.

Only inputs are recorded. Activations (for ranges and distillation) are computed by replaying the calls.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_flatten_with_path, tree_leaves, tree_map_only, tree_unflatten
from tqdm import tqdm

from dq_runtime.architectures.supported import architecture_of, is_supported, without_compilation
from dq_runtime.timesteps import NO_TIMESTEP

PLAIN = (torch.Tensor, bool, int, float, str, type(None))  # types that ``save`` can write


@dataclass(frozen=True)
class RecordedCall:
    """One call of the model, or of its architecture's entry module, with all tensors on the CPU.

    Attributes:
        sample: [B, ...].
        timestep: [1] or [B] fp32.
        arguments: the remaining keyword arguments (``encoder_hidden_states``, ``class_labels``, ...).
        shared: names of arguments without a row per sample, whatever their shape.
    """

    sample: torch.Tensor
    timestep: torch.Tensor
    arguments: dict[str, Any]
    shared: tuple[str, ...] = ()

    def run(self, model: Any) -> Any:
        """Repeats the call on a model, on its device and in its dtype, without gradients."""
        with torch.no_grad():
            return self.run_with_gradients(model)

    def run_with_gradients(self, model: Any) -> Any:
        """Like ``run``, with gradients for the model's parameters."""
        architecture = architecture_of(model)
        device, dtype = model.device, model.dtype  # read once: diffusers visits every module for them

        def place(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, dtype if tensor.is_floating_point() else None)

        arguments = {architecture.sample: self.sample, **self.arguments}
        arguments = tree_map_only(torch.Tensor, place, arguments)
        if architecture.timestep is not None:
            arguments[architecture.timestep] = self.timestep.to(device)
        return architecture.entry(model)(**arguments)


@dataclass
class CalibrationSet:
    """The recorded calls, in order.

    Attributes:
        scheduler: the diffusers scheduler that sampled. It determines the timesteps' importance. None if unknown.
    """

    calls: list[RecordedCall] = field(default_factory=list)
    scheduler: Any = None

    @property
    def timesteps(self) -> list[float]:
        """The distinct timesteps, sorted."""
        if not self.calls:
            raise ValueError("The calibration set is empty: record at least one sampling run with dq_runtime.record")
        return torch.cat([call.timestep for call in self.calls]).unique().tolist()

    @property
    def num_samples(self) -> int:
        """The number of samples in all calls together."""
        return sum(call.sample.shape[0] for call in self.calls)

    def save(self, file: str | Path) -> None:
        """Writes the set to one file. An interrupted calibration can only be resumed with the same data.

        Raises:
            ValueError: if an argument is not a tensor, number, string, None, or a container of these.
        """
        for call in self.calls:
            for path, leaf in tree_flatten_with_path(call.arguments)[0]:
                if not isinstance(leaf, PLAIN):
                    name = "".join(map(str, path))
                    raise ValueError(f"The model's argument {name} is a {type(leaf).__name__}, which cannot be saved")
        known = isinstance(self.scheduler, diffusers.ConfigMixin)
        content = {
            "calls": [(call.sample, call.timestep, call.arguments, call.shared) for call in self.calls],
            "scheduler": self.scheduler.to_json_string() if known else None,
        }
        file = Path(file)
        partial = file.with_name(f"{file.name}.partial")
        torch.save(content, partial)
        partial.replace(file)

    @classmethod
    def load(cls, file: str | Path) -> CalibrationSet:
        """Reads a file written by ``save``. The scheduler is None if diffusers has no such class.

        The tensors stay in the file and are read on use: do not modify it meanwhile (``save`` replaces it).

        Raises:
            ValueError: if the file is no calibration set, or is damaged.
        """
        try:
            content = torch.load(file, weights_only=True, mmap=True)
            calls = [RecordedCall(*call) for call in content["calls"]]
            scheduler = None if content["scheduler"] is None else json.loads(content["scheduler"])
        except (RuntimeError, EOFError, LookupError, TypeError, ValueError, pickle.UnpicklingError) as error:
            raise ValueError(f"{file} holds no calibration set: record it again") from error
        scheduler_class = getattr(diffusers, scheduler["_class_name"], None) if scheduler else None
        return cls(calls, scheduler_class.from_config(scheduler) if scheduler_class else None)


@contextmanager
def record(model: nn.Module, scheduler: Any = None) -> Iterator[CalibrationSet]:
    """Records all calls of a floating-point model inside the ``with`` block, from any caller.

    >>> with dq_runtime.record(pipeline.unet, pipeline.scheduler) as calibration_set:
    ...     pipeline("a lighthouse at dusk")

    All inputs stay in CPU memory, including a ControlNet's residuals. An argument that equals the previous call's (a
    prompt's embedding) is stored, in memory and in the file, once. A set that was saved and loaded stays on disk.

    Args:
        model: a ``UNet2DModel``, ``UNet2DConditionModel``, ``ControlNetModel``, ``FluxTransformer2DModel``, or
            ``AutoencoderKL`` (its decoder's calls are recorded).
        scheduler: the sampling scheduler. It determines the importance of each timestep in calibration.

    Raises:
        TypeError: if the model's class is not supported, or its forward lacks the sample or the timestep.
    """
    inner = without_compilation(model)
    architecture = architecture_of(inner)
    signature = architecture.signature(inner)
    # Code that is compiled already runs no new hooks, but those of the compiled module run around it.
    entry = architecture.entry(inner) if architecture.entry_name else model
    calibration_set = CalibrationSet(scheduler=scheduler)

    def to_cpu(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to("cpu", copy=True)

    def keep(argument: Any, name: str) -> Any:
        """A copy of the argument. Tensors equal to those of the previous call are reused."""
        leaves, structure = tree_flatten(tree_map_only(torch.Tensor, to_cpu, argument))
        before = tree_leaves(calibration_set.calls[-1].arguments.get(name)) if calibration_set.calls else []
        if len(before) == len(leaves):
            leaves = [old if _same(old, new) else new for old, new in zip(before, leaves, strict=True)]
        return tree_unflatten(leaves, structure)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = signature.bind(*args, **kwargs).arguments
        sample, timestep = arguments.pop(architecture.sample), NO_TIMESTEP
        if architecture.timestep is not None:
            timestep = arguments.pop(architecture.timestep)
        calibration_set.calls.append(
            RecordedCall(
                sample=to_cpu(sample),
                timestep=torch.as_tensor(timestep, dtype=torch.float32).detach().cpu().reshape(-1).clone(),
                arguments={name: keep(argument, name) for name, argument in arguments.items()},
                shared=architecture.shared_arguments,
            )
        )

    handle = entry.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield calibration_set
    finally:
        handle.remove()


def _same(old: Any, new: Any) -> bool:
    """True if both are tensors with the same dtype and content."""
    return (
        isinstance(old, torch.Tensor)
        and isinstance(new, torch.Tensor)
        and old.dtype == new.dtype
        and torch.equal(old, new)
    )


def collect_from_pipeline(
    pipeline: Any, calls: Iterable[Mapping[str, Any]], component: str | nn.Module | None = None
) -> CalibrationSet:
    """Runs a diffusers pipeline and records the calls of one of its components.

    Args:
        pipeline: a pipeline with a ``scheduler``.
        calls: the keyword arguments of each run: ``[{"prompt": "a lighthouse", "num_inference_steps": 30}, ...]``.
        component: a model that ``record`` supports, or its name in the pipeline ("controlnet", "vae"). Default: the
            ``unet``, or the ``transformer`` of a pipeline without a UNet.

    Raises:
        ValueError: if the pipeline has no such component.
        TypeError: if ``record`` does not support the component.
    """
    model = component if isinstance(component, nn.Module) else _component(pipeline, component)
    with record(model, pipeline.scheduler) as calibration_set:
        for arguments in tqdm(list(calls), desc="Collecting"):
            pipeline(**arguments)
    return calibration_set


def _component(pipeline: Any, name: str | None) -> nn.Module:
    for candidate in ("unet", "transformer") if name is None else (name,):
        model = getattr(pipeline, candidate, None)
        if model is not None:
            return model
    known = [name for name, module in pipeline.components.items() if is_supported(module)]
    raise ValueError(
        f"{type(pipeline).__name__} has no {name or 'unet and no transformer'}; its components that can be recorded "
        f"are {known}: pass one as `component`"
    )


@torch.no_grad()
def collect_from_scheduler(
    model: Any,
    scheduler: Any,
    noise: torch.Tensor,
    num_inference_steps: int,
    arguments: Mapping[str, torch.Tensor] | None = None,
    batch_size: int = 16,
) -> CalibrationSet:
    """Samples with a bare model and a diffusers scheduler, from noise to image, and records the model's calls.

    Args:
        model: a ``UNet2DModel``, ``UNet2DConditionModel`` or ``FluxTransformer2DModel`` in eval mode; dropout would
            change the trajectory.
        noise: [B, C, H, W], or [B, tokens, C] for a transformer; standard normal.
        arguments: the model's further arguments, each a tensor with B rows (``class_labels``, ...). Exceptions are the
            positions that all samples of a transformer share (``img_ids``, ``txt_ids``).
        batch_size: rows of ``noise`` that run together.

    Raises:
        TypeError: if the model's class is not supported, or the scheduler cannot use its prediction.
    """
    architecture = architecture_of(without_compilation(model))
    if not architecture.predicts:
        raise TypeError(
            f"{type(model).__name__} does not predict a sampler's next step: run its pipeline inside record(), or "
            "pass it to collect_from_pipeline as `component`"
        )
    device, dtype = model.device, model.dtype
    with record(model, scheduler) as calibration_set:
        starts = range(0, noise.shape[0], batch_size)
        with tqdm(total=len(starts) * num_inference_steps, desc="Collecting") as progress:
            for start in starts:
                rows = slice(start, start + batch_size)
                batch_arguments = {
                    name: (value if name in architecture.shared_arguments else value[rows]).to(
                        device, dtype if value.is_floating_point() else None
                    )
                    for name, value in (arguments or {}).items()
                }
                scheduler.set_timesteps(num_inference_steps)
                # Flow matching starts from unscaled noise and does not scale the model's input.
                sample = noise[rows].to(device, dtype) * getattr(scheduler, "init_noise_sigma", 1.0)
                for timestep in scheduler.timesteps:
                    scales = hasattr(scheduler, "scale_model_input")
                    scaled = scheduler.scale_model_input(sample, timestep) if scales else sample
                    inputs: dict[Any, Any] = {
                        architecture.sample: scaled,
                        architecture.timestep: architecture.timestep_argument(timestep, scaled),
                    }
                    prediction = model(**inputs, **batch_arguments).sample
                    sample = scheduler.step(prediction, timestep, sample).prev_sample
                    progress.update()
    return calibration_set
