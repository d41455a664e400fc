"""Block-wise Knowledge Distillation (DilateQuant, arXiv 2409.14307): training a quantized UNet one block at a time.

Blocks are trained in forward order. A block's inputs come from the quantized blocks before it. Its target is its output
in the floating-point UNet. First its weights are rounded with error feedback. Then weights, scales and zero points are
trained together; a batch mixes timesteps, and each sample trains the scale of its own timestep. In a block each loss is
relative to its timestep's error before training, since errors inside the UNet are not comparable between timesteps: all
timesteps have equal weight. In the polish, whose loss is the prediction's error, a timestep's weight is its importance
to the image. A block keeps the best of all its states, measured on samples held out of training (if there are enough to
hold some out), so that no block becomes worse than rounded to nearest.

Ranks share the samples of each batch. Second moments and gradients are summed over the ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dq_runtime import __version__
from dq_runtime.calibration import ranks
from dq_runtime.calibration.batches import MixedBatches
from dq_runtime.calibration.collect import CalibrationSet, RecordedCall
from dq_runtime.calibration.finished_blocks import ACTIVATIONS, FinishedBlocks, fingerprint, work_folder
from dq_runtime.calibration.replay import (
    TensorStore,
    activations_of,
    blocks_in_order,
    last_readers,
    most_activations,
    sources_of,
)
from dq_runtime.calibration.settings import Distillation
from dq_runtime.calibration.simulated import simulated
from dq_runtime.calibration.training import Trainer
from dq_runtime.config import DilateQuantConfig
from dq_runtime.free_memory import return_free_memory
from dq_runtime.timesteps import TimestepGrid

logger = logging.getLogger("dq_runtime")

FEW_SAMPLES = 4  # of one timestep
ACTIVATION_BYTES = 2**29  # of a block's samples that run together on a CPU
KEPT_BYTES = 12  # for each value of a layer's output until the backward pass: three copies in fp32


def distil(
    unet: Any,
    layers: Mapping[str, nn.Linear | nn.Conv2d],
    tensors: dict[str, dict[str, torch.Tensor]],
    sharing: Sequence[Sequence[str]],
    calibration_set: CalibrationSet,
    config: DilateQuantConfig,
    settings: Distillation,
) -> dict[str, dict[str, torch.Tensor]]:
    """Trains the quantized form of a floating-point UNet's layers; the UNet itself is unchanged.

    Args:
        layers: the layers to quantize.
        tensors: each layer's state dict after post-training quantization (see ``QuantizedLayer``). The trained ones
            take their places, block by block.
        sharing: groups of layer names. The layers of a group share their input and one input quantizer.
        config: with ``timesteps``.

    Returns:
        ``tensors``.

    Raises:
        ValueError: if ``settings.folder`` holds the blocks of another calibration, or another process calibrates in it.
    """
    assert config.timesteps is not None
    grid = TimestepGrid(config.timesteps).to(unet.device)
    samples = min(settings.samples, calibration_set.num_samples)
    at_once = _samples_at_once(unet, layers, calibration_set, settings)
    batches = MixedBatches(calibration_set, samples, settings.batch_size, settings.seed, at_once)
    if batches.validation == batches.training:
        logger.warning(
            "Too few samples of some timesteps to hold any out: validation uses the training samples. Record more runs"
        )
    if batches.fewest < FEW_SAMPLES:
        logger.warning(
            "Only %d samples of some timesteps are used for training (%d of all %d timesteps): record more runs, or "
            "raise Distillation(samples=...)",
            batches.fewest, samples, len(calibration_set.timesteps),
        )  # fmt: skip
    digest = fingerprint(unet, batches, _fingerprinted(config, settings))
    with (
        work_folder(None if settings.folder is None else Path(settings.folder)) as (folder, prefix),
        TensorStore(folder / ACTIVATIONS, prefix) as store,
        _checkpointing(unet, settings.gradient_checkpointing),
    ):
        finished = FinishedBlocks(folder, digest)
        for name, of_layer in tensors.items():
            of_layer["packed_weight"] = store.mapped(_packed(name), of_layer["packed_weight"])
        with simulated(unet, layers, tensors, sharing, config, grid) as simulated_layers:
            trainer = Trainer(unet, simulated_layers, _own_part(batches), store, grid, settings)
            _distil_blocks(trainer, finished, batches[0], tensors)
            if settings.polish_iterations:
                wanted = settings.polish_iterations * settings.batch_size
                batches = MixedBatches(calibration_set, wanted, settings.batch_size, settings.seed, at_once)
                Trainer(unet, simulated_layers, _own_part(batches), store, grid, settings).polish()
                tensors |= {name: layer.pack() for name, layer in simulated_layers.items()}
        for of_layer in tensors.values():
            of_layer["packed_weight"] = of_layer["packed_weight"].to(unet.device, copy=True)
    return tensors


def _distil_blocks(
    trainer: Trainer, finished: FinishedBlocks, call: RecordedCall, tensors: dict[str, dict[str, torch.Tensor]]
) -> None:
    """Trains one block after the other, or takes it from the finished ones, and replaces its layers' tensors."""
    store, settings = trainer.store, trainer.settings
    blocks = blocks_in_order(trainer.unet, trainer.layers.values(), call)
    trainer.last_readers = last_readers(sources_of(trainer.unet, blocks, call))
    report, count = settings.progress or (lambda name, number, count: None), len(blocks)
    report("", 0, count)
    for done, (name, block) in enumerate(list(blocks.items()), start=1):
        inside = set(block.modules())
        layers = {n: layer for n, layer in trainer.layers.items() if layer in inside}
        trainer.store_inputs(block)
        if not finished.restore(name, layers):
            trainer.distil(name, blocks, layers)
            finished.save(name, layers)
        for layer in layers.values():
            layer.quantized = True
            trainer.free_quantizers.discard(layer.input_quantizer)
        trainer.store_outputs(name, blocks.pop(name))
        if not settings.polish_iterations:
            tensors |= {n: layer.pack(partial(store.mapped, _packed(n))) for n, layer in layers.items()}
        return_free_memory()
        report(name, done, count)


