"""Resident memory of this process, mapped files included, as Linux reports it."""

from __future__ import annotations

import contextlib
import gc
import re
from pathlib import Path

from dq_runtime.free_memory import return_free_memory

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def status(name: str) -> int | None:
    """A field in bytes, such as ``VmRSS`` or ``VmHWM``; None where the system does not report it."""
    found = re.search(rf"^{name}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE) if STATUS.exists() else None
    return 1024 * int(found.group(1)) if found else None


def peak() -> int:
    """The most resident bytes since ``reset_peak``; 0 where the system does not report them."""
    return status("VmHWM") or 0


def reset_peak() -> int:
    """Sets the peak back to the present resident bytes, without those that the C library keeps free; returns them."""
    gc.collect()
    return_free_memory()
    with contextlib.suppress(OSError):  # on other systems the peak is that since the process's start
        CLEAR.write_text("5")
    return status("VmRSS") or 0
