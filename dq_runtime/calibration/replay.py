"""Replays recorded calls up to a given block, and stores the inputs and outputs of blocks on disk.

Finished blocks are not run again: their outputs are on disk, and a replay reads those that the given block depends on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from dq_runtime.architectures.supported import architecture_of
from dq_runtime.calibration.collect import RecordedCall
from dq_runtime.calibration.deferred import computed, deferred, on_meta, sources
from dq_runtime.calibration.tree_files import flat
from dq_runtime.files import new_file, write_tensors


class _StopReplay(Exception):
    """Raised by a hook to stop a replay. Its argument is the result."""


class _ValueNeeded(Exception):
    """Raised where the path of a call depends on the values of its blocks' outputs."""


def blocks_in_order(model: nn.Module, layers: Iterable[nn.Module], call: RecordedCall) -> dict[str, nn.Module]:
    """The blocks of a model that are distilled one after the other, in the order in which a call reaches them.

    A block is the architecture's outermost block around a layer. A layer outside of all blocks is a block itself.

    Args:
        layers: the layers to be distilled; blocks without one are left out.
    """
    architecture, wanted = architecture_of(model), set(layers)
    found: dict[nn.Module, str] = {}

    def walk(name: str, module: nn.Module) -> None:
        if module in wanted or (architecture.is_block(module) and not wanted.isdisjoint(module.modules())):
            found.setdefault(module, name)
        else:
            for child_name, child in module.named_children():
                walk(f"{name}.{child_name}" if name else child_name, child)

    walk("", model)
    reached: dict[str, nn.Module] = {}

    def note(module: nn.Module, args: Any) -> None:
        reached.setdefault(found[module], module)

    handles = [module.register_forward_pre_hook(note) for module in found]
    try:
        call.run(model)
    finally:
        for handle in handles:
            handle.remove()
    return reached


