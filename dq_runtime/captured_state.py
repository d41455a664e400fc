"""The state of a model that a captured forward pass depends on, besides its arguments.

A CUDA graph repeats kernels: it reads weights at their addresses of the capture, and runs no Python code.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Hashable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as hooks

from dq_runtime.forward_state import ForwardState
from dq_runtime.layers import QuantizedLayer, QuantLinear, replaces_conv_forward
from dq_runtime.timesteps import TimestepGrid

FREEU = ("s1", "s2", "b1", "b2")  # attributes of a UNet's up blocks
ADAPTER_ATTRIBUTES = itemgetter("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")
KNOWN_PROCESSORS = ("diffusers", "dq_runtime")  # packages whose attention processors keep no state between calls


def runs_python(entry: nn.Module) -> bool:
    """True if a call runs Python code that a replay would skip.

    That are hooks (those of the timestep grid and of fused blocks are captured), replaced forwards (offloading,
    caching, layerwise casting; but a compiled forward of the entry is captured), and users' attention processors.
    """
    if hooks._global_forward_hooks or hooks._global_forward_pre_hooks:
        return True
    for module in entry.modules():
        captured = _is_captured if module is entry else None
        if any(captured is None or not captured(hook) for hook in _forward_hooks(module)):
            return True
        forward = vars(module).get("forward")
        if isinstance(module, nn.Conv2d) and replaces_conv_forward(module):
            return True
        if forward is not None and not (module is entry and hasattr(forward, "_torchdynamo_orig_callable")):
            return True
        processor = getattr(module, "processor", None)
        if processor is not None and type(processor).__module__.partition(".")[0] not in KNOWN_PROCESSORS:
            return True
    return False


def _forward_hooks(module: nn.Module) -> list[Any]:
    return [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]


def _is_captured(hook: Any) -> bool:
    return isinstance(getattr(hook, "__self__", None), (TimestepGrid, ForwardState))


class ModelState:
    """A snapshot of a model, to compare with the model at later calls.

    ``unchanged`` finds: modules that were replaced or have another class; parameters and buffers that were replaced;
    parameters with other ``data``; freed memory of any parameter or buffer; forward hooks and replaced forwards; other
    attributes of all modules, of PyTorch's own the mode and those in ``__constants__``, such as a norm's eps and a
    convolution's padding. It does not find a change inside of an attribute, such as an element of a list, or other
    ``data`` of a buffer whose old memory is held elsewhere. Values that are written in place need no new capture.
    ``settings`` are numbers that are in the captured kernels.

    The memory that a graph reads is either alive or reported in ``freed``: the snapshot holds parameters and buffers,
    but not the memory of a parameter whose ``data`` was set.

    Args:
        entry: the module whose forward is captured.
    """

    def __init__(self, entry: nn.Module) -> None:
        self.is_pure = not runs_python(entry)
        self.freed: list[Any] = []  # not empty once memory of a weight was freed
        self._entry = entry
        self._entry_hooks = _forward_hooks(entry)
        self._modules = list(entry.modules())
        self._classes = list(map(type, self._modules))
        self._hooks = [
            table for m in self._modules if m is not entry for table in (m._forward_hooks, m._forward_pre_hooks)
        ]
        tables = [table for m in self._modules for table in (m._parameters, m._buffers, m._modules)]
        self._empty = [table for table in tables if not table]
        self._tables = [table for table in tables if table]
        self._members = list(map(dict, self._tables))
        self._parameters = list(entry.parameters())
        self._addresses = list(map(torch.Tensor.data_ptr, self._parameters))
        tensors = [*self._parameters, *entry.buffers()]
        tensors += [m.boundaries for m in self._modules if isinstance(m, TimestepGrid)]
        # A move sets the parameters' ``data``. Weak references let it free the old memory, and report this.
        self._storages = [weakref.ref(tensor.untyped_storage(), self.freed.append) for tensor in tensors]

        self._convolutions = [vars(m) for m in self._modules if isinstance(m, nn.Conv2d)]
        self._constants = constants_of(self._modules)
        self._constant_values = [list(map(read, owners)) for read, owners in self._constants]
        self._up_blocks = [vars(block) for block in getattr(entry, "up_blocks", ())]
        self._adapted = [vars(m) for m in self._modules if {"merged_adapters", "scaling"} <= vars(m).keys()]  # LoRA's
        self._adapters: list[Any] = []  # their attributes at the last call
        self._adapter_key: tuple[Hashable, ...] = ()
        processors = (getattr(m, "processor", None) for m in self._modules)
        self._scaled: list[Any] = [processor for processor in processors if hasattr(processor, "scale")]
        excepted = {id(own) for own in (*self._up_blocks, *self._adapted)}  # ``settings`` compares them
        self._compared: list[dict[str, Any]] = []
        self._others: list[dict[str, Any]] = []
        for module in self._modules:
            is_layer = isinstance(module, (QuantizedLayer, TimestepGrid)) or type(module).__module__.startswith(
                "torch."
            )
            is_other = is_layer or id(vars(module)) in excepted
            (self._others if is_other else self._compared).append(vars(module))
        self._attributes = list(map(dict, self._compared))

    def settings(self) -> tuple[Hashable, ...]:
        """Numbers that the captured kernels contain: FreeU's, the scales of IP-Adapters and of adapters (LoRA)."""
        return (
            *[block.get(name) for block in self._up_blocks for name in FREEU],
            *[str(processor.scale) for processor in self._scaled],
            *self._adapter_settings(),
        )

    def _adapter_settings(self) -> tuple[Hashable, ...]:
        live = list(map(ADAPTER_ATTRIBUTES, self._adapted))
        if live != self._adapters:  # faster than making the key
            self._adapters = [tuple(map(copy.copy, attributes)) for attributes in live]
            self._adapter_key = tuple(itertools.starmap(adapter_state, self._adapters))
        return self._adapter_key

    def unchanged(self) -> bool:
        """True if a replay computes the model's forward pass: nothing was replaced, and no Python code would run."""
        try:
            return (
                self.is_pure
                and not self.freed
                and not any(self._hooks)
                and not hooks._global_forward_hooks
                and not hooks._global_forward_pre_hooks
                and _forward_hooks(self._entry) == self._entry_hooks
                and not any(map(dict.get, self._others, itertools.repeat("forward")))
                and not any(map(dict.get, self._convolutions, itertools.repeat("_conv_forward")))
                and [list(map(read, owners)) for read, owners in self._constants] == self._constant_values
                and list(map(type, self._modules)) == self._classes
                and not any(self._empty)
                and self._tables == self._members  # the same objects, or tensors of one value, and that value
                and self._compared == self._attributes
                and list(map(torch.Tensor.data_ptr, self._parameters)) == self._addresses
            )
        except (RuntimeError, ValueError, KeyError):  # deleted, or a tensor, whose equality has no truth value
            return False


def constants_of(modules: Sequence[nn.Module]) -> list[tuple[Any, list[dict[str, Any]]]]:
    """For each set of names in ``__constants__``: a function that reads these attributes, and the modules' dicts.

    ``QuantLinear`` is left out, whose constants cannot be set.
    """
    owners: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for module in modules:
        own = vars(module)
        names = tuple(name for name in getattr(module, "__constants__", ()) if name in own)
        if names and not isinstance(module, QuantLinear):
            owners.setdefault((*names, "training"), []).append(own)  # a dropout may be switched on alone
    return [(itemgetter(*names), tables) for names, tables in owners.items()]


def adapter_state(active: Any, is_disabled: bool, merged: list[str], scaling: dict[str, Any]) -> tuple[Hashable, ...]:
    """The active adapters of a layer, and their scales.

    A scale has six digits: diffusers multiplies it by ``cross_attention_kwargs["scale"]`` for a call, then divides. A
    tensor is read by the kernels, so its value is left out.
    """
    scales = [(name, scale if isinstance(scale, torch.Tensor) else round(scale, 6)) for name, scale in scaling.items()]
    return str(active), is_disabled, *merged, *scales
