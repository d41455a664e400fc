"""Timing on a GPU: many calls in one CUDA graph, so that neither Python nor launch gaps count."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

# Weights come from memory in a real forward pass: rotating copies of more than the L2 cache keep it so here.
ROTATED_BYTES = 100_000_000
MAX_COPIES = 16


def copies_to_rotate(tensor_bytes: int) -> int:
    """How many copies of a tensor exceed the L2 cache, within reason."""
    return min(MAX_COPIES, max(2, -(-ROTATED_BYTES // max(tensor_bytes, 1))))


def graph_microseconds(call: Callable[[int], Any], copies: int, replays: int = 5) -> float:
    """Median time of one call in microseconds; ``call(i)`` works on copy i. The first call compiles."""
    call(0)
    torch.cuda.synchronize()
    calls = max(copies, 8)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(calls):
            call(index % copies)
    graph.replay()
    times = []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / calls)
    return statistics.median(times)
