"""The most memory that a piece of work takes, on top of what the process holds when it begins."""

from __future__ import annotations

import ctypes
import gc
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
INTERVAL = 0.005  # seconds


class _Mallinfo2(ctypes.Structure):
    """What glibc's allocator (2.33 and newer) tells about itself, in bytes."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks")
    ] + [("keepcost", ctypes.c_size_t)]


@contextmanager
def above_now() -> Iterator[dict[str, float]]:
    """Watches the ``with`` block; the dict then holds two peaks in 10^6 bytes.

    ``allocated_mb``: what is in use at a time. On a GPU as torch counts it, on a CPU as glibc does, looked at every
    5 ms. ``resident_mb``: what the process holds of the machine, memory included that its allocator keeps after it was
    freed. On a GPU what torch reserves there, on a CPU anonymous pages (Linux). NaN where the system does not tell.
    """
    readers = {"allocated_mb": _allocated_bytes(), "resident_mb": _anonymous_bytes}
    peak = dict.fromkeys(readers, float("nan"))
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        yield peak
        after = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        peak.update(zip(readers, ((high - low) / 1e6 for low, high in zip(before, after, strict=True)), strict=True))
        return
    _return_free_memory()
    start = {name: read() for name, read in readers.items()}
    highest, done = dict(start), threading.Event()

    def watch() -> None:
        while not done.wait(INTERVAL):
            look()

    def look() -> None:
        highest.update({name: max(highest[name], read()) for name, read in readers.items()})

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
        look()
        peak.update({name: (highest[name] - start[name]) / 1e6 for name in readers})


def _return_free_memory() -> None:
    """Gives the system what the C library keeps of freed memory: the work would fill that first, unseen."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def _allocated_bytes() -> Callable[[], float]:
    """A reader of what has been allocated and not freed, in all arenas and in mappings of its own."""
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        return lambda: float("nan")
    mallinfo2.restype = _Mallinfo2

    def read() -> float:
        info = mallinfo2()
        return float(info.uordblks + info.hblkhd)

    return read


def _anonymous_bytes() -> float:
    found = re.search(r"RssAnon:\s+(\d+) kB", STATUS.read_text()) if STATUS.exists() else None
    return 1024.0 * int(found.group(1)) if found else float("nan")
