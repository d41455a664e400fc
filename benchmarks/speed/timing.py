"""Timing on a GPU: many calls in one CUDA graph, without Python's time and launch gaps."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

MIN_CALLS, MAX_CALLS = 8, 256  # per graph


def copies_to_rotate(tensor_bytes: int) -> int:
    """The number of copies that a graph rotates, so that none stays in the L2 cache; ``tensor_bytes`` of each copy."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return min(MAX_CALLS, max(MIN_CALLS, -(-2 * cache // max(tensor_bytes, 1))))


def captured(calls: Sequence[Callable[[], Any]]) -> Callable[[], float]:
    """Captures the calls as one CUDA graph; returns a function that replays it and returns microseconds per call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compilation and autotuning before the capture
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def replay() -> float:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return 1e3 * begin.elapsed_time(end) / len(calls)

    return replay


def graph_microseconds(call: Callable[[int], Any], copies: int, replays: int = 5) -> float:
    """Median time of one call in microseconds; ``call(i)`` works on copy i."""
    replay = captured([partial(call, index % copies) for index in range(max(copies, MIN_CALLS))])
    replay()
    return statistics.median(replay() for _ in range(replays))
