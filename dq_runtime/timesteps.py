"""The timesteps of a quantized model: which row of the activation tables each sample of a forward pass uses.

At every forward the model's own timestep argument is mapped, on the device and without a sync, to an int32 index per
sample. There is no step counter: a call may repeat a timestep, skip some, start mid-way or mix several in one batch. A
model without timesteps has one row.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import nn

from dq_runtime.architectures.supported import architecture_of

NO_TIMESTEP = 0.0  # stands for that of a model without timesteps


def grouped(timesteps: Sequence[float], groups: int | None) -> list[float]:
    """The middles of so many groups of neighbours, as equal in number as can be; all timesteps by default.

    Fewer where a middle is no timestep's nearest: timesteps may lie far apart.
    """
    if groups is None or groups >= len(timesteps):
        return list(timesteps)
    ends = [round(i * len(timesteps) / groups) for i in range(groups + 1)]
    middles = [(timesteps[start] + timesteps[end - 1]) / 2 for start, end in itertools.pairwise(ends)]
    return [middles[i] for i in sorted(set(TimestepGrid(middles).rows_of(timesteps)))]


class TimestepGrid(nn.Module):
    """The sorted timesteps that a model was calibrated on, and the index that its layers read.

    Args:
        timesteps: the T calibrated timesteps, in the unit of the model's timestep argument.
    """

    # Neither is a buffer: offloaders take those away until the model's forward, which comes after this is read, and
    # torch.compile compiles again when one is replaced.
    boundaries: torch.Tensor  # [T - 1] fp32, half-way between neighbouring timesteps
    index: torch.Tensor  # [B] int32, of the current forward pass; empty outside of one
    uniform: bool  # whether the model was given one timestep for all samples
    hooks: list[Any]  # of the model, which call the methods below
    # Of the model's forward: its parameters in order, and which of them are the sample and the timestep.
    parameter_names: tuple[str, ...] = ("sample", "timestep")
    sample: str = "sample"
    timestep: str | None = "timestep"

    def __init__(self, timesteps: Sequence[float]) -> None:
        super().__init__()
        if not timesteps or sorted(set(timesteps)) != list(timesteps):
            raise ValueError(f"timesteps must be a sorted list without repeats, got {timesteps}")
        values = torch.tensor(timesteps, dtype=torch.float32, device="cpu")  # also where models are made on meta
        self.num_timesteps = len(timesteps)
        self.boundaries = (values[1:] + values[:-1]) / 2
        self.index = torch.empty(0, dtype=torch.int32)
        self.uniform = False
        self.hooks = []

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        device = fn(self.boundaries).device
        if device.type != "meta":
            self.boundaries = self.boundaries.to(device)
        return self

    def nearest(self, timestep: torch.Tensor | float, batch_size: int, device: torch.device) -> torch.Tensor:
        """The index of the grid point nearest to each sample's timestep; ties go to the smaller one.

        Args:
            timestep: a number, or a tensor of any real dtype that is 0-d, [1] or [batch_size].

        Returns:
            [batch_size] int32 on ``device``.

        Raises:
            TypeError: if the timestep is no real number.
            ValueError: if its shape is another one.
        """
        if not isinstance(timestep, torch.Tensor):
            if isinstance(timestep, bool) or not isinstance(timestep, Real):
                raise TypeError(f"timestep must be an int, a float or a tensor of them, got {type(timestep).__name__}")
            timestep = torch.full((1,), float(timestep), dtype=torch.float32, device=device)
        if timestep.dtype == torch.bool or timestep.is_complex():
            raise TypeError(f"timestep must hold integers or floats, got {timestep.dtype}")
        if timestep.ndim > 1 or timestep.numel() not in (1, batch_size):
            raise ValueError(
                f"timestep must be a scalar or hold one entry for each of the {batch_size} samples, "
                f"got shape {list(timestep.shape)}"
            )
        timestep = timestep.to(device=device, dtype=torch.float32).reshape(-1).expand(batch_size)
        return torch.bucketize(timestep.contiguous(), self.boundaries.to(device), out_int32=True)

    def rows_of(self, timesteps: Sequence[float]) -> list[int]:
        """The index of the grid point nearest to each of some timesteps."""
        values = torch.tensor(timesteps)
        return self.nearest(values, len(timesteps), values.device).tolist()

    def follow(self, model: nn.Module) -> Any:
        """Fills ``index`` at every call of a model from now on; returns the hook's handle.

        Raises:
            TypeError: if the model's class is not known, or its forward lacks the sample or the timestep.
        """
        architecture = architecture_of(model)
        self.parameter_names = tuple(architecture.signature(model).parameters)
        self.sample, self.timestep = architecture.sample, architecture.timestep
        return architecture.entry(model).register_forward_pre_hook(self.before_forward, with_kwargs=True)

    def attach(self, model: nn.Module) -> None:
        """The same, and empties ``index`` at the end of each call, one that fails included."""
        entry = architecture_of(model).entry(model)
        self.hooks = [self.follow(model), entry.register_forward_hook(self.after_forward, always_call=True)]

    def before_forward(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The forward pre-hook: fills ``index`` from the sample and the timestep."""
        arguments = {**dict(zip(self.parameter_names, args, strict=False)), **kwargs}
        sample = arguments.get(self.sample)
        if sample is None or (self.timestep is not None and self.timestep not in arguments):
            return  # forward itself says so
        timestep = NO_TIMESTEP if self.timestep is None else arguments[self.timestep]
        self.index = self.nearest(timestep, sample.shape[0], sample.device)
        self.uniform = not isinstance(timestep, torch.Tensor) or timestep.numel() == 1

    def after_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """The forward hook: without it a bare ``forward(...)``, which runs no hooks, would use an old timestep."""
        self.index = self.index.new_empty(0)