def _packed(layer: str) -> str:
    """The key of a layer's packed weights in the store: they are read when its block's turn has come."""
    return f"packed_{layer}"


def _samples_at_once(
    unet: Any, layers: Mapping[str, nn.Module], calibration_set: CalibrationSet, settings: Distillation
) -> int:
    call = calibration_set.calls[0]
    blocks = blocks_in_order(unet, layers.values(), call)
    most = most_activations(blocks.values(), activations_of(unet, call))
    return samples_at_once(unet.device, most, settings.batch_size)


def samples_at_once(device: torch.device, activations: int, batch_size: int) -> int:
    """The number of a batch's samples that run together.

    A CPU is as fast with a few, so that their activations take ``ACTIVATION_BYTES`` at most. A GPU is not, and its
    memory is the user's choice by ``batch_size``.

    Args:
        activations: values for one sample in the outputs of the largest block's layers.
    """
    if device.type != "cpu":
        return batch_size
    return max(1, min(batch_size, ACTIVATION_BYTES // (KEPT_BYTES * max(1, activations))))


def _own_part(batches: MixedBatches) -> MixedBatches:
    return batches.part(ranks.number(), ranks.count())


@contextmanager
def _checkpointing(unet: Any, wanted: bool) -> Iterator[None]:
    """Enables diffusers' gradient checkpointing inside the ``with`` block."""
    if not wanted or unet.is_gradient_checkpointing:
        yield
        return
    unet.enable_gradient_checkpointing()
    try:
        yield
    finally:
        unet.disable_gradient_checkpointing()


def _fingerprinted(config: DilateQuantConfig, settings: Distillation) -> dict[str, Any]:
    """The settings that determine a block's result."""
    others = ("folder", "gradient_checkpointing", "polish_iterations", "polish_learning_rate", "progress")
    names = [field.name for field in fields(settings) if field.name not in others]
    return {
        "version": __version__,
        "config": config.to_dict(),
        "distillation": {name: getattr(settings, name) for name in names},
    }
