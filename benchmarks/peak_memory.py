"""The most memory that a piece of work takes, on top of what the process holds when it begins."""

from __future__ import annotations

import ctypes
import gc
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
INTERVAL = 0.005  # seconds


@contextmanager
def above_now() -> Iterator[dict[str, float]]:
    """Watches the ``with`` block; the dict then holds ``mb``, 10^6 bytes.

    On a GPU what torch allocates there. On a CPU anonymous pages (Linux), looked at every 5 ms: files that are mapped
    into memory do not count, since the system takes their pages back when it needs them.
    """
    peak = {"mb": float("nan")}
    gc.collect()
    _return_free_memory()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield peak
        peak["mb"] = (torch.cuda.max_memory_allocated() - before) / 1e6
        return
    before, highest, done = _anonymous_bytes(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(INTERVAL):
            highest = max(highest, _anonymous_bytes())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
        peak["mb"] = (max(highest, _anonymous_bytes()) - before) / 1e6


def _return_free_memory() -> None:
    """Gives the system what the C library keeps of freed memory: the work would fill that first, unseen."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def _anonymous_bytes() -> float:
    found = re.search(r"RssAnon:\s+(\d+) kB", STATUS.read_text()) if STATUS.exists() else None
    return 1024.0 * int(found.group(1)) if found else float("nan")
