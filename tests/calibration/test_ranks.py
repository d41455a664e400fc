"""Calibration on several ranks: the result of one process within rounding, and failures that end all ranks.

Within rounding: a batch's parts are multiplied in other GEMMs and their sums are added in another order, which changes
last bits. A changed bit can move a weight that lies next to the midpoint of two values, and error feedback passes that
on to the weights behind it. In the two blocks of these tests that stays below one weight in a thousand.
"""

import copy
import os
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DModel
from distilling import (
    FEW_BLOCKS,
    SMALL,
    Subject,
    assert_same_state,
    assert_unchanged,
    distilled,
    interrupt,
    output_error,
    quantized_layers,
    recorded,
    snapshot,
    unet2d,
)
from several_ranks import on_ranks

from dq_runtime import DilateQuantConfig, Distillation, calibrate
from dq_runtime.calibration import ranks, training
from dq_runtime.calibration.batches import MixedBatches

KEPT = [*FEW_BLOCKS["modules_to_not_convert"], "time_embedding", "resnets"]  # all but a downsampler and an attention


def nibbles(unet):
    packed = torch.cat([layer.packed_weight.flatten() for layer in quantized_layers(unet).values()])
    return torch.stack([packed & 15, packed >> 4])


def assert_same_within_rounding(actual, expected, subject):
    differing = (nibbles(actual) != nibbles(expected)).float().mean()
    assert differing < 1e-3
    between = output_error(actual, expected, subject.calibration_set)
    assert between < 0.03 * output_error(expected, subject.unet, subject.calibration_set)


@pytest.fixture(scope="module")
def subject():
    return Subject(unet2d(), DilateQuantConfig(dilation="weight", modules_to_not_convert=KEPT))


@pytest.fixture(scope="module")
def two(subject, tmp_path_factory):
    """What each of two ranks makes: UNets by the way of calibration, and the folder of finished blocks."""
    folder, stock = tmp_path_factory.mktemp("blocks"), tmp_path_factory.mktemp("stock")
    subject.unet.save_pretrained(stock)

    def work(rank):
        return {
            **without_training(subject, stock),
            "distilled": (trained := measured(subject, folder=folder))[0],
            "batches of 3 and 1": few_samples(subject, (10, 500, 900, 901)),
            "one sample": few_samples(subject, (500,)),
        }, trained[1]

    results = on_ranks(work, tmp_path_factory.mktemp("group"))
    return [unets for unets, _ in results], folder, without_training(subject, stock), [errors for _, errors in results]


def measured(subject, **settings):
    """A distilled and polished UNet, and the errors that the training was guided by, in order."""
    errors = []

    def keeping(function):
        def kept(*arguments):
            errors.append(torch.as_tensor(function(*arguments)))
            return errors[-1]

        return kept

    with pytest.MonkeyPatch.context() as patch:
        for name in ("_error_of_timesteps", "_validate"):
            patch.setattr(training.Trainer, name, keeping(getattr(training.Trainer, name)))
        return subject.distil(polish_iterations=1, **settings), errors


def without_training(subject, stock):
    """UNets that are rounded to nearest: with the search for a dilation, and on loading."""
    unet, config = copy.deepcopy(subject.unet), replace(subject.config, dilation="joint")
    packed = UNet2DModel.from_pretrained(stock, quantization_config=subject.config)
    return {
        "rounded": calibrate(unet, subject.calibration_set, config, distillation=None),
        "packed on loading": calibrate(packed, subject.calibration_set),
    }


def few_samples(subject, timesteps):
    """One sample of each timestep, in batches of three, the last of which is smaller."""
    calls = recorded(subject.unet, rows=1, timesteps=timesteps)
    return distilled(subject.unet, calls, subject.config, batch_size=3)


def test_all_ranks_have_the_same_bits(two):
    (first, second), *_ = two

    for way, unet in first.items():
        assert_same_state(second[way], unet)


def test_without_training_two_ranks_have_the_bits_of_one_process(two):
    (first, _), _, expected, _ = two

    for way, unet in expected.items():
        assert_same_state(first[way], unet)


@pytest.mark.supports(
    "Training and gradients",
    "`calibrate` under `torchrun` and `accelerate launch`",
    "ranks share the samples; the result is that of one process within rounding",
    "tested with Gloo on CPUs; NCCL was not run",
)
def test_distillation_on_two_ranks_is_that_of_one_process_within_rounding(subject, two):
    expected, errors = measured(subject)
    (first, _), *_, errors_of_ranks = two

    assert_same_within_rounding(first["distilled"], expected, subject)
    for of_rank in errors_of_ranks:
        assert len(of_rank) == len(errors) == 2 * 4 + 2  # two blocks with three validations, and the polish
        for actual, single in zip(of_rank, errors, strict=True):
            torch.testing.assert_close(actual, single, rtol=1e-3, atol=0)


