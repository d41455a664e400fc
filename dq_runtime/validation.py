"""Checks of values where they enter: an error names the parameter, the expected values and the value found.

A setting out of range, or of another type, is a ValueError; an object of another class is a TypeError. Messages are
short whatever the value is. Accepted numbers are returned as Python's own, which JSON can hold.
"""

from __future__ import annotations

import math
import os
import reprlib
from collections.abc import Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch

LARGEST_INTEGER = 2**31 - 1
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def shown(value: Any) -> str:
    """A value in an error message: shortened, or its class."""
    if value is None or isinstance(value, (str, int, float, list, tuple)):
        try:
            return _SHORT.repr(value)
        except ValueError:  # an integer of thousands of digits
            pass
    return f"a {type(value).__name__}"


def integer(name: str, value: Any, least: int = 0, most: int = LARGEST_INTEGER) -> int:
    """An integer from ``least`` to ``most``; neither a bool nor a float is one."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name} must be an integer, got {shown(value)}")
    checked: Any = value  # numbers' abstract classes have no comparison
    if checked < least:
        raise ValueError(f"{name} must be at least {least}, got {shown(value)}")
    if checked > most:
        raise ValueError(f"{name} must be at most {most}, got {shown(value)}")
    return int(value)


def number(name: str, value: Any, least: float, most: float) -> float:
    """A real number from ``least`` to ``most``; a bool is none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name} must be a number, got {shown(value)}")
    checked: Any = value
    if not least <= checked <= most:
        raise ValueError(f"{name} must be from {least:g} to {most:g}, got {shown(value)}")
    return int(value) if isinstance(value, Integral) else float(value)


def boolean(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {shown(value)}")
    return value


def choice(name: str, value: Any, choices: Sequence[Any]) -> Any:
    """One of several values of one type."""
    if not isinstance(value, type(choices[0])) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {shown(value)}")
    return value


def names(name: str, value: Any) -> list[str]:
    """A list of names, none of which is empty."""
    if not isinstance(value, (list, tuple)) or not all(isinstance(entry, str) and entry for entry in value):
        raise ValueError(f"{name} must be a list of names, got {shown(value)}")
    return list(value)


def path(name: str, value: Any) -> Path:
    """The path of a file or folder."""
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        raise TypeError(f"{name} must be a path, got {shown(value)}")
    text = os.fspath(value)
    if not text or "\0" in text:
        raise ValueError(f"{name} must be a path, got {shown(text)}")
    return Path(text)


def instance(name: str, value: Any, *classes: type) -> None:
    """An object of one of several classes."""
    if not isinstance(value, classes):
        raise TypeError(f"{name} must be a {' or '.join(cls.__name__ for cls in classes)}, got {shown(value)}")


def floats(name: str, value: Any, ndim: int) -> None:
    """A finite floating-point tensor with at least one row and so many dimensions."""
    instance(name, value, torch.Tensor)
    if not value.is_floating_point() or value.ndim != ndim or not value.numel():
        raise ValueError(
            f"{name} must be a floating-point tensor of {ndim} dimensions, none of them 0, got {value.dtype} "
            f"{list(value.shape)}"
        )
    finite(name, value)


def finite(name: str, tensor: torch.Tensor) -> None:
    """A tensor without NaN and infinity; of integers every one is."""
    if tensor.is_floating_point() and tensor.numel() and not all(map(math.isfinite, _ends(tensor))):
        raise ValueError(f"{name} must be finite in {tensor.dtype}, it holds NaN or infinity")


def is_within(tensor: torch.Tensor, least: float, most: float) -> bool:
    """True if all elements lie between two bounds; NaN lies nowhere."""
    low, high = _ends(tensor)
    return low >= least and high <= most


def _ends(tensor: torch.Tensor) -> tuple[float, float]:
    """The smallest and the largest element, both NaN if there is one. It allocates no mask of the tensor's size."""
    low, high = tensor.detach().aminmax()
    return float(low), float(high)


def check_scheduler(name: str, value: Any) -> None:
    """A diffusers scheduler, or an object with its noise schedule."""
    described = hasattr(value, "config") and (hasattr(value, "set_timesteps") or hasattr(value, "alphas_cumprod"))
    if isinstance(value, type) or not described:
        raise TypeError(f"{name} must be a diffusers scheduler, got {shown(value)}")
