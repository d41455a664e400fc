"""What a distillation holds in memory and on disk, and what it computes again."""

import copy
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from distilling import (
    FEW_BLOCKS,
    SMALL,
    UNTRAINED,
    assert_same_state,
    assert_unchanged,
    interrupt,
    snapshot,
)

from dq_runtime import DilateQuantConfig, Distillation, calibrate
from dq_runtime.calibration import distillation, replay, training
from dq_runtime.calibration.replay import TensorStore


def test_activations_lie_on_the_disk_while_a_block_is_trained_and_no_longer(plain, monkeypatch, tmp_path):
    original, sizes = training.Trainer._train, {}

    def train(self, name, *args):
        files = list((tmp_path / "activations").iterdir())
        sizes[name] = sum(file.stat().st_size for file in files)
        return original(self, name, *args)

    monkeypatch.setattr(training.Trainer, "_train", train)
    plain.distil(folder=tmp_path, iterations=0)
    # Inputs and target of 24 samples, 8 x 8: 16 channels each, and the time embedding of 64.
    assert sizes["down_blocks.0.resnets.0"] >= 4 * 24 * (2 * 16 * 64 + 64)
    assert not list((tmp_path / "activations").iterdir())


def test_targets_of_many_blocks_at_once_are_those_of_each_by_itself(plain, monkeypatch):
    original, wanted = training.outputs_of, []

    def outputs_of(unet, blocks, *args):
        wanted.append(len(blocks))
        return original(unet, blocks, *args)

    monkeypatch.setattr(training, "outputs_of", outputs_of)
    plain.distil(iterations=0)
    batches = len(wanted)
    assert wanted == batches * [6]

    wanted.clear()
    monkeypatch.setattr(training, "STORED_BYTES", 1)
    one_by_one = plain.distil()
    later = [1] * (batches - 1)
    assert wanted == [6, *later, 5, *later, 4, *later, 3, *later, 2, *later, 1, *later]
    assert_same_state(one_by_one, plain.distilled)


@pytest.fixture
def results(monkeypatch):
    """Names under which results of finished blocks are stored, and read."""
    put, get, names = TensorStore.__setitem__, TensorStore.__getitem__, {"stored": [], "read": []}

    def noting(what, original):
        def method(store, name, *tree):
            if name.startswith("output_"):
                names[what].append(name)
            return original(store, name, *tree)

        return method

    monkeypatch.setattr(TensorStore, "__setitem__", noting("stored", put))
    monkeypatch.setattr(TensorStore, "__getitem__", noting("read", get))
    return names


def test_each_block_reads_what_it_depends_on_alone(plain, results):
    plain.distil(**UNTRAINED)
    batches = len({name.rpartition("_")[2] for name in results["stored"]})
    assert len(set(results["stored"])) == len(results["stored"]) == 5 * batches  # none reads the sixth block's
    # The blocks: two linears of the time embedding, then conv1, conv2 and the shortcut of a resnet, conv_out.
    assert len(results["read"]) == 6 * batches


def test_blocks_run_once_for_each_batch_before_their_training_and_once_after(plain, monkeypatch):
    """However many blocks come after them."""
    calls, original = [], training.Trainer._call_block

    def call_block(self, block, i):
        calls.append(block)
        return original(self, block, i)

    monkeypatch.setattr(training.Trainer, "_call_block", call_block)
    plain.distil(**UNTRAINED | {"error_feedback": False})
    numbers = {block: calls.count(block) for block in calls}
    assert len(numbers) == 6
    assert len(set(numbers.values())) == 1


def test_layers_hold_more_than_four_bits_a_weight_in_their_block_alone(plain, monkeypatch):
    unpacked, original = [], training.Trainer.distil

    def distil(self, name, blocks, layers):
        original(self, name, blocks, layers)
        held = {other for other, layer in self.layers.items() if layer._values is not None}
        unpacked.append(held == layers.keys())

    monkeypatch.setattr(training.Trainer, "distil", distil)
    assert_same_state(plain.distil(), plain.distilled)
    assert unpacked == [True] * 6


def test_samples_whose_activations_do_not_fit_run_apart_and_train_together(plain, monkeypatch):
    batches, steps = [], []
    call_block, step = training.Trainer._call_block, torch.optim.Adam.step

    def counted(self, block, i):
        batches.append(len(self.indices[i]))
        return call_block(self, block, i)

    monkeypatch.setattr(training.Trainer, "_call_block", counted)
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self, *args: steps.append(self) or step(self, *args))
    monkeypatch.setattr(distillation, "ACTIVATION_BYTES", 1)
    apart = plain.distil()

    assert set(batches) == {1}
    assert len(steps) == 2 * 6
    assert plain.error(apart) == pytest.approx(plain.error(plain.distilled), rel=0.1)


def test_what_no_later_block_reads_is_deleted(plain, monkeypatch):
    """At the end of the last block nothing is left."""
    left = []
    original = training.Trainer.store_outputs

    def store_outputs(self, name, block):
        original(self, name, block)
        left.append(sorted({key.rpartition("_")[0] for key in self.store._trees if key.startswith("output_")}))

    monkeypatch.setattr(training.Trainer, "store_outputs", store_outputs)
    plain.distil(**UNTRAINED)
    assert len(left) == 6
    assert max(map(len, left)) <= 3
    assert left[-1] == []


@pytest.mark.parametrize("most", [1, 200_000])
def test_targets_that_do_not_fit_on_the_disk_are_computed_again(plain, monkeypatch, tmp_path, most):
    monkeypatch.setattr(training, "STORED_BYTES", most)
    assert_same_state(plain.distil(), plain.distilled)

    with monkeypatch.context() as patch:
        interrupt(patch, training.Trainer, "distil", 3)
        with pytest.raises(KeyboardInterrupt):
            plain.distil(folder=tmp_path)
    assert_same_state(plain.distil(folder=tmp_path), plain.distilled)


def test_the_temporary_folder_is_removed(plain, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    original, seen = training.Trainer.distil, set()

    def distil(self, *args):
        seen.update(tmp_path.iterdir())
        return original(self, *args)

    monkeypatch.setattr(training.Trainer, "distil", distil)
    plain.distil(**UNTRAINED)
    assert len(seen) == 1
    assert isinstance(next(iter(seen)), Path)
    assert not list(tmp_path.iterdir())


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
