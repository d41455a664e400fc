"""Collecting calibration data: records all calls of the model in a sampling trajectory, with their inputs.

Only inputs are recorded. Activations (for ranges and distillation) are computed by replaying the calls.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from dq_runtime.architectures.supported import architecture_of, is_supported, without_compilation
from dq_runtime.calibration.ranks import progress_bar
from dq_runtime.calibration.tree_files import read_tree, write_tree
from dq_runtime.config import LARGEST_TIMESTEP
from dq_runtime.files import replacing
from dq_runtime.timesteps import NO_TIMESTEP
from dq_runtime.validation import check_scheduler, finite, floats, instance, integer, is_within, path, shown

MOST_TRAIN_TIMESTEPS = 10**5  # of a scheduler that is read from a file


@dataclass(frozen=True)
class RecordedCall:
    """One call of the model, or of its architecture's entry module, with all tensors on the CPU.

    Attributes:
        sample: [B, ...].
        timestep: [1] or [B] fp32.
        arguments: the remaining keyword arguments (``encoder_hidden_states``, ``class_labels``, ...).
        shared: names of arguments without a row per sample, whatever their shape.

    Raises:
        TypeError: if a field is of another class.
        ValueError: if there is no sample, or the timesteps are not finite or not one for each sample.
    """

    sample: torch.Tensor
    timestep: torch.Tensor
    arguments: dict[str, Any]
    shared: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        instance("sample", self.sample, torch.Tensor)
        instance("timestep", self.timestep, torch.Tensor)
        instance("arguments", self.arguments, Mapping)
        instance("shared", self.shared, tuple)
        batch = self.sample.shape[0] if self.sample.ndim else 0
        if not batch:
            raise ValueError(f"sample must have a row for each sample, got shape {list(self.sample.shape)}")
        timestep = self.timestep
        if timestep.ndim != 1 or timestep.numel() not in (1, batch) or timestep.is_complex():
            raise ValueError(f"timestep must be [1] or [{batch}], real, got {timestep.dtype} {list(timestep.shape)}")
        if not is_within(timestep, -LARGEST_TIMESTEP, LARGEST_TIMESTEP):
            raise ValueError(f"timestep must be finite, at most {LARGEST_TIMESTEP:g}, got {shown(timestep.tolist())}")

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
            index = architecture.looks_up_timestep(model)
            arguments[architecture.timestep] = self.timestep.to(device, torch.long if index else None)
        return architecture.entry(model)(**arguments)


@dataclass
class CalibrationSet:
    """The recorded calls, in order.

    Attributes:
        scheduler: the diffusers scheduler that sampled. It determines the timesteps' importance. None if unknown.

    Raises:
        TypeError: if a field is of another class.
    """

    calls: list[RecordedCall] = field(default_factory=list)
    scheduler: Any = None

    def __post_init__(self) -> None:
        instance("calls", self.calls, list)
        for i, call in enumerate(self.calls):
            instance(f"calls[{i}]", call, RecordedCall)
        if self.scheduler is not None:
            check_scheduler("scheduler", self.scheduler)

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
        """Writes the set to one file, readable by its owner alone. An error leaves the file that was there.

        An interrupted calibration can only be resumed with the same data.

        Raises:
            ValueError: if an argument is not a tensor, number, string, None, or a container of these.
        """
        known = isinstance(self.scheduler, diffusers.ConfigMixin)
        content = {
            "calls": [vars(call) for call in self.calls],
            "scheduler": self.scheduler.to_json_string() if known else None,
        }
        with replacing(path("file", file)) as stream:
            write_tree(stream, content)

    @classmethod
    def load(cls, file: str | Path) -> CalibrationSet:
        """Reads a file written by ``save``. The scheduler is None if diffusers has no such class.

        All checksums are compared, which reads the file once. The tensors stay in the file and are read on use: do not
        modify it meanwhile (``save`` replaces it).

        Raises:
            ValueError: if the file is no calibration set, or is damaged.
        """
        try:
            content = read_tree(path("file", file))
            return cls([RecordedCall(**call) for call in content["calls"]], _scheduler_of(content["scheduler"]))
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{file} holds no calibration set: record it again ({error})") from error


def _scheduler_of(text: str | None) -> Any:
    """The scheduler of a config; None if diffusers has no class of that name.

    Raises:
        ValueError: if it is no scheduler, or a larger one than any in use.
    """
    if text is None:
        return None
    config = json.loads(text)
    scheduler_class = getattr(diffusers, config["_class_name"], None)
    if scheduler_class is None:
        return None
    if not isinstance(scheduler_class, type) or not issubclass(scheduler_class, diffusers.SchedulerMixin):
        raise ValueError(f"{config['_class_name']} is no scheduler")
    integer("num_train_timesteps", config.get("num_train_timesteps", 1), 1, MOST_TRAIN_TIMESTEPS)
    return scheduler_class.from_config(config)


def record(model: nn.Module, scheduler: Any = None) -> AbstractContextManager[CalibrationSet]:
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
        TypeError: if the model's class is not supported, its forward lacks the sample or the timestep, or the scheduler
            is none. A call whose timestep is not finite is a ValueError.
    """
    inner = without_compilation(model)
    return _recording(model, architecture_of(inner).signature(inner), CalibrationSet(scheduler=scheduler))


