"""State of one forward pass in one thread, so that threads may share a model."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

State = TypeVar("State")


class CallState(Generic[State]):
    """A state for each thread, and one for compiled code, which cannot read variables of a thread.

    So threads may share a model, unless it is compiled. A copy starts anew, since a copied model is in no call.

    Args:
        new: makes a state.
    """

    def __init__(self, new: Callable[[], State]) -> None:
        self._new = new
        self._threads = threading.local()
        self.of_compiled_code = new()

    def now(self) -> State:
        """The state of this thread; while code is compiled, that of compiled code."""
        if torch.compiler.is_compiling():
            return self.of_compiled_code
        try:
            return self._threads.state
        except AttributeError:
            self._threads.state = state = self._new()
            return state

    def all_of_call(self) -> tuple[State, State]:
        """Both states that a call in this thread may use: parts of a model may be compiled."""
        return self.now(), self.of_compiled_code

    def __deepcopy__(self, memo: dict[int, Any]) -> CallState[State]:
        return CallState(self._new)

    def __reduce__(self) -> Any:
        return CallState, (self._new,)
