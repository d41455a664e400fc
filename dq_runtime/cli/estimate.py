"""Time and memory that a quantization will take, estimated from one measured call of the model.

The estimates count forward and backward passes; the searches in each layer are left out, which are short for large
models. The time of the blocks is corrected by each block that is finished.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dq_runtime.calibration.collect import RecordedCall
from dq_runtime.calibration.distillation import STORED_BYTES, Distillation
from dq_runtime.calibration.replay import blocks_in_order
from dq_runtime.cli.console import duration, say

TRAINING_STEP = 5.0  # forward passes: a forward and a backward pass with simulated quantizers
PASSES = 8.0  # over all training samples: inputs, targets, second moments, errors and validations
STATE_BYTES = 20  # a trained weight: it, its gradient, Adam's two moments and the original, in fp32
KEPT_COPIES = 3  # of each layer's output, in fp32, until the backward pass


@dataclass(frozen=True)
class Probe:
    """One measured call of a floating-point model.

    Attributes:
        seconds: for one sample.
        blocks: seconds of each block in the call, in their order; only ratios are used.
        weights: bytes of the model.
        parameters, activations: of the whole model: number of weights, and of values in all layers' outputs for one
            sample.
        block_parameters, block_activations: the largest over the blocks.
    """

    seconds: float
    blocks: dict[str, float]
    weights: int
    parameters: int
    activations: int
    block_parameters: int
    block_activations: int


@dataclass(frozen=True)
class Estimate:
    """Seconds of each part, and bytes."""

    collecting: float
    blocks: float
    polish: float
    memory: float
    disk: float

    @property
    def seconds(self) -> float:
        """All parts together."""
        return self.collecting + self.blocks + self.polish


def probe(model: Any, layers: Mapping[str, nn.Module], call: RecordedCall) -> Probe:
    """Measures a call of a model, once it has run before.

    Args:
        layers: the layers that will be quantized.
    """
    blocks = blocks_in_order(model, layers.values(), call)  # also the first, slower call
    seconds = _seconds(lambda: call.run(model), model.device)
    rows = call.sample.shape[0]
    values: dict[nn.Module, int] = {}
    spent, started = dict.fromkeys(blocks, 0.0), dict.fromkeys(blocks, 0.0)

    def count(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            values[module] = values.get(module, 0) + output.numel() // rows

    def start(name: str) -> Callable[..., None]:
        return lambda *_: started.__setitem__(name, _now(model.device))

    def stop(name: str) -> Callable[..., None]:
        return lambda *_: spent.__setitem__(name, spent[name] + _now(model.device) - started[name])

    with ExitStack() as stack:
        for module in model.modules():
            if not list(module.children()):
                stack.callback(module.register_forward_hook(count).remove)
        for name, block in blocks.items():
            stack.callback(block.register_forward_pre_hook(start(name)).remove)
            stack.callback(block.register_forward_hook(stop(name)).remove)
        call.run(model)
    tensors = [*model.parameters(), *model.buffers()]
    return Probe(
        seconds=seconds / rows,
        blocks=spent,
        weights=sum(tensor.nbytes for tensor in tensors),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        activations=sum(values.values()),
        block_parameters=max(sum(p.numel() for p in block.parameters()) for block in blocks.values()),
        block_activations=max(sum(values.get(m, 0) for m in block.modules()) for block in blocks.values()),
    )


def estimate(measured: Probe, rows: int, row_bytes: int, others: int, settings: Distillation) -> Estimate:
    """What recording ``rows`` samples and training will take.

    Args:
        row_bytes: of a recorded sample.
        others: bytes of the pipeline's other components, which are in memory while it records.
    """
    samples, batch = min(settings.samples, rows), settings.batch_size
    forward = measured.seconds
    blocks = forward * samples * PASSES + forward * TRAINING_STEP * settings.iterations * batch
    polish = forward * (1 + TRAINING_STEP) * settings.polish_iterations * batch
    training: float = measured.weights + STATE_BYTES * measured.block_parameters
    training += 4 * KEPT_COPIES * batch * measured.block_activations
    if settings.polish_iterations:
        # With gradient checkpointing a block's activations are computed again.
        kept = measured.activations / max(1, len(measured.blocks)) + measured.block_activations
        whole = measured.weights + STATE_BYTES * measured.parameters + 4 * KEPT_COPIES * batch * kept
        training = max(training, whole)
    stored = min(2 * STORED_BYTES, 2 * 4 * samples * measured.activations)
    return Estimate(forward * rows, blocks, polish, max(training, measured.weights + others), rows * row_bytes + stored)


class Remaining:
    """Says after each block how long the rest will take; ``Distillation(progress=...)`` calls it."""

    def __init__(self, measured: Probe, polish: float, done_before: frozenset[str]) -> None:
        self.costs, self.polish = measured.blocks, polish
        self.resumed = done_before
        self.start = time.perf_counter()
        self.spent = 0.0  # in units of the probe, since ``start``

    def __call__(self, name: str, number: int, count: int) -> None:
        if number == 0 or name in self.resumed:
            self.start = time.perf_counter()
            if number:
                say(f"block {number} of {count}: {name}, finished before")
            return
        self.spent += self.costs.get(name, 0.0)
        names = list(self.costs)
        left = sum(self.costs[other] for other in names[number:])
        rest = (time.perf_counter() - self.start) * left / self.spent if self.spent else 0.0
        peak = f", peak GPU memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if _on_gpu() else ""
        say(f"block {number} of {count}: {name}; about {duration(rest + self.polish)} left{peak}")


def _on_gpu() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    start = _now(device)
    run()
    return _now(device) - start
