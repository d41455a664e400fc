"""Distillation keeps on disk what it does not read: packed weights, and the block's own floating-point weights."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from distilling import FEW_BLOCKS, SMALL, UNTRAINED, assert_same_state, assert_unchanged, snapshot

from dq_runtime import DilateQuantConfig, Distillation, calibrate
from dq_runtime.calibration import replay, training

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's table of mapped files")


def is_mapped(tensor):
    """Whether a tensor's memory is a file's."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, *_ = line.split(maxsplit=1)
        start, end = (int(address, 16) for address in addresses.split("-"))
        if start <= tensor.data_ptr() < end:
            return ".safetensors" in line
    raise AssertionError("no memory has the tensor's address")


@pytest.fixture
def seen(monkeypatch):
    """Which weights are mapped while a block is in training: (layer, floating-point weight, packed weights)."""
    found, train = [], training.Trainer._train

    def noting(trainer, name, losses_of, layers, *rest):
        for layer_name, layer in trainer.layers.items():
            packed = None if layer._packed is None else is_mapped(layer._packed)
            found.append((name, layer_name, layer_name in layers, is_mapped(layer.weight), packed))
        train(trainer, name, losses_of, layers, *rest)

    monkeypatch.setattr(training.Trainer, "_train", noting)
    return found


@linux
def test_only_what_is_in_use_is_in_memory(plain, seen):
    unet = copy.deepcopy(plain.unet)
    calibrated = calibrate(unet, plain.calibration_set, DilateQuantConfig(**FEW_BLOCKS), Distillation(**SMALL))

    assert len({block for block, *_ in seen}) > 2
    for block, layer, in_training, weight, packed in seen:
        assert weight == in_training, (block, layer)
        # A layer in training has no packed weights; those before it are packed again.
        assert packed is (None if in_training else True), (block, layer)
    assert not any(is_mapped(tensor) for tensor in calibrated.state_dict().values() if tensor.numel())


@pytest.mark.parametrize("at", [0, 3])
def test_a_full_disk_leaves_all_weights(plain, monkeypatch, at):
    unet, write, written = copy.deepcopy(plain.unet), replay.write_tensors, []
    before = snapshot(unet)

    def full(stream, tensors, metadata):
        if Path(stream.name).name.partition(".")[2].startswith("weight_"):
            written.append(stream.name)
            if len(written) > at:
                raise OSError(28, "No space left on device")
        write(stream, tensors, metadata)

    monkeypatch.setattr(replay, "write_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        calibrate(unet, plain.calibration_set, plain.config, Distillation(**SMALL))
    assert len(written) == at + 1
    assert_unchanged(unet, before)


def test_weights_that_are_shared_are_the_same_afterwards(plain):
    tied = copy.deepcopy(plain.unet)
    first, second = tied.down_blocks[0].resnets[0].conv2, tied.down_blocks[0].resnets[0].conv1
    with torch.no_grad():
        first.weight = second.weight
    expected = copy.deepcopy(tied)
    expected.down_blocks[0].resnets[0].conv2.weight = torch.nn.Parameter(second.weight.detach().clone())

    for unet in (tied, expected):
        calibrate(unet, plain.calibration_set, DilateQuantConfig(**FEW_BLOCKS), Distillation(**UNTRAINED))
    assert_same_state(tied, expected)
