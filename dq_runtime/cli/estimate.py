"""Time and memory that a quantization will take, estimated from one measured call of the model.

The estimates count forward and backward passes, and the candidates of the search for each weight's scale. The time of
the blocks is corrected by each block that is finished.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from dq_runtime.calibration import ranks
from dq_runtime.calibration.batches import HELD_OUT
from dq_runtime.calibration.collect import RecordedCall
from dq_runtime.calibration.distillation import KEPT_BYTES, samples_at_once
from dq_runtime.calibration.replay import (
    activations_of,
    blocks_in_order,
    last_readers,
    most_activations,
    sources_of,
)
from dq_runtime.calibration.settings import Distillation
from dq_runtime.calibration.training import STORED_BYTES
from dq_runtime.cli.console import duration, say
from dq_runtime.cli.drawing import repeated
from dq_runtime.weights import in_parts, quantize_dilated

CANDIDATES = 160  # scales of the weights in the comparison of dilations and in rounding
FEEDBACK = 250  # error feedback takes the time of so many candidates, measured on SD1.5's UNet
TRAINING_STEP = 5.0  # forward passes: a forward and a backward pass with simulated quantizers
PASSES = 8.0  # over all training samples: targets, second moments, errors, validations and outputs
STATE_BYTES = 20  # a trained weight: it, its gradient, Adam's two moments and the original, in fp32
# A call is timed with its own samples and, unless that takes long, with so many times as many.
LARGER, SLOW = 4, 2.0  # times; seconds
TIMED = 16  # candidates of a search that is timed
MOST_OVERHEAD = 100  # a sample's time is at least this fraction of a call's time for each sample
BLOCK_BYTES = 28  # a weight of the block in training, with the temporary copies of its largest layer
PACKED_BYTES = 0.5  # a packed weight: in memory before and after the blocks, on disk meanwhile
FILE_BYTES = 2  # a weight in a finished block's file
WEIGHT_BYTES = 4  # a floating-point weight of the block in training, on disk
KEPT_STATES = 3  # of the block in training, on disk
PROCESS_BYTES = 6e8  # Python, torch and diffusers, on a CPU


@dataclass(frozen=True)
class Probe:
    """One measured call of a floating-point model.

    Attributes:
        overhead, seconds: of a call of B samples, which takes ``overhead + B seconds``.
        device: of the model.
        blocks: seconds of each block in the call, in their order; only ratios are used.
        search: seconds for one scale of each weight.
        weights: bytes of the model.
        parameters, activations: of the whole model: number of weights, and of values in all layers' outputs for one
            sample.
        targets: bytes of all blocks' outputs for one sample.
        stored: bytes of finished blocks' outputs that are kept for later blocks, at most, and of a block's inputs, for
            one sample.
        block_parameters, block_activations: the largest over the blocks.
    """

    device: torch.device
    overhead: float
    seconds: float
    blocks: dict[str, float]
    search: float
    weights: int
    parameters: int
    activations: int
    targets: int
    stored: int
    block_parameters: int
    block_activations: int

    def seconds_of(self, batch: int) -> float:
        """Of a call."""
        return self.overhead + batch * self.seconds


@dataclass(frozen=True)
class Estimate:
    """Seconds of each part, and bytes."""

    collecting: float
    searching: float
    blocks: float
    polish: float
    memory: float
    disk: float

    @property
    def seconds(self) -> float:
        """All parts together."""
        return self.collecting + self.searching + self.blocks + self.polish


def probe(model: Any, layers: Mapping[str, nn.Module], call: RecordedCall) -> Probe:
    """Measures a call of a model, once it has run before.

    Args:
        layers: the layers that will be quantized.
    """
    blocks = blocks_in_order(model, layers.values(), call)  # also the first, slower call
    overhead, seconds = _time_of_calls(model, call)
    rows = call.sample.shape[0]
    returned = dict.fromkeys(blocks, 0)  # bytes for one sample
    spent, started = dict.fromkeys(blocks, 0.0), dict.fromkeys(blocks, 0.0)

    def start(name: str) -> Callable[..., None]:
        return lambda *_: started.__setitem__(name, _now(model.device))

    def stop(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            spent[name] += _now(model.device) - started[name]
            returned[name] = sum(leaf.nbytes for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)) // rows

        return note

    with ExitStack() as stack:
        for name, block in blocks.items():
            stack.callback(block.register_forward_pre_hook(start(name)).remove)
            stack.callback(block.register_forward_hook(stop(name)).remove)
        values = activations_of(model, call)
    tensors = [*model.parameters(), *model.buffers()]
    return Probe(
        device=model.device,
        overhead=overhead,
        seconds=seconds,
        blocks=spent,
        search=_time_of_search(layers),
        weights=sum(tensor.nbytes for tensor in tensors),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        activations=sum(values.values()),
        targets=sum(returned.values()),
        stored=_stored(returned, sources_of(model, blocks, call)),
        block_parameters=max(sum(p.numel() for p in block.parameters()) for block in blocks.values()),
        block_activations=most_activations(blocks.values(), values),
    )


def _stored(returned: Mapping[str, int], sources: Mapping[str, set[str]]) -> int:
    """The most bytes at any block: of the outputs that it or a later block reads, and of its inputs."""
    order = {name: number for number, name in enumerate(returned)}
    last = {source: order[reader] for source, reader in last_readers(sources).items()}
    return max(
        sum(returned[source] for source, reader in last.items() if order[source] < order[name] <= reader)
        + sum(returned[source] for source in sources[name])
        for name in returned
    )


def _time_of_search(layers: Mapping[str, nn.Module]) -> float:
    """Seconds for one candidate of the scale of each weight, from a part of the largest."""
    weights: list[Any] = [layer.weight for layer in layers.values()]
    part = next(in_parts(max(weights, key=lambda weight: weight.numel())))
    dilation = torch.ones(part.shape[1], device=part.device)
    seconds = min(_seconds(lambda: quantize_dilated(part, dilation, TIMED), part.device) for _ in range(2)) / TIMED
    return seconds / part.numel() * sum(weight.numel() for weight in weights)


def _time_of_calls(model: Any, call: RecordedCall) -> tuple[float, float]:
    """Seconds for a call, and in addition for each of its samples."""
    rows, times = call.sample.shape[0], []
    for factor in (1, LARGER):
        larger = repeated(call, factor)
        times.append(min(_seconds(lambda: larger.run(model), model.device) for _ in range(2)))  # noqa: B023
        if times[0] > SLOW:
            return 0.0, times[0] / rows
    for_each = max((times[1] - times[0]) / ((LARGER - 1) * rows), times[0] / rows / MOST_OVERHEAD)
    return max(0.0, times[0] - rows * for_each), for_each


def estimate(
    measured: Probe, calls: int, call_rows: int, row_bytes: int, others: int, settings: Distillation
) -> Estimate:
    """What recording so many calls of ``call_rows`` samples and training will take, with memory for each rank.

    Args:
        row_bytes: of a recorded sample.
        others: bytes of the pipeline's other components, which are in memory while it records.
    """
    rows = calls * call_rows
    samples = min(settings.samples, rows)
    batch = min(settings.batch_size, samples)
    own = math.ceil(batch / ranks.count())  # this rank's part
    at_once = min(own, samples_at_once(measured.device, measured.block_activations, batch))
    forward = own / at_once * measured.seconds_of(at_once)
    blocks = forward * (PASSES * math.ceil(samples / batch) + TRAINING_STEP * settings.iterations)
    blocks += FEEDBACK * measured.search
    polish = forward * (1 + TRAINING_STEP) * settings.polish_iterations
    collecting = math.ceil(calls / ranks.count()) * measured.seconds_of(call_rows)
    searching = (
        collecting + CANDIDATES * measured.search / ranks.count()
    )  # the calls run once more, for the layers' inputs
    held = measured.weights + (PROCESS_BYTES if measured.device.type == "cpu" else 0)
    packed = PACKED_BYTES * measured.parameters
    training = held + BLOCK_BYTES * measured.block_parameters + KEPT_BYTES * at_once * measured.block_activations
    if settings.polish_iterations:
        # With gradient checkpointing a block's activations are computed again.
        kept = measured.activations / max(1, len(measured.blocks)) + measured.block_activations
        training = max(training, held + STATE_BYTES * measured.parameters + KEPT_BYTES * at_once * kept)
    drawn = samples + samples / HELD_OUT
    disk = rows * row_bytes + min(STORED_BYTES, drawn * measured.targets) + drawn * measured.stored
    disk += FILE_BYTES * (measured.parameters + KEPT_STATES * measured.block_parameters)
    disk += packed + WEIGHT_BYTES * measured.block_parameters
    return Estimate(collecting, searching, blocks, polish, max(training, held + max(packed, others)), disk)


class Remaining:
    """Says after each block how long the rest will take; ``Distillation(progress=...)`` calls it."""

    def __init__(self, measured: Probe, expected: Estimate, done_before: frozenset[str]) -> None:
        self.costs, self.expected = measured.blocks, expected
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
        elapsed = time.perf_counter() - self.start
        of_all_blocks = elapsed * sum(self.costs.values()) / self.spent if self.spent else self.expected.blocks
        rest = of_all_blocks * left / sum(self.costs.values())
        rest += self.expected.polish * of_all_blocks / self.expected.blocks
        peak = f", peak GPU memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if _on_gpu() else ""
        say(f"block {number} of {count}: {name}; about {duration(rest)} left{peak}")


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
