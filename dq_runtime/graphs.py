"""CUDA graphs: a model's whole forward pass as one launch.

A quantized model runs hundreds of short kernels; launching them from Python takes longer than running them on a GPU.
The activation scales are selected on the device, so one captured forward is valid for every timestep.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from dq_runtime.architectures.supported import architecture_of
from dq_runtime.captured_state import ModelState, runs_python
from dq_runtime.rollback import unchanged_on_error
from dq_runtime.validation import integer

WARM_UP_CALLS = 3
CONSTANTS = (int, float, str, type(None), torch.dtype)  # immutable arguments: the kernels contain them
SCALAR = torch.Size([])


class Call(NamedTuple):
    """The arguments of one call.

    Attributes:
        key: equal for calls that one graph can serve.
        arguments: sorted by name, without the timestep.
        tensors: all tensors in them, in order.
        timestep: a tensor, or a number, which is written to the graph's tensor of ``timestep_dtype``.
    """

    key: tuple[Hashable, ...]
    arguments: dict[str, Any]
    tensors: list[torch.Tensor]
    timestep: Any
    timestep_dtype: torch.dtype | None


class CapturedForward(NamedTuple):
    """A graph with its input and output tensors.

    Attributes:
        inputs: for each dtype, positions in ``Call.tensors`` and the tensors that the graph reads.
        outputs, structure: leaves and structure of the result.
    """

    graph: torch.cuda.CUDAGraph
    inputs: list[tuple[list[int], list[torch.Tensor]]]
    timestep: Any  # a tensor, or None
    outputs: list[Any]
    structure: Any


class CudaGraphRunner:
    """Captures a model's forward once per combination of input shapes, and replays it.

    It stands in for the call of the model's entry, hooks included, so the timestep is mapped inside of the graph.

    Changes of the model (see ``ModelState``) are found while the GPU runs the graph; then the result is discarded, and
    the forward is captured again, or runs eagerly if the model has hooks. No replay reads freed memory: it is reported
    when it is freed. Settings of PyTorch, such as TF32, are those of the capture.

    Threads: a lock is held during the copy of the inputs, the launch, and the copies of the results, so calls of
    several threads run one after another. If a call is on another stream than the call before, its stream waits for
    that stream. Changing a model while another thread calls it is not supported.

    Args:
        model: on a CUDA device, quantized or not.
        max_graphs: beyond these, the least recently used graph is freed.
    """

    _state: ModelState  # at the captures

    def __init__(self, model: Any, max_graphs: int = 8) -> None:
        self.model, self.max_graphs = model, integer("max_graphs", max_graphs, 1)
        architecture = architecture_of(model)
        self.entry: Any = architecture.entry(model)  # the module whose calls are replaced
        self.replaced = self.entry._compiled_call_impl  # of ``compile()``
        self._sample, self._timestep = architecture.sample, architecture.timestep
        self._timestep_dtype = architecture.timestep_dtype
        self.device_type = model.device.type
        self._signature = architecture.signature(model)
        self._names = tuple(self._signature.parameters)
        self._verified = False  # True if the model was as captured at the last call
        self._graphs: OrderedDict[Hashable, CapturedForward] = OrderedDict()
        self._stream: Any = None  # of the last call
        self._lock = threading.RLock()

    def install(self) -> None:
        """Replaces the calls of the entry."""
        with unchanged_on_error(self.entry):
            self.entry._compiled_call_impl = self
            self.clear()

    def eager(self, *args: Any, **kwargs: Any) -> Any:
        """A call of the entry, with its hooks."""
        return (self.replaced or self.entry._call_impl)(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As a call of the entry; the result is a copy, which later calls do not overwrite.

        These run eagerly: a call that autograd records, autocast, arguments that are neither tensors nor numbers,
        strings or lists and dicts of them, models with hooks (see ``runs_python``), and models that left the GPU.
        """
        with self._lock:
            call = self._read(args, kwargs)
            if call is None:
                return self.eager(*args, **kwargs)
            captured = self._graphs.get(call.key)
            if captured is not None and self._verified and not self._state.freed:
                result = self._replay(captured, call)
                if self._state.unchanged():  # compared while the GPU computes the result
                    self._graphs.move_to_end(call.key)
                    return result
            return self._verify_and_call(args, kwargs)

    def _verify_and_call(self, args: Any, kwargs: Any) -> Any:
        self._verified = self._state.unchanged()
        if not self._verified:
            if runs_python(self.entry):  # the graphs may serve again once the hooks are gone
                if self._state.freed and self._graphs:
                    _synchronize()
                    self._graphs.clear()
                return self.eager(*args, **kwargs)
            self.clear()
        call: Any = self._read(args, kwargs)
        captured = self._graphs.get(call.key)
        if captured is None:
            captured = self._capture(call)
            if not self._state.unchanged():  # the warm-up replaced tensors, such as merged weights
                self.clear()
            self._graphs[call.key] = captured
        self._verified = True
        return self._replay(captured, call)

    def clear(self) -> None:
        """Frees all graphs, and compares with the model's current state from now on."""
        _synchronize()
        self._graphs.clear()
        self._state = ModelState(self.entry)

    def _read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """The arguments and their key; None for a call that must run eagerly."""
        arguments = dict(zip(self._names, args, strict=False))
        arguments.update(kwargs)
        if len(arguments) != len(args) + len(kwargs):
            self._signature.bind(*args, **kwargs)  # raises TypeError
        sample = arguments.get(self._sample)
        if not isinstance(sample, torch.Tensor):
            return None  # the eager forward raises
        device_type = sample.device.type
        if device_type != self.device_type or torch.is_autocast_enabled(device_type):
            return None
        tensors: list[torch.Tensor] = []
        key: list[Hashable] = []
        timestep, dtype = arguments.pop(self._timestep, None) if self._timestep else None, None
        if isinstance(timestep, torch.Tensor):
            dtype = timestep.dtype
            key.append((timestep.shape, dtype))
            if timestep.is_cpu and not timestep.ndim:
                timestep = timestep.item()
        elif isinstance(timestep, Real) and not isinstance(timestep, bool):
            dtype = self._timestep_dtype or (torch.int64 if isinstance(timestep, Integral) else torch.float32)
            if not (dtype.is_floating_point or float(timestep).is_integer()):
                return None  # the model makes an integer of it, the timestep grid does not
            key.append((SCALAR, dtype))
        elif self._timestep:
            return None  # the eager forward raises
        ordered = {name: arguments[name] for name in sorted(arguments)}
        try:
            for name, value in ordered.items():
                key.append(name)
                key.append(_key_of(value, tensors))
        except _NotCapturedError:
            return None
        if torch.is_grad_enabled() and (
            any(tensor.requires_grad for tensor in tensors) or any(p.requires_grad for p in self.entry.parameters())
        ):
            return None
        key.extend(self._state.settings())
        return Call(tuple(key), ordered, tensors, timestep, dtype)

    def _replay(self, captured: CapturedForward, call: Call) -> Any:
        stream = torch.cuda.current_stream(call.arguments[self._sample].device)
        if stream != self._stream:
            if self._stream is not None:
                stream.wait_stream(self._stream)
            self._stream = stream
        for positions, statics in captured.inputs:
            torch._foreach_copy_(statics, [call.tensors[i] for i in positions])
        if isinstance(call.timestep, torch.Tensor):
            captured.timestep.copy_(call.timestep)
        elif captured.timestep is not None:
            captured.timestep.fill_(call.timestep)
        captured.graph.replay()
        outputs = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in captured.outputs]
        return pytree.tree_unflatten(outputs, captured.structure)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _capture(self, call: Call) -> CapturedForward:
        """A graph of the entry's call, in the memory pool of the others.

        Raises:
            RuntimeError: if the forward cannot be captured. The model and the other graphs are as before, but PyTorch
                keeps the memory that the failed capture reserved.
        """
        while len(self._graphs) >= self.max_graphs:
            _synchronize()
            self._graphs.popitem(last=False)
        # A pool ends with its last graph, so a handle of it must not be kept.
        pool = next(iter(self._graphs.values())).graph.pool() if self._graphs else None
        sample = call.arguments[self._sample]
        statics = [torch.empty_like(tensor, device=sample.device).copy_(tensor) for tensor in call.tensors]
        leaves, structure = pytree.tree_flatten(call.arguments)
        remaining = iter(statics)
        leaves = [next(remaining) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        timestep: Any = None
        if isinstance(call.timestep, torch.Tensor):
            timestep = torch.empty_like(call.timestep, device=sample.device).copy_(call.timestep)
        elif call.timestep is not None:
            timestep = torch.full((), call.timestep, dtype=call.timestep_dtype, device=sample.device)

        def forward() -> Any:
            arguments = pytree.tree_unflatten(leaves, structure)  # new lists: a UNet empties those that it is given
            return self.eager(**arguments, **({} if self._timestep is None else {self._timestep: timestep}))

        with torch.cuda.device_of(sample):
            current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
            stream.wait_stream(current)
            with torch.cuda.stream(stream):  # restores the current stream, even after a failed capture
                with self._explained(torch.OutOfMemoryError):
                    for _ in range(WARM_UP_CALLS):
                        forward()
                graph = torch.cuda.CUDAGraph()
                # Other threads may use other models meanwhile.
                capture = torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local")
                with self._explained(RuntimeError), capture:
                    result = forward()
            current.wait_stream(stream)
        by_dtype: dict[torch.dtype, list[int]] = {}  # a copy of tensors of one dtype is one kernel
        for i, tensor in enumerate(statics):
            by_dtype.setdefault(tensor.dtype, []).append(i)
        inputs = [(positions, [statics[i] for i in positions]) for positions in by_dtype.values()]
        return CapturedForward(graph, inputs, timestep, *pytree.tree_flatten(result))

    @contextlib.contextmanager
    def _explained(self, error_class: type[RuntimeError]) -> Iterator[None]:
        """Adds the remedy to errors of a capture."""
        try:
            yield
        except error_class as error:
            cause = error.__context__ or error  # the end of a failed capture raises a second time
            raise RuntimeError(
                f"The forward of {type(self.model).__name__} cannot be captured as a CUDA graph: {cause}. Call "
                "disable_cuda_graphs(model) to run it eagerly. Fewer graphs need less memory: "
                "enable_cuda_graphs(model, max_graphs)"
            ) from error


class _NotCapturedError(Exception):
    """An argument is neither a tensor nor immutable."""


def _key_of(value: Any, tensors: list[torch.Tensor]) -> Hashable:
    """The part of an argument that the captured kernels depend on; tensors in it are appended to ``tensors``."""
    kind = type(value)
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return value.shape, value.dtype, value.stride()
    if isinstance(value, CONSTANTS):
        return kind, value  # 1, 1.0 and True are equal
    if kind is dict:
        return kind, *value, *[_key_of(item, tensors) for item in value.values()]
    if kind is list or kind is tuple:
        return kind, *[_key_of(item, tensors) for item in value]
    raise _NotCapturedError


def _synchronize() -> None:
    """Waits until no graph runs, so that graphs can be freed."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def replays_graphs(model: Any) -> bool:
    """True if a model replays CUDA graphs."""
    return isinstance(architecture_of(model).entry(model)._compiled_call_impl, CudaGraphRunner)


def enable_cuda_graphs(model: Any, max_graphs: int = 8) -> None:
    """Makes a model replay CUDA graphs, in place; the first call with new shapes captures a graph.

    The model may be changed at any time: the next call captures again, or runs eagerly while hooks are registered (see
    ``CudaGraphRunner``).

    Args:
        model: on a CUDA device, quantized or not.
        max_graphs: beyond these, the least recently used graph is freed. All share one memory pool.

    Raises:
        TypeError: if the model's class is not supported.
        ValueError: if the model is not on a CUDA device, or already replays graphs.
    """
    architecture_of(model)
    integer("max_graphs", max_graphs, 1)
    if model.device.type != "cuda":
        raise ValueError(f"CUDA graphs need the model on a CUDA device, it is on {model.device}: move it first")
    if replays_graphs(model):
        raise ValueError("The model replays CUDA graphs already")
    CudaGraphRunner(model, max_graphs).install()


def disable_cuda_graphs(model: Any) -> None:
    """Restores a model's eager call, and frees the graphs."""
    if replays_graphs(model):
        _synchronize()
        entry: Any = architecture_of(model).entry(model)
        entry._compiled_call_impl = entry._compiled_call_impl.replaced