def test_a_batch_may_have_fewer_samples_than_there_are_ranks(subject, two):
    for way, timesteps in (("batches of 3 and 1", (10, 500, 900, 901)), ("one sample", (500,))):
        assert_same_within_rounding(two[0][0][way], few_samples(subject, timesteps), subject)


def test_one_process_goes_on_with_the_blocks_of_two_ranks(subject, two, monkeypatch):
    (first, _), folder, *_ = two
    calls = interrupt(monkeypatch, training.Trainer, "distil", -1)

    resumed = subject.distil(folder=folder, polish_iterations=1)

    assert not calls
    assert_same_within_rounding(resumed, first["distilled"], subject)
    assert {file.name for file in folder.iterdir() if not file.name.endswith(".safetensors")} == {
        "activations", "calibration.json"
    }  # fmt: skip
    assert not list((folder / "activations").iterdir())


def test_two_ranks_go_on_with_the_blocks_of_one_process_and_share_the_calls(subject, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        interrupt(patch, training.Trainer, "distil", 1)
        with pytest.raises(KeyboardInterrupt):
            subject.distil(folder=tmp_path)
    calls = interrupt(monkeypatch, training.Trainer, "distil", -1)
    replayed = interrupt(monkeypatch, training, "inputs_of", -1)
    (tmp_path / "group").mkdir()

    def work(rank):
        result = subject.distil(folder=tmp_path)
        return result, len(calls), sum(call.sample.shape[0] for _, _, call, _ in replayed)

    (first, *counts), (second, *others) = on_ranks(work, tmp_path / "group")

    assert_same_state(first, second)
    assert_same_within_rounding(first, subject.distilled, subject)
    samples = sum(len(batch.sample) for batch in MixedBatches(subject.calibration_set, 24, 6, 0))
    assert [counts, others] == [[1, samples]] * 2
    assert samples % 2 == 0


def test_parts_are_joined_in_order_and_sums_and_values_are_those_of_all(tmp_path):
    def work(rank):
        columns_first = torch.arange(6.0).view(3, 2).T + rank
        sums = [columns_first, torch.ones(2, 3) * rank]
        ranks.add(sums)
        joined = [ranks.joined([i**2 for i in ranks.part(range(count))]) for count in (0, 2, 7)]
        return joined, ranks.exchange(rank), ranks.from_first((rank, torch.tensor(rank))), sums

    for joined, exchanged, first, sums in on_ranks(work, tmp_path, count=3):
        assert joined == [[], [0, 1], [0, 1, 4, 9, 16, 25, 36]]
        assert exchanged == [0, 1, 2]
        assert first == (0, torch.tensor(0))
        assert torch.equal(sums[0], 3 * torch.arange(6.0).view(3, 2).T + 3)
        assert torch.equal(sums[1], torch.full((2, 3), 3.0))


def test_an_error_of_one_rank_ends_all_and_leaves_the_models(subject, monkeypatch, tmp_path):
    unet = copy.deepcopy(subject.unet)
    before = snapshot(unet)
    (tmp_path / "group").mkdir()

    def work(rank):
        if rank == 1:
            interrupt(monkeypatch, training.Trainer, "_descend", 1)
        try:
            calibrate(unet, subject.calibration_set, subject.config, Distillation(**SMALL, folder=tmp_path))
        finally:
            assert_unchanged(unet, before)

    first, second = on_ranks(work, tmp_path / "group")

    assert isinstance(first, ranks.RankFailed)
    assert "rank 1 failed: KeyboardInterrupt" in str(first)
    assert isinstance(second, KeyboardInterrupt)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1  # finished block
    assert not list((tmp_path / "activations").iterdir())


def test_a_rank_that_dies_ends_the_others(subject, monkeypatch, tmp_path):
    def work(rank):
        if rank == 1:
            torch.save(None, tmp_path / "1.pt")
            monkeypatch.setattr(training.Trainer, "_descend", lambda *_: os._exit(1))
        subject.distil()

    first, _ = on_ranks(work, tmp_path)

    assert isinstance(first, ranks.RankFailed)
    assert "Another rank ended" in str(first)


def test_ranks_with_other_arguments_are_refused_by_name(subject, tmp_path):
    other_unet = copy.deepcopy(subject.unet)
    other_unet.conv_in.bias.data += 1
    other_calls = replace(subject.calibration_set, calls=subject.calibration_set.calls[:2])

    def errors(rank):
        texts = []
        for unet, calls, settings in (
            (other_unet if rank else subject.unet, subject.calibration_set, None),
            (subject.unet, other_calls if rank else subject.calibration_set, Distillation(seed=rank)),
        ):
            with pytest.raises(ValueError, match="All ranks calibrate") as caught:
                calibrate(copy.deepcopy(unet), calls, subject.config, settings)
            texts.append(str(caught.value).partition(".")[0])
        return texts

    first, second = on_ranks(errors, tmp_path)

    assert (
        first
        == second
        == [
            "Rank 1 has another model than rank 0",
            "Rank 1 has another calibration_set and another distillation than rank 0",
        ]
    )
