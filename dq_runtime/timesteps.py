"""The timesteps of a quantized model: they select a row of the activation tables for each sample of a forward pass.

Each forward maps the model's own timestep argument, on the device and without a sync, to one int32 index per sample.
There is no step counter: a call may repeat a timestep, skip some, start mid-way or mix several in one batch. A model
without timesteps has one row.

The index also carries what int8 cannot hold: an operator that quantizes a NaN or an infinity makes the sample's index
negative, and from there on the call's results for this sample are NaN (``dq_kernels.reference``). So all layers of a
call read one tensor, and each call makes a new one.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from numbers import Real
from typing import Any

import torch
from torch import nn

from dq_runtime.architectures.supported import architecture_of
from dq_runtime.call_state import CallState

NO_TIMESTEP = 0.0  # the grid's only point for a model without timesteps
NO_INDEX = torch.empty(0, dtype=torch.int32)  # outside of a forward pass


def grouped(timesteps: Sequence[float], groups: int | None) -> list[float]:
    """The midpoints of groups of neighbouring timesteps of nearly equal size; without ``groups``, all timesteps.

    A midpoint that is nearest to no timestep is left out: timesteps may be unevenly spaced.
    """
    if groups is None or groups >= len(timesteps):
        return list(timesteps)
    ends = [round(i * len(timesteps) / groups) for i in range(groups + 1)]
    middles = [(timesteps[start] + timesteps[end - 1]) / 2 for start, end in itertools.pairwise(ends)]
    return [middles[i] for i in sorted(set(TimestepGrid(middles).rows_of(timesteps)))]


def _middles(values: torch.Tensor) -> torch.Tensor:
    """Half-way between neighbours, [T] fp32 -> [T - 1] fp32, rounded down: so the neighbours lie on both sides.

    Schedulers of two stages give timesteps that differ in the last bit.
    """
    exact = (values[1:].double() + values[:-1].double()) / 2
    middles = exact.float()
    return torch.where(middles > exact, torch.nextafter(middles, values[:-1]), middles)


class _Rows:
    """The rows of the tables in a forward pass."""

    def __init__(self) -> None:
        self.index = NO_INDEX
        self.uniform = False
        self.thread = 0  # that the call runs in
        self.copies: dict[tuple[int, torch.device], torch.Tensor] = {}  # of index, in this call


class TimestepGrid(nn.Module):
    """The sorted timesteps that a model was calibrated on, and the row index that its layers read.

    Args:
        timesteps: the T calibrated timesteps, in the unit of the model's timestep argument.
    """

    # Neither is a buffer: offloaders load buffers after the pre-hook that reads these, and torch.compile recompiles if
    # a buffer is replaced.
    boundaries: torch.Tensor  # [T - 1] fp32, half-way between neighbouring timesteps
    calls: CallState[_Rows]
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
        self.boundaries = _middles(values)
        self.calls = CallState(_Rows)
        self.hooks = []

    @property
    def index(self) -> torch.Tensor:
        """The row for each sample of the forward pass that runs in this thread, [B] int32; empty outside of one."""
        return self._rows().index

    @index.setter
    def index(self, rows: torch.Tensor) -> None:
        self.calls.now().index = rows

    @property
    def uniform(self) -> bool:
        """True if the call has one timestep for all samples."""
        return self._rows().uniform

    def _rows(self) -> _Rows:
        """Those of this thread; those of compiled code, if it was called with the timestep and calls back."""
        rows = self.calls.now()
        return rows if rows.index.numel() else self.calls.of_compiled_code

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
        values = torch.tensor(timesteps, dtype=torch.float32)
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
        """The forward pre-hook: fills ``index`` from the sample and the timestep.

        Raises:
            RuntimeError: under ``torch.jit.trace``, which would record one timestep's scales.
        """
        if not torch.compiler.is_compiling() and torch.jit.is_tracing():
            raise RuntimeError(
                f"{type(module).__name__} is quantized to INT4, which torch.jit.trace and the older ONNX export cannot "
                "record: use torch.compile or torch.export, or dequantize() it first"
            )
        arguments = {**dict(zip(self.parameter_names, args, strict=False)), **kwargs}
        sample = arguments.get(self.sample)
        if sample is None or (self.timestep is not None and self.timestep not in arguments):
            return  # forward itself raises
        timestep = NO_TIMESTEP if self.timestep is None else arguments[self.timestep]
        if self.boundaries.device != sample.device and not sample.is_meta:
            self.boundaries = self.boundaries.to(sample.device)  # weights were loaded there without a move
        if not torch.compiler.is_compiling():
            self._take_turn(module)
        index = self.nearest(timestep, sample.shape[0], sample.device)
        uniform = not isinstance(timestep, torch.Tensor) or timestep.numel() == 1
        for rows in self.calls.all_of_call():
            rows.index, rows.uniform, rows.copies = index, uniform, {}
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._keep_timesteps_of_checkpoints(module)

    def copied_index(self, batch_size: int, device: torch.device) -> torch.Tensor:
        """The index on another device or, if all samples have one timestep, for another batch: one copy a call."""
        rows = self._rows()
        known = rows.copies.get((batch_size, device))
        if known is None:
            index = rows.index
            if batch_size != index.shape[0]:
                index = index.max().expand(batch_size).contiguous()  # samples that are not finite have a smaller one
            known = rows.copies[batch_size, device] = index.to(device)
        return known

    def after_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """The forward hook: clears ``index``, or a bare ``forward(...)``, which runs no hooks, would use an old one."""
        # Not a new tensor: torch.compile would compile this hook as a graph of its own.
        for rows in self.calls.all_of_call():
            if torch.compiler.is_compiling() or rows.thread == threading.get_ident():
                rows.index = NO_INDEX
                rows.copies.clear()

    def _take_turn(self, model: nn.Module) -> None:
        """Marks the rows of this call with its thread.

        Raises:
            RuntimeError: if a call runs in another thread, and compiled blocks would read this call's rows in it.
        """
        thread, compiled = threading.get_ident(), self.calls.of_compiled_code
        if (
            compiled.index.numel()
            and compiled.thread != thread
            and any(other.ident == compiled.thread for other in threading.enumerate())
            and any(getattr(part, "_compiled_call_impl", None) is not None for part in model.modules())
        ):
            raise RuntimeError(
                "A model with compiled blocks was called while it runs in another thread. Call it in turns, with a "
                "lock, or give each thread a copy of it"
            )
        self.calls.now().thread = compiled.thread = thread

    def _keep_timesteps_of_checkpoints(self, model: nn.Module) -> None:
        """Makes gradient checkpointing run its blocks again, in the backward pass, with the timesteps of this call."""
        for module in model.modules():
            function = module.__dict__.get("_gradient_checkpointing_func")
            if function is not None and not isinstance(function, _Checkpointing):
                module.__dict__["_gradient_checkpointing_func"] = _Checkpointing(function, self)

    @contextlib.contextmanager
    def at(self, index: torch.Tensor, uniform: bool) -> Iterator[None]:
        """Runs layers with the given rows."""
        rows = self.calls.now()
        before = rows.index, rows.uniform, rows.copies
        rows.index, rows.uniform, rows.copies = index, uniform, {}
        try:
            yield
        finally:
            rows.index, rows.uniform, rows.copies = before


class _Checkpointing:
    """A function for gradient checkpointing whose recomputation has the timesteps of the first computation."""

    def __init__(self, function: Callable[..., Any], grid: TimestepGrid) -> None:
        self._function = function
        self._grid = grid

    def __call__(self, block: Callable[..., Any], *args: Any) -> Any:
        index, uniform = self._grid.index, self._grid.uniform

        def run(*args: Any) -> Any:
            with self._grid.at(index, uniform):
                return block(*args)

        return self._function(run, *args)
