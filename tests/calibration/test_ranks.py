"""Calibration on several ranks: the result of one process within rounding, and failures that end all ranks.

Within rounding: a batch's parts are multiplied in other GEMMs and their sums are added in another order, which changes
last bits. A changed bit can move a weight that lies next to the midpoint of two values, and error feedback passes that
on to the weights behind it. In the six blocks of these tests that stays below one weight in a thousand.
"""

import copy
import os
from dataclasses import replace

import pytest
import torch
from distilling import (
    FEW_BLOCKS,
    SMALL,
    assert_same_state,
    assert_unchanged,
    distilled,
    interrupt,
    output_error,
    quantized_layers,
    recorded,
    snapshot,
)
from several_ranks import on_ranks

from dq_runtime import DilateQuantConfig, Distillation, calibrate
from dq_runtime.calibration import distillation, ranks
from dq_runtime.calibration.batches import MixedBatches

FEWER_BLOCKS = {"modules_to_not_convert": [*FEW_BLOCKS["modules_to_not_convert"], "time_embedding", "resnets"]}


def nibbles(unet):
    packed = torch.cat([layer.packed_weight.flatten() for layer in quantized_layers(unet).values()])
    return torch.stack([packed & 15, packed >> 4])


def assert_same_within_rounding(actual, expected, plain):
    differing = (nibbles(actual) != nibbles(expected)).float().mean()
    assert differing < 1e-3
    between = output_error(actual, expected, plain.calibration_set)
    assert between < 0.03 * output_error(expected, plain.unet, plain.calibration_set)


@pytest.fixture(scope="module")
def two(plain, tmp_path_factory):
    """What each of two ranks makes: UNets by the way of calibration, and the folder of finished blocks."""
    folder = tmp_path_factory.mktemp("blocks")

    def work(rank):
        return {
            "rounded": calibrate(copy.deepcopy(plain.unet), plain.calibration_set, plain.config, distillation=None),
            "distilled": plain.distil(folder=folder, polish_iterations=1),
            "batches of 3 and 1": few_samples(plain, (10, 500, 900, 901)),
            "one sample": few_samples(plain, (500,)),
        }

    return on_ranks(work, tmp_path_factory.mktemp("group")), folder


def few_samples(plain, timesteps):
    """One sample of each timestep, in batches of three, the last of which is smaller."""
    calls = recorded(plain.unet, rows=1, timesteps=timesteps)
    return distilled(plain.unet, calls, DilateQuantConfig(**FEWER_BLOCKS), batch_size=3)


def test_all_ranks_have_the_same_bits(two):
    (first, second), _ = two

    for way, unet in first.items():
        assert_same_state(second[way], unet)


def test_without_training_two_ranks_have_the_bits_of_one_process(plain, two):
    assert_same_state(two[0][0]["rounded"], plain.rounded)


def test_distillation_on_two_ranks_is_that_of_one_process_within_rounding(plain, two):
    expected = plain.distil(polish_iterations=1)

    assert_same_within_rounding(two[0][0]["distilled"], expected, plain)


def test_a_batch_may_have_fewer_samples_than_there_are_ranks(plain, two):
    for way, timesteps in (("batches of 3 and 1", (10, 500, 900, 901)), ("one sample", (500,))):
        assert_same_within_rounding(two[0][0][way], few_samples(plain, timesteps), plain)


def test_one_process_goes_on_with_the_blocks_of_two_ranks(plain, two, monkeypatch):
    (first, _), folder = two
    calls = interrupt(monkeypatch, distillation._Trainer, "distil", -1)

    resumed = plain.distil(folder=folder, polish_iterations=1)

    assert not calls
    assert_same_within_rounding(resumed, first["distilled"], plain)
    assert {file.name for file in folder.iterdir() if not file.name.endswith(".safetensors")} == {
        "activations", "calibration.json"
    }  # fmt: skip
    assert not list((folder / "activations").iterdir())


def test_two_ranks_go_on_with_the_blocks_of_one_process_and_share_the_calls(plain, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        interrupt(patch, distillation._Trainer, "distil", 5)
        with pytest.raises(KeyboardInterrupt):
            plain.distil(folder=tmp_path)
    calls = interrupt(monkeypatch, distillation._Trainer, "distil", -1)
    replayed = interrupt(monkeypatch, distillation, "inputs_of", -1)
    (tmp_path / "group").mkdir()

    def work(rank):
        result = plain.distil(folder=tmp_path)
        return result, len(calls), sum(call.sample.shape[0] for _, _, call, _ in replayed)

    (first, *counts), (second, *others) = on_ranks(work, tmp_path / "group")

    assert_same_state(first, second)
    assert_same_within_rounding(first, plain.distilled, plain)
    samples = sum(len(batch.sample) for batch in MixedBatches(plain.calibration_set, 24, 6, 0))
    assert [counts, others] == [[1, samples // 2 * 6]] * 2
    assert samples % 2 == 0


def test_an_error_of_one_rank_ends_all_and_leaves_the_models(plain, monkeypatch, tmp_path):
    unet = copy.deepcopy(plain.unet)
    before = snapshot(unet)
    (tmp_path / "group").mkdir()

    def work(rank):
        if rank == 1:
            interrupt(monkeypatch, distillation._Trainer, "_descend", 2)
        try:
            calibrate(unet, plain.calibration_set, plain.config, Distillation(**SMALL, folder=tmp_path))
        finally:
            assert_unchanged(unet, before)

    first, second = on_ranks(work, tmp_path / "group")

    assert isinstance(first, ranks.RankFailed)
    assert "rank 1 failed: KeyboardInterrupt" in str(first)
    assert isinstance(second, KeyboardInterrupt)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2  # finished blocks
    assert not list((tmp_path / "activations").iterdir())


def test_a_rank_that_dies_ends_the_others(plain, monkeypatch, tmp_path):
    def work(rank):
        if rank == 1:
            torch.save(None, tmp_path / "1.pt")
            monkeypatch.setattr(distillation._Trainer, "_descend", lambda *_: os._exit(1))
        plain.distil()

    first, _ = on_ranks(work, tmp_path)

    assert isinstance(first, ranks.RankFailed)
    assert "Another rank ended" in str(first)


def test_ranks_with_other_arguments_are_refused_by_name(plain, tmp_path):
    other_unet = copy.deepcopy(plain.unet)
    other_unet.conv_in.bias.data += 1
    other_calls = replace(plain.calibration_set, calls=plain.calibration_set.calls[:2])

    def errors(rank):
        texts = []
        for unet, calls, settings in (
            (other_unet if rank else plain.unet, plain.calibration_set, None),
            (plain.unet, other_calls if rank else plain.calibration_set, Distillation(seed=rank)),
        ):
            with pytest.raises(ValueError, match="All ranks calibrate") as caught:
                calibrate(copy.deepcopy(unet), calls, plain.config, settings)
            texts.append(str(caught.value).partition(".")[0])
        return texts

    first, second = on_ranks(errors, tmp_path)

    assert first == second == [
        "Rank 1 has another model than rank 0",
        "Rank 1 has another calibration_set and another distillation than rank 0",
    ]
