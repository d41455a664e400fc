"""Collecting calibration data: every call that a sampling trajectory makes of the UNet, with its inputs.

The inputs are recorded, not the activations: whoever needs activations (ranges, distillation) replays the calls.
"""

from __future__ import annotations

import inspect
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

PLAIN = (torch.Tensor, bool, int, float, str, type(None))  # what a file can hold


@dataclass(frozen=True)
class UNetCall:
    """One call of the UNet, on the CPU.

    Attributes:
        sample: [B, C, H, W].
        timestep: [1] or [B] fp32.
        arguments: the remaining keyword arguments (``encoder_hidden_states``, ``class_labels``, ...).
    """

    sample: torch.Tensor
    timestep: torch.Tensor
    arguments: dict[str, Any]

    def run(self, unet: Any) -> Any:
        """Calls a UNet with these inputs, on its device and in its dtype, without gradients."""
        with torch.no_grad():
            return self.run_with_gradients(unet)

    def run_with_gradients(self, unet: Any) -> Any:
        """The same, such that the UNet's parameters get gradients."""
        device, dtype = unet.device, unet.dtype  # once: diffusers looks at every module to tell

        def place(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, dtype if tensor.is_floating_point() else None)

        arguments = tree_map_only(torch.Tensor, place, self.arguments)
        return unet(place(self.sample), self.timestep.to(device), **arguments)


@dataclass
class CalibrationSet:
    """The recorded calls, in order.

    Attributes:
        scheduler: diffusers' that sampled, which tells how much each timestep matters to the image; None: not known.
    """

    calls: list[UNetCall] = field(default_factory=list)
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
                    raise ValueError(f"The UNet's argument {name} is a {type(leaf).__name__}, which cannot be saved")
        known = isinstance(self.scheduler, diffusers.ConfigMixin)
        content = {
            "calls": [(call.sample, call.timestep, call.arguments) for call in self.calls],
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
            calls = [UNetCall(*call) for call in content["calls"]]
            scheduler = None if content["scheduler"] is None else json.loads(content["scheduler"])
        except (RuntimeError, EOFError, LookupError, TypeError, ValueError, pickle.UnpicklingError) as error:
            raise ValueError(f"{file} holds no calibration set: record it again") from error
        scheduler_class = getattr(diffusers, scheduler["_class_name"], None) if scheduler else None
        return cls(calls, scheduler_class.from_config(scheduler) if scheduler_class else None)


@contextmanager
def record(unet: nn.Module, scheduler: Any = None) -> Iterator[CalibrationSet]:
    """Records every call of a floating-point UNet that is made inside the ``with`` block, whoever makes it.

    >>> with dq_runtime.record(pipeline.unet, pipeline.scheduler) as calibration_set:
    ...     pipeline("a lighthouse at dusk")

    All that the UNet is called with stays in the CPU's memory, a ControlNet's residuals too; what one call shares with
    the call before it (a prompt's embedding) is held, and saved, once. A set that was saved and loaded stays on disk.

    Args:
        scheduler: the one that samples; from it calibration learns how much each timestep matters.
    """
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
        arguments = inspect.signature(unet.forward).bind(*args, **kwargs).arguments
        sample, timestep = arguments.pop("sample"), arguments.pop("timestep")
        calibration_set.calls.append(
            UNetCall(
                sample=to_cpu(sample),
                timestep=torch.as_tensor(timestep, dtype=torch.float32).detach().cpu().reshape(-1).clone(),
                arguments={name: keep(argument, name) for name, argument in arguments.items()},
            )
        )

    handle = unet.register_forward_pre_hook(hook, with_kwargs=True)
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


def collect_from_pipeline(pipeline: Any, calls: Iterable[Mapping[str, Any]]) -> CalibrationSet:
    """Runs a diffusers pipeline and records the calls of its UNet.

    Args:
        pipeline: with a ``unet`` and a ``scheduler``.
        calls: the keyword arguments of each run: ``[{"prompt": "a lighthouse", "num_inference_steps": 30}, ...]``.
    """
    with record(pipeline.unet, pipeline.scheduler) as calibration_set:
        for arguments in tqdm(list(calls), desc="Collecting"):
            pipeline(**arguments)
    return calibration_set


@torch.no_grad()
def collect_from_scheduler(
    unet: Any,
    scheduler: Any,
    noise: torch.Tensor,
    num_inference_steps: int,
    arguments: Mapping[str, torch.Tensor] | None = None,
    batch_size: int = 16,
) -> CalibrationSet:
    """Samples with a bare UNet and a diffusers scheduler, from noise to image, and records the UNet's calls.

    Args:
        unet: in eval mode; dropout would change the trajectory.
        noise: [B, C, H, W], standard normal.
        arguments: the UNet's further arguments, each a tensor with B rows (``class_labels``, ...).
        batch_size: rows of ``noise`` that run together.
    """
    device, dtype = unet.device, unet.dtype
    with record(unet, scheduler) as calibration_set:
        starts = range(0, noise.shape[0], batch_size)
        with tqdm(total=len(starts) * num_inference_steps, desc="Collecting") as progress:
            for start in starts:
                rows = slice(start, start + batch_size)
                batch_arguments = {
                    name: value[rows].to(device, dtype if value.is_floating_point() else None)
                    for name, value in (arguments or {}).items()
                }
                scheduler.set_timesteps(num_inference_steps)
                sample = noise[rows].to(device, dtype) * scheduler.init_noise_sigma
                for timestep in scheduler.timesteps:
                    scaled = scheduler.scale_model_input(sample, timestep)
                    prediction = unet(scaled, timestep, **batch_arguments).sample
                    sample = scheduler.step(prediction, timestep, sample).prev_sample
                    progress.update()
    return calibration_set
