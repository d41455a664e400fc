"""The timesteps of a quantized model: they select a row of the activation tables for each sample of a forward pass.

Each forward maps the model's own timestep argument, on the device and without a sync, to one int32 index per sample.
There is no step counter: a call may repeat a timestep, skip some, start mid-way or mix several in one batch. A model
without timesteps has one row.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import nn

from dq_runtime.architectures.supported import architecture_of

NO_TIMESTEP = 0.0  # the grid's only point for a model without timesteps


def grouped(timesteps: Sequence[float], groups: int | None) -> list[float]:
    """The midpoints of groups of neighbouring timesteps of nearly equal size; without ``groups``, all timesteps.

    A midpoint that is nearest to no timestep is left out: timesteps may be unevenly spaced.
    """
    if groups is None or groups >= len(timesteps):
        return list(timesteps)
    ends = [round(i * len(timesteps) / groups) for i in range(groups + 1)]
    middles = [(timesteps[start] + timesteps[end - 1]) / 2 for start, end in itertools.pairwise(ends)]
    return [middles[i] for i in sorted(set(TimestepGrid(middles).rows_of(timesteps)))]


class TimestepGrid(nn.Module):
    """The sorted timesteps that a model was calibrated on, and the row index that its layers read.

    Args:
        timesteps: the T calibrated timesteps, in the unit of the model's timestep argument.
    """

    # Neither is a buffer: offloaders load buffers after the pre-hook that reads these, and torch.compile recompiles if
    # a buffer is replaced.
    boundaries: torch.Tensor  # [T - 1] fp32, half-way between neighbouring timesteps
    index: torch.Tensor  # [B] int32, of the current forward pass; empty outside of one
    uniform: bool  # True if the call had one timestep for all samples
    hooks: list[Any]  # hooks of the model that call the methods below
    # Names of the parameters of the model's forward: all in order, the sample's and the timestep's.
    parameter_names: tuple[str, ...] = ("sample", "timestep")
    sample: str = "sample"
    timestep: str | None = "timestep"

    def __init__(self, timesteps: Sequence[float]) -> None:
        super().__init__()
        if not timesteps or sorted(set(timesteps)) != list(timesteps):
            raise ValueError(f"timesteps must be a sorted list without repeats, got {timesteps}")
        values = torch.tensor(timesteps, dtype=torch.float32, device="cpu")  # even under a default device of meta
        self.num_timesteps = len(timesteps)
        self.boundaries = (values[1:] + values[:-1]) / 2
        self._no_index = self.index = torch.empty(0, dtype=torch.int32)
        self.uniform = False
        self.hooks = []

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        device = fn(self.boundaries).device
        if device.type != "meta":
            self.boundaries = self.boundaries.to(device)
        return self

    def nearest(self, timestep: torch.Tensor | float, batch_size: int, device: torch.device) -> torch.Tensor:
        """The index of the grid point nearest to each sample's timestep; a tie selects the smaller point.

        Args:
            timestep: a number, or a tensor of any real dtype that is 0-d, [1] or [batch_size].

        Returns:
            [batch_size] int32 on ``device``.

        Raises:
            TypeError: if the timestep is not a real number.
            ValueError: if its shape does not fit, or a number is NaN. Values of tensors are not read.
        """
        if not isinstance(timestep, torch.Tensor):
            if isinstance(timestep, bool) or not isinstance(timestep, Real):
                raise TypeError(f"timestep must be an int, a float or a tensor of them, got {type(timestep).__name__}")
            if math.isnan(timestep):
                raise ValueError("timestep must be a number, got NaN")
            timestep = torch.full((1,), float(timestep), dtype=torch.float32, device=device)
        if timestep.dtype == torch.bool or timestep.is_complex():
            raise TypeError(f"timestep must hold integers or floats, got {timestep.dtype}")
        if timestep.ndim > 1 or timestep.numel() not in (1, batch_size):
            raise ValueError(
                f"timestep must be a scalar or hold one entry for each of the {batch_size} samples, "
                f"got shape {list(timestep.shape)}"
            )
        values = torch.empty(batch_size, dtype=torch.float32, device=device).copy_(timestep.reshape(-1))
        return torch.bucketize(values, self.boundaries.to(device), out_int32=True)

    def rows_of(self, timesteps: Sequence[float]) -> list[int]:
        """The index of the grid point nearest to each timestep."""
        values = torch.tensor(timesteps)
        return self.nearest(values, len(timesteps), values.device).tolist()

    def follow(self, model: nn.Module) -> Any:
        """Registers a hook that fills ``index`` at every call of a model; returns the hook's handle.

        Raises:
            TypeError: if the model's class is not supported, or its forward lacks the sample or the timestep.
        """
        architecture = architecture_of(model)
        self.parameter_names = tuple(architecture.signature(model).parameters)
        self.sample, self.timestep = architecture.sample, architecture.timestep
        return architecture.entry(model).register_forward_pre_hook(self.before_forward, with_kwargs=True)

    def attach(self, model: nn.Module) -> None:
        """Registers hooks that fill ``index`` at every call of a model and clear it after, even if the call fails."""
        entry = architecture_of(model).entry(model)
        self.hooks = [self.follow(model), entry.register_forward_hook(self.after_forward, always_call=True)]

    def before_forward(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The forward pre-hook: fills ``index`` from the sample and the timestep."""
        arguments = {**dict(zip(self.parameter_names, args, strict=False)), **kwargs}
        sample = arguments.get(self.sample)
        if sample is None or (self.timestep is not None and self.timestep not in arguments):
            return  # forward itself raises
        timestep = NO_TIMESTEP if self.timestep is None else arguments[self.timestep]
        if self.boundaries.device != sample.device and not sample.is_meta:
            self.boundaries = self.boundaries.to(sample.device)  # weights were loaded there without a move
        self.index = self.nearest(timestep, sample.shape[0], sample.device)
        self.uniform = not isinstance(timestep, torch.Tensor) or timestep.numel() == 1

    def after_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """The forward hook: clears ``index``, or a bare ``forward(...)``, which runs no hooks, would use an old one."""
        self.index = self._no_index  # not a new tensor: torch.compile would compile this hook as a graph of its own