def activations_of(model: nn.Module, call: RecordedCall) -> dict[nn.Module, int]:
    """The number of values for one sample in the outputs of each module without children, in a call of the model."""
    values: dict[nn.Module, int] = {}

    def count(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            values[module] = values.get(module, 0) + output.numel() // call.sample.shape[0]

    handles = [m.register_forward_hook(count) for m in model.modules() if not list(m.children())]
    try:
        call.run(model)
    finally:
        for handle in handles:
            handle.remove()
    return values


def most_activations(blocks: Iterable[nn.Module], activations: Mapping[nn.Module, int]) -> int:
    """Those of the block that has the most."""
    return max(sum(activations.get(module, 0) for module in block.modules()) for block in blocks)


@torch.no_grad()
def inputs_of(
    model: nn.Module,
    block: nn.Module,
    call: RecordedCall,
    finished: Mapping[nn.Module, Callable[[], Any]] = MappingProxyType({}),
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The args and kwargs of a block's first call within a call of the model. The replay stops there.

    Args:
        finished: blocks that do not run, each with a function that returns the output of its first call in this call of
            the model, a tree of ``deferred`` tensors.
    """
    try:
        return computed(_deferred_inputs_of(model, block, call, finished))
    except NotImplementedError:  # the model's code changes an output in place
        real = {other: partial(_computed_result, output) for other, output in finished.items()}
        return _deferred_inputs_of(model, block, call, real)


def _computed_result(output: Callable[[], Any]) -> Any:
    return computed(output())


def _deferred_inputs_of(
    model: nn.Module, block: nn.Module, call: RecordedCall, finished: Mapping[nn.Module, Callable[[], Any]]
) -> Any:
    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _StopReplay((args, kwargs))

    with _replaced(finished):
        return _run_until(model, call, block.register_forward_pre_hook(stop, with_kwargs=True))


@torch.no_grad()
def sources_of(model: nn.Module, blocks: Mapping[str, nn.Module], call: RecordedCall) -> dict[str, set[str]]:
    """The blocks whose outputs each block reads, directly or through what the model computes between them."""
    outputs: dict[nn.Module, Callable[[], Any]] = {}
    read: dict[str, set[str]] = {}
    metas: dict[str, Any] = {}

    def note(name: str, module: nn.Module, args: Any, output: Any) -> None:
        metas.setdefault(name, on_meta(output))

    handles = [block.register_forward_hook(partial(note, name)) for name, block in blocks.items()]
    try:
        call.run(model)
    finally:
        for handle in handles:
            handle.remove()
    device = next(model.parameters()).device
    for name, block in blocks.items():
        try:
            read[name] = set(sources(_deferred_inputs_of(model, block, call, outputs)))
        except (NotImplementedError, _ValueNeeded):
            read[name] = {*read}  # it may be any
        outputs[block] = partial(deferred, name, metas[name], device, _no_value)
    return read


def last_readers(sources: Mapping[str, set[str]]) -> dict[str, str]:
    """The last block that reads each block's output. Blocks whose output none reads are left out.

    Args:
        sources: of ``sources_of``, in the order of the blocks.
    """
    return {source: reader for reader, read in sources.items() for source in read}


def _no_value() -> Any:
    raise _ValueNeeded


@torch.no_grad()
def outputs_of(
    model: nn.Module, blocks: Mapping[str, nn.Module], call: RecordedCall, keep: Callable[[str, torch.Tensor], bool]
) -> None:
    """Passes the results of blocks' first calls within a call of the model to ``keep``, in the order of these calls.

    Args:
        keep: is called with a block's name and result. The replay stops if it returns False, and after the last of the
            blocks.
    """
    missing, result = set(blocks), architecture_of(model).result

    def hook(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if name in missing:
            missing.remove(name)
            if not keep(name, result(output)) or not missing:
                raise _StopReplay(None)

    _run_until(model, call, *(block.register_forward_hook(partial(hook, name)) for name, block in blocks.items()))


@contextmanager
def _replaced(finished: Mapping[nn.Module, Callable[[], Any]]) -> Iterator[None]:
    """Replaces the first call of each block's forward."""
    replaced = {block: vars(block).get("forward") for block in finished}

    def first_call_replaced(compute: Callable[..., Any], output: Callable[[], Any]) -> Callable[..., Any]:
        reached = False

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal reached
            if reached:
                args, kwargs = computed((args, kwargs))
                return compute(*args, **kwargs)
            reached = True
            return output()

        return forward

    for block, output in finished.items():
        block.forward = first_call_replaced(block.forward, output)
    try:
        yield
    finally:
        for block, forward in replaced.items():
            if forward is None:
                del block.forward
            else:
                block.forward = forward


def _run_until(model: nn.Module, call: RecordedCall, *handles: Any) -> Any:
    try:
        call.run(model)
    except _StopReplay as stop:
        return stop.args[0]
    finally:
        for handle in handles:
            handle.remove()
    raise ValueError("A recorded call takes another path through the model than the first one")


def squared_error(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The mean squared error of each sample, [B] fp32; device and dtype of ``target`` may differ."""
    difference = output.float() - target.to(output.device, torch.float32)
    return difference.square().flatten(1).mean(1)


class TensorStore:
    """Trees of tensors in a folder, one safetensors file each, so that training data may exceed the memory.

    Tensors keep their memory layout, because the rounding of results computed from them depends on it. The folder may
    hold other files.

    Args:
        prefix: of the names of all files; no other file has it.
    """

    def __init__(self, folder: Path, prefix: str = "") -> None:
        self.folder, self.prefix = folder, prefix
        folder.mkdir(parents=True, exist_ok=True)
        self.nbytes = 0  # of all trees together
        self._trees: dict[str, tuple[list[Any], Any, int]] = {}

    def __setitem__(self, name: str, tree: Any) -> None:
        if name in self:
            del self[name]
        leaves, structure = tree_flatten(tree)
        tensors = {}
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor):
                tensors[str(i)] = flat(leaf)
                leaves[i] = leaf.shape, torch.empty_like(leaf, device="meta").stride()
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        self._trees[name] = leaves, structure, nbytes
        self.nbytes += nbytes
        with new_file(self._file(name)) as stream:
            write_tensors(stream, tensors, {})

    def __getitem__(self, name: str) -> Any:
        """The tree, with its tensors on the CPU."""
        leaves, structure, _ = self._trees[name]
        leaves = list(leaves)
        for i, tensor in load_file(self._file(name)).items():
            leaves[int(i)] = tensor.as_strided(*leaves[int(i)])
        return tree_unflatten(leaves, structure)

    def mapped(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Stores a tensor and returns it, on the CPU. Only the parts of the result that are read take memory."""
        self[name] = tensor
        stored: torch.Tensor = self[name]
        return stored

    def __contains__(self, name: str) -> bool:
        return name in self._trees

    def __delitem__(self, name: str) -> None:
        self.nbytes -= self._trees.pop(name)[-1]
        self._file(name).unlink(missing_ok=True)

    def __enter__(self) -> TensorStore:
        return self

    def __exit__(self, *exception: object) -> None:
        """Deletes all trees."""
        for name in list(self._trees):
            del self[name]

    def _file(self, name: str) -> Path:
        return self.folder / f"{self.prefix}{name}.safetensors"
