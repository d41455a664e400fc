"""Collecting calibration data: every call that a sampling trajectory makes of the model, with its inputs.

The inputs are recorded, not the activations: whoever needs activations (ranges, distillation) replays the calls.
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

from dq_runtime.architectures.supported import architecture_of, is_supported
from dq_runtime.timesteps import NO_TIMESTEP

PLAIN = (torch.Tensor, bool, int, float, str, type(None))  # what a file can hold


@dataclass(frozen=True)
class RecordedCall:
    """One call of the model, or of that part of it which its architecture calls the entry, on the CPU.

    Attributes:
        sample: [B, ...].
        timestep: [1] or [B] fp32.
        arguments: the remaining keyword arguments (``encoder_hidden_states``, ``class_labels``, ...).
        shared: names of those that hold no row for each sample, whatever their shape.
    """

    sample: torch.Tensor
    timestep: torch.Tensor
    arguments: dict[str, Any]
    shared: tuple[str, ...] = ()

    def run(self, model: Any) -> Any:
        """Makes the same call of a model, on its device and in its dtype, without gradients."""
        with torch.no_grad():
            return self.run_with_gradients(model)

    def run_with_gradients(self, model: Any) -> Any:
        """The same, such that the model's parameters get gradients."""
        architecture = architecture_of(model)
        device, dtype = model.device, model.dtype  # once: diffusers looks at every module to tell

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
        scheduler: diffusers' that sampled, which tells how much each timestep matters to the image; None: not known.
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
        """Of all calls together."""
        return sum(call.sample.shape[0] for call in self.calls)

    def save(self, file: str | Path) -> None:
        """Writes everything to one file: an interrupted calibration goes on with the same data only.

        Raises:
            ValueError: for an argument that is neither tensor, number, string nor None, or a container of such.
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
        """What ``save`` has written. A scheduler that diffusers does not have is None.

        The tensors stay in the file and are read when they are used: do not change it meanwhile (``save`` replaces it).

        Raises:
            ValueError: if the file is no calibration set, or was damaged.
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
    """Records every call of a floating-point model that is made inside the ``with`` block, whoever makes it.

    >>> with dq_runtime.record(pipeline.unet, pipeline.scheduler) as calibration_set:
    ...     pipeline("a lighthouse at dusk")

    All that the model is called with stays in the CPU's memory, a ControlNet's residuals too; what one call shares with
    the call before it (a prompt's embedding) is held, and saved, once. A set that was saved and loaded stays on disk.

    Args:
        model: a ``UNet2DModel``, ``UNet2DConditionModel``, ``ControlNetModel``, ``FluxTransformer2DModel``, or
            ``AutoencoderKL``, of which the calls of its decoder are recorded.
        scheduler: the one that samples; from it calibration learns how much each timestep matters.

    Raises:
        TypeError: for another model, or one whose forward lacks the sample or the timestep.
    """
    architecture = architecture_of(model)
    signature = architecture.signature(model)
    calibration_set = CalibrationSet(scheduler=scheduler)

    def to_cpu(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to("cpu", copy=True)

    def keep(argument: Any, name: str) -> Any:
        """A copy, or that of the call before if it is the same."""
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

    handle = architecture.entry(model).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield calibration_set
    finally:
        handle.remove()


def _same(old: Any, new: Any) -> bool:
    """Whether both are tensors with the same content."""
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
        pipeline: with a ``scheduler``.
        calls: the keyword arguments of each run: ``[{"prompt": "a lighthouse", "num_inference_steps": 30}, ...]``.
        component: which of the models that ``record`` takes: its name in the pipeline ("controlnet", "vae") or itself;
            by default the ``unet``, or the ``transformer`` of a pipeline that has none.

    Raises:
        ValueError: if the pipeline has no such component.
        TypeError: if the component is no model that ``record`` takes.
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
        f"are {known}: name one as `component`"
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
        noise: [B, C, H, W], of a transformer [B, tokens, C]; standard normal.
        arguments: the model's further arguments, each a tensor with B rows (``class_labels``, ...), but for the
            positions that all samples of a transformer share (``img_ids``, ``txt_ids``).
        batch_size: rows of ``noise`` that run together.

    Raises:
        TypeError: if the model's class is not known, or it does not predict what the scheduler takes.
    """
    architecture = architecture_of(model)
    if not architecture.predicts:
        raise TypeError(
            f"{type(model).__name__} does not predict a sampler's next step: run its pipeline inside of record(), or "
            "give it to collect_from_pipeline as `component`"
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
                # Flow matching starts from the noise itself and scales nothing.
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
