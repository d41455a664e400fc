"""The training of one block, or of the whole model, on this rank's part of all samples."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from dq_runtime.architectures.supported import architecture_of
from dq_runtime.calibration import ranks
from dq_runtime.calibration.batches import MixedBatches
from dq_runtime.calibration.deferred import deferred, on_meta
from dq_runtime.calibration.error_feedback import SecondMoments
from dq_runtime.calibration.replay import TensorStore, inputs_of, outputs_of, squared_error
from dq_runtime.calibration.settings import Distillation
from dq_runtime.calibration.simulated import SimulatedLayer, set_states, states_of
from dq_runtime.rollback import uninterrupted
from dq_runtime.timesteps import TimestepGrid

logger = logging.getLogger("dq_runtime")

ERROR_SAMPLES = 512  # samples that measure each timestep's error
LOSS_SCALE = 2.0**10  # keeps gradients of float16 UNets from underflowing; Adam is invariant to it
STORED_BYTES = 2**32  # of targets, on disk; the rest is recomputed

SampleLosses = Callable[[int], torch.Tensor]


class Trainer:
    """A UNet with simulated layers, and this rank's part of the batches that they are trained on.

    All ranks call its methods in the same order, whatever their parts. ``SampleLosses`` is a function from the number
    of a batch that is not empty to the weighted squared error of each of its samples, [B].
    """

    def __init__(
        self,
        unet: Any,
        simulated_layers: Mapping[str, SimulatedLayer],
        batches: MixedBatches,
        store: TensorStore,
        grid: TimestepGrid,
        settings: Distillation,
    ) -> None:
        self.unet, self.layers, self.batches, self.store, self.grid = unet, simulated_layers, batches, store, grid
        self.settings = settings
        self.result = architecture_of(unet).result
        self.device = unet.device  # read once: diffusers visits every module for it
        self.own = [i for i in range(len(batches)) if not batches.is_empty(i)]
        parts = ((i, batches[i]) for i in self.own)
        self.indices = {i: grid.nearest(part.timestep, part.sample.shape[0], self.device) for i, part in parts}
        self.shares = {i: batches.share(i).to(self.device) for i in self.own}
        self.training, self.validation = batches.training, batches.validation
        count = -(-ERROR_SAMPLES // batches.at_once)
        self.error_batches = range(max(0, len(batches) - count), len(batches))
        self.finished: dict[str, nn.Module] = {}  # blocks by name, whose outputs are read by later ones
        self.last_readers: Mapping[str, str] = {}  # block -> the last one that reads its output
        self.outputs: dict[str, Any] = {}  # by key in the store, on the meta device
        # An input quantizer that is shared with an earlier block is fixed.
        self.free_quantizers = {layer.input_quantizer for layer in simulated_layers.values()}

    def distil(self, name: str, blocks: Mapping[str, nn.Module], layers: Mapping[str, SimulatedLayer]) -> None:
        """Trains a block's layers. ``blocks`` are this one and those after it; those before it are quantized."""

        def error(i: int) -> torch.Tensor:
            return squared_error(self._run_block(blocks[name], i), self.store[_target(name, i)])

        if self.own and _target(name, self.own[0]) not in self.store:
            self._store_targets(blocks)
        start = self._feedback(blocks[name], layers) if self.settings.error_feedback else {}
        for layer in layers.values():
            layer.unpack()
            layer.quantized = True
        present = self._error_of_timesteps(error)
        weights = {i: 1 / present[self.indices[i]] / self.shares[i] for i in self.own}
        iterations, learning_rate = self.settings.iterations, self.settings.learning_rate
        with self._on_disk([layer.weight for layer in layers.values()]):
            self._train(name, lambda i: error(i) * weights[i], layers, start, iterations, learning_rate)
        for i in self.own:
            del self.store[_target(name, i)]

    def store_inputs(self, block: nn.Module) -> None:
        """Stores the inputs that a block gets from the finished blocks before it."""
        for i in self.own:
            outputs = {finished: partial(self._output, name, i) for name, finished in self.finished.items()}
            self.store[f"inputs_{i}"] = inputs_of(self.unet, block, self.batches[i], outputs)

    def _output(self, name: str, i: int) -> Any:
        """A finished block's output in batch ``i``, which is read from the store if something depends on it."""
        key = f"output_{name}_{i}"

        def read() -> Any:
            if key not in self.store:
                raise RuntimeError(f"{name}: batch {i} takes another path through the model than the first one")
            return tree_map_only(torch.Tensor, lambda tensor: tensor.to(self.device), self.store[key])

        return deferred(name, self.outputs[key], self.device, read)

    @torch.no_grad()
    def store_outputs(self, name: str, block: nn.Module) -> None:
        """Stores a finished block's outputs, if a later block reads them, and deletes what no later one reads."""
        self.finished[name] = block
        for i in self.own:
            key = f"output_{name}_{i}"
            output = self._call_block(block, i)
            self.outputs[key] = on_meta(output)
            if name in self.last_readers:
                self.store[key] = output
            del self.store[f"inputs_{i}"]
            for read in [other for other, last in self.last_readers.items() if last == name]:
                del self.store[f"output_{read}_{i}"]

    def _store_targets(self, blocks: Mapping[str, nn.Module]) -> None:
        """Stores the outputs of the first blocks in the floating-point UNet, up to ``STORED_BYTES`` on all ranks."""
        stored: dict[str, int] = {}  # bytes per batch
        limit = STORED_BYTES / ranks.count() / len(self.own)

        def keep(name: str, output: torch.Tensor) -> bool:
            self.store[_target(name, i)] = output
            stored[name] = output.nbytes
            return i != self.own[0] or sum(stored.values()) < limit

        with self._in_floating_point():
            for i in self.own:
                wanted = {name: blocks[name] for name in stored or blocks}
                outputs_of(self.unet, wanted, self.batches[i], keep)

    def polish(self) -> None:
        """Trains all layers together on the UNet's prediction."""

        def losses_of(i: int) -> torch.Tensor:
            with self._in_floating_point(), torch.autocast(self.device.type, enabled=False):
                target = self.result(self.batches[i].run(self.unet))
            error = squared_error(self.result(self.batches[i].run_with_gradients(self.unet)), target)
            return error * self.batches.importance(i).to(error.device) / self.shares[i]

        settings = self.settings
        self._train("whole UNet", losses_of, self.layers, {}, settings.polish_iterations, settings.polish_learning_rate)

    def _train(
        self,
        name: str,
        losses_of: SampleLosses,
        layers: Mapping[str, SimulatedLayer],
        start: dict[str, tuple[torch.Tensor, torch.Tensor]],
        iterations: int,
        learning_rate: float,
    ) -> None:
        """Applies error feedback and training to layers, and keeps the best of the initial and the resulting states.

        Args:
            start: weights after error feedback, where training starts; it is emptied. If there are none, training
                starts from the present weights.
        """
        errors: list[float] = []

        def keep() -> None:
            """Notes the present state, on disk, and its error."""
            self.store[_state(len(errors))] = states_of(layers)
            errors.append(self._validate(losses_of))

        keep()
        with ranks.progress_bar(total=iterations, desc=name) as progress:
            if start:
                for layer_name, layer in layers.items():
                    layer.unfreeze(start[layer_name])
                    layer.freeze()
                keep()
            if iterations:
                scale = LOSS_SCALE / self.settings.batch_size / max(errors[0], torch.finfo(torch.float32).tiny)
                self._descend(lambda i: scale * losses_of(i).sum(), layers, start, iterations, learning_rate, progress)
                keep()
            best = min(range(len(errors)), key=lambda i: errors[i] if math.isfinite(errors[i]) else math.inf)
            set_states(layers, ranks.from_first(self.store[_state(best)]))  # the same bits on all ranks
            for i in range(len(errors)):
                del self.store[_state(i)]
            progress.set_postfix_str(f"squared error {errors[0]:.2g} -> {errors[best]:.2g}")
        if not errors[-1] <= errors[0]:
            logger.warning(
                "%s: training changed the squared error from %.3g to %.3g; the best state, with %.3g, is restored",
                name, errors[0], errors[-1], errors[best],
            )  # fmt: skip

    @torch.enable_grad()
    def _descend(
        self,
        loss_of: Callable[[int], torch.Tensor],
        layers: Mapping[str, SimulatedLayer],
        start: dict[str, tuple[torch.Tensor, torch.Tensor]],
        iterations: int,
        learning_rate: float,
        progress: Any,
    ) -> None:
        quantizers = {
            layer.input_quantizer: None for layer in layers.values() if layer.input_quantizer in self.free_quantizers
        }
        in_steps: list[torch.Tensor] = [quantizer.zero_point for quantizer in quantizers]
        logarithms: list[torch.Tensor] = [quantizer.log_ratio for quantizer in quantizers]
        for name, layer in layers.items():
            layer_in_steps, layer_logarithms = layer.unfreeze(start.pop(name, None))
            in_steps += layer_in_steps
            logarithms += layer_logarithms
        groups = [
            {"params": in_steps, "lr": learning_rate},
            {"params": logarithms, "lr": self.settings.scale_learning_rate},
        ]
        optimizer = torch.optim.Adam(groups, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
        generator = torch.Generator().manual_seed(self.settings.seed)
        for parameter in (*in_steps, *logarithms):
            parameter.requires_grad_(True)
        in_a_step = -(-self.settings.batch_size // self.batches.at_once)  # batches, whose gradients add up
        loss = torch.zeros((), dtype=torch.float32, device=self.device)
        for i, batch in enumerate(_shuffled(self.training, iterations * in_a_step, generator), start=1):
            if batch in self.indices:
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.autocast):
                    of_batch = loss_of(batch)
                of_batch.backward()
                loss += of_batch.detach()
            if i % in_a_step == 0:
                _add_over_ranks(loss, (*in_steps, *logarithms))
                if not bool(loss.isfinite()):
                    break  # validation decides on this state
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                progress.update()
                loss.zero_()
        del optimizer, schedule, groups, in_steps, logarithms  # before rounding, which needs memory, too
        for quantizer in quantizers:
            quantizer.requires_grad_(False)
        for layer in layers.values():
            layer.freeze()

    @torch.no_grad()
    def _error_of_timesteps(self, error: SampleLosses) -> torch.Tensor:
        """The present mean error of each timestep, [T]. Timesteps without samples get the mean of all."""
        # On the CPU, where the order of summation is fixed.
        total, count = (torch.zeros(self.grid.num_timesteps, dtype=torch.float32) for _ in range(2))
        for i in self._owned(self.error_batches):
            errors, index = error(i).cpu(), self.indices[i].cpu()
            total.index_add_(0, index, errors)
            count.index_add_(0, index, torch.ones_like(errors))
        total, count = (torch.stack(parts).sum(0) for parts in zip(*ranks.exchange((total, count)), strict=True))
        mean = torch.where(count > 0, total / count, total.sum() / count.sum())
        return mean.clamp(min=torch.finfo(torch.float32).tiny).to(self.device)

    @torch.no_grad()
    def _validate(self, losses_of: SampleLosses) -> float:
        """The mean over the validation samples."""
        none = torch.zeros(0, dtype=torch.float32, device=self.device)
        own = torch.cat([none, *(losses_of(i) for i in self._owned(self.validation))])
        return torch.cat(ranks.exchange(own)).mean().item()

    @torch.no_grad()
    def _feedback(
        self, block: nn.Module, layers: Mapping[str, SimulatedLayer]
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Each layer's weights after error feedback on its inputs from the training batches."""
        moments = {name: SecondMoments(layer) for name, layer in layers.items()}
        handles = [layers[name].register_forward_pre_hook(moments[name].add) for name in layers]
        try:
            for i in self._owned(self.training):
                self._run_block(block, i)
        finally:
            for handle in handles:
                handle.remove()
        ranks.add(total for of_layer in moments.values() for total in of_layer.sums)
        names, rounded, failure = list(layers), [], None
        try:
            for name in ranks.part(names):
                rounded.append(moments.pop(name).rounded())
        except ValueError as error:
            failure = error
        failures = [each for each in ranks.exchange(failure) if each is not None]
        if failures:
            logger.warning("%s: no error feedback, %s", ", ".join(layers), failures[0])
            return {}
        on_device = [(steps.to(self.device), ratio.to(self.device)) for steps, ratio in ranks.joined(rounded)]
        return dict(zip(names, on_device, strict=True))

    def _owned(self, batches: Iterable[int]) -> list[int]:
        """Those in which this rank has samples."""
        return [i for i in batches if i in self.indices]

    def _run_block(self, block: nn.Module, i: int) -> torch.Tensor:
        return self.result(self._call_block(block, i))

    def _call_block(self, block: nn.Module, i: int) -> Any:
        args, kwargs = tree_map_only(torch.Tensor, lambda t: t.to(self.device), self.store[f"inputs_{i}"])
        self.grid.index = self.indices[i]
        return block(*args, **kwargs)

    @contextmanager
    def _on_disk(self, weights: Sequence[torch.Tensor]) -> Iterator[None]:
        """Holds floating-point weights, which training does not read, in files instead of a CPU's memory."""
        if self.device.type != "cpu":
            yield
            return
        keys = {weight: f"weight_{number}" for number, weight in enumerate(weights)}
        try:
            for weight, key in keys.items():
                weight.data = self.store.mapped(key, weight.data)
            yield
        finally:
            with uninterrupted():
                for weight, key in keys.items():
                    if key in self.store:
                        weight.data = weight.data.clone()
                        del self.store[key]

    @contextmanager
    def _in_floating_point(self) -> Iterator[None]:
        quantized = [layer for layer in self.layers.values() if layer.quantized]
        for layer in quantized:
            layer.quantized = False
        try:
            yield
        finally:
            for layer in quantized:
                layer.quantized = True


def _add_over_ranks(loss: torch.Tensor, parameters: Sequence[torch.Tensor]) -> None:
    """Replaces the loss and the gradients by their sums; ranks without samples have no gradients yet."""
    if ranks.count() > 1:
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        ranks.add([loss, *(parameter.grad for parameter in parameters if parameter.grad is not None)])


def _target(block: str, batch: int) -> str:
    """The key of a block's target in the store."""
    return f"target_{block}_{batch}"


def _state(number: int) -> str:
    """The key of a state of the layers in training in the store."""
    return f"state_{number}"


def _shuffled(batches: Sequence[int], count: int, generator: torch.Generator) -> Iterator[int]:
    """``count`` of the batches: all in random order, then all again in another order."""
    while count > 0:
        for i in torch.randperm(len(batches), generator=generator)[:count].tolist():
            yield batches[i]
        count -= len(batches)
