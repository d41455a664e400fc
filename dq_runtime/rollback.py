"""A call that fails, or that Ctrl-C interrupts, leaves a model as it was."""

from __future__ import annotations

import signal
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


class _Attributes:
    """The class and the attributes of a module; of its tables of parameters, submodules and hooks also the entries."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._class, self._own = module, type(module), dict(vars(module))
        tables = [value for value in self._own.values() if type(value) in (dict, OrderedDict)]
        self._tables = [(table, dict(table)) for table in tables]

    def restore(self) -> None:
        self._module.__class__ = self._class
        own = vars(self._module)
        own.clear()
        own.update(self._own)
        for table, entries in self._tables:  # the same object: handles of hooks hold it
            table.clear()
            table.update(entries)


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Restores a model if the ``with`` block fails: all modules with their attributes and hooks, and requires_grad.

    Values of tensors are not restored. What the block removes from the model is freed at its end.
    """
    modules = [_Attributes(module) for module in model.modules()]
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        with uninterrupted():
            for module in modules:
                module.restore()
            for parameter, wanted in required:
                if parameter.requires_grad != wanted:
                    parameter.requires_grad_(wanted)
        raise


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delays a Ctrl-C to the end of the ``with`` block. Only the main thread gets one."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
        yield
        return
    delayed: list[Any] = []
    handler = signal.signal(signal.SIGINT, lambda *arguments: delayed.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if delayed:
            signal.raise_signal(signal.SIGINT)