@contextmanager
def _recording(
    model: nn.Module, signature: inspect.Signature, calibration_set: CalibrationSet
) -> Iterator[CalibrationSet]:
    inner = without_compilation(model)
    architecture = architecture_of(inner)
    # Code that is compiled already runs no new hooks, but those of the compiled module run around it.
    entry = architecture.entry(inner) if architecture.entry_name else model

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
        instance(architecture.sample, sample, torch.Tensor)
        calibration_set.calls.append(
            RecordedCall(
                sample=to_cpu(sample),
                timestep=torch.as_tensor(timestep, dtype=torch.float32).detach().cpu().reshape(-1).clone(),
                arguments={name: keep(argument, name) for name, argument in arguments.items()},
                shared=architecture.shared_arguments,
            )
        )

    handle: Any = None
    try:
        handle = entry.register_forward_pre_hook(hook, with_kwargs=True)
        yield calibration_set
        handle.remove()
    except BaseException:  # Ctrl-C may also come just before the removal
        if handle is not None:
            handle.remove()
        raise


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
        ValueError: if the pipeline has no such component, or there are no calls.
        TypeError: if ``record`` does not support the component, or an argument is of another class.
    """
    if not callable(pipeline) or not hasattr(pipeline, "scheduler"):
        raise TypeError(f"pipeline must be a diffusers pipeline with a scheduler, got {shown(pipeline)}")
    if component is not None:
        instance("component", component, str, nn.Module)
    model = component if isinstance(component, nn.Module) else _component(pipeline, component)
    recording = record(model, pipeline.scheduler)
    instance("calls", calls, Iterable)
    if isinstance(calls, (Mapping, str)):
        raise TypeError(f"calls must be a list of dicts, one for each run of the pipeline, got {shown(calls)}")
    calls = list(calls)
    if not calls:
        raise ValueError("calls must hold the keyword arguments of at least one run, got none")
    for i, arguments in enumerate(calls):
        instance(f"calls[{i}]", arguments, Mapping)
    with recording as calibration_set:
        for arguments in progress_bar(calls, desc="Collecting"):
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


def _check_step(scheduler: Any) -> None:
    """Raises TypeError if a step needs more than the prediction, the timestep and the sample."""
    known, parameters = 3, list(inspect.signature(getattr(scheduler, "step", lambda: None)).parameters.values())
    more = [p.name for p in parameters[known:] if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if len(parameters) < known or more:
        raise TypeError(
            f"{type(scheduler).__name__} has no step from a prediction, a timestep and a sample"
            + (f" alone: it needs {', '.join(more)}" if more else "")
            + ". Run its pipeline inside record()"
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
        TypeError: if the model's class is not supported, the scheduler cannot use its prediction, or an argument is of
            another class.
        ValueError: if a value is out of range or not finite, or an argument has not B rows.
    """
    architecture = architecture_of(without_compilation(model))
    if not architecture.predicts:
        raise TypeError(
            f"{type(model).__name__} does not predict a sampler's next step: run its pipeline inside record(), or "
            "pass it to collect_from_pipeline as `component`"
        )
    check_scheduler("scheduler", scheduler)
    _check_step(scheduler)
    integer("num_inference_steps", num_inference_steps, 1)
    integer("batch_size", batch_size, 1)
    instance("noise", noise, torch.Tensor)
    floats("noise", noise, max(noise.ndim, 2))
    instance("arguments", arguments, Mapping, type(None))
    for name, value in (arguments or {}).items():
        instance(f"arguments[{shown(name)}]", value, torch.Tensor)
        finite(f"arguments[{shown(name)}]", value)
        if name not in architecture.shared_arguments and value.shape[:1] != noise.shape[:1]:
            raise ValueError(
                f"arguments[{shown(name)}] must have {noise.shape[0]} rows, like noise, got shape {list(value.shape)}"
            )
    device, dtype = model.device, model.dtype
    with record(model, scheduler) as calibration_set:
        starts = range(0, noise.shape[0], batch_size)
        with progress_bar(total=len(starts) * num_inference_steps, desc="Collecting") as progress:
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
