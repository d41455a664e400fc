"""Errors of users: one line with the remedy, exit code 2. All other exceptions are errors of the program."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

HUB_LIBRARIES = ("huggingface_hub", "httpx", "httpcore", "requests", "urllib3")  # whose exceptions mean the network
NO_SPACE, NO_PERMISSION = "No space left on device", "Permission denied"
NO_CONNECTION = (
    "couldn't connect",
    "can't load",
    "cannot load model",
    "cannot find the requested files",
    "connection error",
    "offline mode",
)


class UserError(Exception):
    """What was found, what was expected, and the remedy, in one line."""


@contextmanager
def as_user_errors(*kinds: type[Exception], subject: str = "") -> Iterator[None]:
    """Turns exceptions that the user's input causes, and whose text says what to do, into ``UserError``."""
    try:
        yield
    except kinds as error:
        raise UserError(f"{subject}: {error}" if subject else str(error)) from error


def explanation(error: BaseException) -> str | None:
    """The line for the user; None for an error of the program."""
    text = " ".join(str(error).split())
    if NO_SPACE in text or getattr(error, "errno", None) == errno.ENOSPC:
        return f"The disk is full ({text}). Free some space and repeat the command"
    if isinstance(error, UserError):
        return text
    if isinstance(error, PermissionError):
        return f"{error.filename or text}: no permission. Give another folder, or change its owner"
    if type(error).__name__ == "OutOfMemoryError":
        return "The GPU's memory is full. End other programs on it, choose a smaller batch or preset, or --device cpu"
    if isinstance(error, ModuleNotFoundError):
        package = {"skimage": "scikit-image", "PIL": "pillow"}.get(str(error.name), error.name)
        return f"The package {package} is missing: pip install {package}"
    from_hub = type(error).__module__.startswith(HUB_LIBRARIES)
    if from_hub or (isinstance(error, OSError) and any(sign in text.lower() for sign in NO_CONNECTION)):
        return (
            f"The hub cannot be reached, or has no such model ({text[:160]}). Check name and network, or give a folder"
        )
    if isinstance(error, (FileNotFoundError, IsADirectoryError, NotADirectoryError)) and error.filename:
        return f"{error.filename}: {error.strerror}. Check the path"
    return None
