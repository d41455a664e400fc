"""CUDA graphs without a GPU: a graph that runs on the CPU, and a UNet that records when its Python code runs.

The fake graph keeps the operators that were captured and calls them at a replay, so that keys, copies and structures
are those of a CPU. What a capture itself may do wrong only a GPU shows.
"""

import contextlib
import weakref
from typing import ClassVar

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from dq_runtime.graphs import CudaGraphRunner


class FakeGraph:
    """Records the operators that run inside of ``torch.cuda.graph``; a replay runs them again, on the same memory."""

    made = 0
    alive: ClassVar = weakref.WeakSet()

    def __init__(self):
        type(self).made += 1
        type(self).alive.add(self)
        self.calls = []
        self.memory = object()

    def pool(self):
        return self.memory

    def replay(self):
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(_tensors(result), _tensors(again), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def _tensors(result):
    leaves = torch.utils._pytree.tree_leaves(result)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


class _Capture(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self, graph, pool=None, capture_error_mode="global"):
        super().__init__()
        assert capture_error_mode == "thread_local"  # or an allocation of another thread would end the capture
        self.graph = graph
        if pool is not None:
            assert any(other.memory is pool for other in FakeGraph.alive)
            graph.memory = pool

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        self.graph.calls.append((func, args, kwargs or {}, result))
        return result


class FakeStream:
    def __init__(self):
        self.waits_for = []

    def wait_stream(self, stream):
        self.waits_for.append(stream)


def replace_cuda(monkeypatch):
    """Puts ``FakeGraph`` in the place of CUDA's."""
    FakeGraph.made = 0
    FakeGraph.alive.clear()
    stream = FakeStream()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", _Capture)
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: contextlib.nullcontext())
    return FakeGraph


class Double(UNet2DConditionModel):
    """A UNet that records when its Python code runs."""

    device = torch.device("cpu")

    def __init__(self):
        torch.nn.Module.__init__(self)
        self.counter = [0]

    @property
    def runs(self):
        return self.counter[0]

    def forward(self, sample, timestep, encoder_hidden_states=None, scale=2, return_dict=True, added=None):
        self.counter[0] += 1
        sample = scale * sample + timestep.reshape(-1, 1)
        if encoder_hidden_states is not None:
            sample = sample + encoder_hidden_states
        for name, values in (added or {}).items():
            for value in torch.utils._pytree.tree_leaves(values):
                sample = sample + value if name == "a" else sample - value
        return UNet2DConditionOutput(sample=sample) if return_dict else (sample,)


def with_graphs(model, **options):
    """As ``enable_cuda_graphs``, on a CPU."""
    CudaGraphRunner(model, **options).install()
    return model
