"""Freed memory goes back to the system."""

from __future__ import annotations

import ctypes


def return_free_memory() -> None:
    """Returns the pages that glibc keeps free between living tensors; other C libraries return theirs themselves.

    After many temporary tensors of a megabyte each, glibc holds about as much again as a packed model takes.
    """
    if _trim is not None:
        _trim(0)


try:
    _trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
except (OSError, TypeError):  # Windows
    _trim = None
