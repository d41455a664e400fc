"""Peak memory of a ``with`` block, above the level at its start."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from benchmarks.process_memory import status
from dq_runtime.free_memory import return_free_memory

INTERVAL = 0.005  # seconds


class _Mallinfo2(ctypes.Structure):
    """The statistics of glibc's allocator (2.33 and newer), in bytes."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks")
    ] + [("keepcost", ctypes.c_size_t)]


@contextmanager
def above_now() -> Iterator[dict[str, float]]:
    """Measures the ``with`` block; at its end the dict holds two peaks in 10^6 bytes.

    ``allocated_mb``: memory in use, as counted by torch on a GPU, and by glibc on a CPU, sampled every 5 ms.
    ``resident_mb``: memory that the process holds, which includes freed memory that its allocator keeps: the memory
    reserved by torch on a GPU, anonymous pages on a CPU (Linux). A peak is NaN if the system does not report it.
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
    return_free_memory()
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


def _allocated_bytes() -> Callable[[], float]:
    """A function that returns the bytes in use, in all arenas and in separate mappings."""
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        return lambda: float("nan")
    mallinfo2.restype = _Mallinfo2

    def read() -> float:
        info = mallinfo2()
        return float(info.uordblks + info.hblkhd)

    return read


def _anonymous_bytes() -> float:
    anonymous = status("RssAnon")
    return float("nan") if anonymous is None else float(anonymous)
