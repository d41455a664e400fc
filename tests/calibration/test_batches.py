"""Mixed batches: how often each timestep is drawn, what share it then has, and that they stay what they were."""

from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import pytest
import tiny_unets
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from dq_runtime import CalibrationSet
from dq_runtime.calibration.batches import MixedBatches
from dq_runtime.calibration.collect import RecordedCall, record
from dq_runtime.calibration.importance import timestep_importance


def numbered_calls(timesteps, batch=3, shape=(2, 4, 4), first=0, **constants):
    """Calls in which everything that belongs to a sample is filled with that sample's number."""
    calls = []
    for i, timestep in enumerate(timesteps):
        number = torch.arange(batch, dtype=torch.float32) + first + i * batch
        calls.append(
            RecordedCall(
                sample=number.view(-1, 1, 1, 1).expand(batch, *shape).clone(),
                timestep=torch.as_tensor(timestep, dtype=torch.float32).reshape(-1),
                arguments={
                    "encoder_hidden_states": number.view(-1, 1, 1).expand(batch, 5, 6).clone(),
                    "class_labels": number.long(),
                    "added_cond_kwargs": {"text_embeds": number.view(-1, 1).expand(batch, 7).clone(), "nothing": None},
                    **constants,
                },
            )
        )
    return calls


def numbers(batch):
    return batch.sample[:, 0, 0, 0].long().tolist()


def drawn(batches, part):
    """The numbers of the samples of some batches, in order."""
    return [number for i in part for number in numbers(batches[i])]


def drawn_timesteps(batches, part):
    return Counter(timestep for i in part for timestep in batches[i].timestep.tolist())


def timestep_of_each(calls):
    found = {}
    for call in calls:
        for row, number in enumerate(numbers(call)):
            found[number] = call.timestep.expand(call.sample.shape[0])[row].item()
    return found


def test_fewer_at_once_are_the_same_samples():
    calls = CalibrationSet(numbered_calls([10.0, 500.0], batch=40))
    whole, apart = MixedBatches(calls, 32, 8, seed=3), MixedBatches(calls, 32, 8, seed=3, at_once=3)

    assert {len(numbers(batch)) for batch in apart} <= {1, 2, 3}
    for part in ("training", "validation"):
        assert drawn(whole, getattr(whole, part)) == drawn(apart, getattr(apart, part))


def scheduler_with_roots(roots):
    """A scheduler under which the importances of these timesteps are the squares of ``roots``."""
    alphas, level = torch.full((1000,), 0.5, dtype=torch.float64), 0.0
    for timestep, root in sorted(roots.items()):
        level += root * (1 + level**2) ** 0.5
        alphas[timestep] = 1 / (1 + level**2)
    return SimpleNamespace(alphas_cumprod=alphas, config={"prediction_type": "epsilon"})


MIXED = [900, 900, 900, 900, [500, 10, 500], 10, 500]  # 12, 5 and 4 samples of 900, 500 and 10
MANY = [900, 10, 500] * 16  # 48 samples of each
ROOTS = {10: 1, 500: 2, 900: 5}
ALIKE = scheduler_with_roots({10: 1, 500: 1, 900: 1})


@pytest.mark.parametrize("timesteps", [MIXED, MANY], ids=["few samples", "many samples"])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_timesteps_are_drawn_in_proportion_to_the_root_of_their_importance(timesteps, batch_size):
    calibration_set = CalibrationSet(numbered_calls(timesteps), scheduler_with_roots(ROOTS))

    batches = MixedBatches(calibration_set, 320, batch_size, seed=0)
    assert drawn_timesteps(batches, batches.training) == {10: 40, 500: 80, 900: 200}
    if timesteps is MANY and batch_size > 1:  # samples to judge by were held out
        assert drawn_timesteps(batches, batches.validation) == {10: 5, 500: 10, 900: 25}


def test_where_no_scheduler_is_known_diffusers_default_schedule_decides():
    unknown = MixedBatches(CalibrationSet(numbered_calls(MANY)), 100, 8, seed=0)
    default = MixedBatches(CalibrationSet(numbered_calls(MANY), DDPMScheduler()), 100, 8, seed=0)

    assert drawn(unknown, range(len(unknown))) == drawn(default, range(len(default)))
    counts = drawn_timesteps(unknown, unknown.training)
    assert counts[10] < counts[500] < counts[900]


@pytest.mark.parametrize(("samples", "least"), [(1, 1), (2, 1), (5, 1), (6, 2), (12, 4), (15, 4), (96, 4)])
def test_the_least_important_timesteps_are_drawn_a_few_times(samples, least):
    roots = {10: 1e-3, 500: 1, 900: 1e-3}
    batches = MixedBatches(CalibrationSet(numbered_calls(MANY), scheduler_with_roots(roots)), samples, 4, seed=0)

    assert drawn_timesteps(batches, batches.training) == {10: least, 500: samples, 900: least}
    validation = drawn_timesteps(batches, batches.validation)
    assert validation[500] == -(-samples // 8)
    assert validation[10] == validation[900] == (4 if samples == 96 else 1)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_importance_and_share_are_those_of_each_samples_timestep(batch_size):
    batches = MixedBatches(CalibrationSet(numbered_calls(MIXED), scheduler_with_roots(ROOTS)), 80, batch_size, seed=0)

    for i, batch in enumerate(batches):
        importance, share = batches.importance(i), batches.share(i)
        assert importance.dtype == share.dtype == torch.float32
        timesteps = batch.timestep.tolist()
        assert importance.tolist() == pytest.approx([ROOTS[timestep] ** 2 for timestep in timesteps], rel=1e-5)
        assert share.tolist() == pytest.approx([ROOTS[timestep] / 8 for timestep in timesteps], rel=1e-5)


@pytest.mark.parametrize("samples", [5, 50, 2000])
def test_the_mean_of_errors_times_importance_over_share_is_what_they_add_to_the_image(samples):
    scheduler = DDIMScheduler(prediction_type="v_prediction")
    timesteps = list(range(0, 1000, 50))
    batches = MixedBatches(CalibrationSet(numbered_calls(timesteps), scheduler), samples, 100, seed=0)

    importance = torch.tensor(timestep_importance(scheduler, timesteps))
    for late in (0, 1, 5, 19):
        error = torch.where(torch.arange(20) <= late, 1.0, 0.1)  # of a timestep
        products = [
            batches.importance(i) / batches.share(i) * error[batches[i].timestep.long() // 50] for i in batches.training
        ]
        assert torch.cat(products).mean().item() == pytest.approx((importance * error).sum().item(), rel=1e-5)
    assert len(set(drawn_timesteps(batches, batches.training).values())) > 1 or samples == 5


@pytest.mark.parametrize(
    ("samples", "in_all", "fewest"), [(9, 4, 3), (15, 4, 4), (30, 4, 4), (15, 32, 5), (300, 31, 31), (300, 32, 28)]
)
def test_the_fewest_different_samples_that_a_timestep_is_trained_on_are_known(samples, in_all, fewest):
    calls = numbered_calls([900, 500] * 16) + numbered_calls([10], batch=in_all, first=100)
    batches = MixedBatches(CalibrationSet(calls, ALIKE), samples, 5, seed=0)

    at = timestep_of_each(calls)
    different = Counter(at[number] for number in set(drawn(batches, batches.training)))
    assert batches.fewest == min(different.values()) == fewest


@pytest.mark.parametrize("samples", [9, 200])
@pytest.mark.parametrize("timesteps", [MIXED, MANY], ids=["few samples", "many samples"])
def test_each_sample_keeps_its_own_timestep_and_arguments(timesteps, samples):
    table = torch.arange(4.0)
    calls = numbered_calls(timesteps, table=table, return_dict=False, scale=torch.tensor(0.5))
    expected = timestep_of_each(calls)

    for batch in MixedBatches(CalibrationSet(calls), samples, 4, seed=3):
        rows = batch.sample.shape[0]
        assert batch.sample.shape == (rows, 2, 4, 4)
        assert batch.timestep.shape == (rows,)
        assert batch.timestep.dtype == torch.float32
        assert batch.arguments.keys() == calls[0].arguments.keys()
        assert batch.arguments["encoder_hidden_states"].shape == (rows, 5, 6)
        assert batch.arguments["added_cond_kwargs"]["text_embeds"].shape == (rows, 7)
        assert batch.arguments["added_cond_kwargs"]["nothing"] is None
        assert batch.arguments["class_labels"].dtype == torch.int64
        assert batch.arguments["class_labels"].tolist() == numbers(batch)
        assert torch.equal(batch.arguments["table"], table)
        assert batch.arguments["return_dict"] is False
        assert torch.equal(batch.arguments["scale"], torch.tensor(0.5))
        for row, number in enumerate(numbers(batch)):
            assert batch.timestep[row] == expected[number]
            assert bool((batch.sample[row] == number).all())
            assert bool((batch.arguments["encoder_hidden_states"][row] == number).all())
            assert bool((batch.arguments["added_cond_kwargs"]["text_embeds"][row] == number).all())


def test_one_sample_in_eight_of_each_timestep_is_judged_by_and_never_trained_on():
    calls = numbered_calls([900, 10, [500, 10, 900, 500, 10] * 2, *[500] * 3], batch=10)
    calls += numbered_calls([900, 10] * 3, batch=8, first=100)
    at = timestep_of_each(calls)

    batches = MixedBatches(CalibrationSet(calls, ALIKE), 400, 40, seed=0)  # enough to draw every sample
    training, validation = set(drawn(batches, batches.training)), set(drawn(batches, batches.validation))
    assert not training & validation
    assert training | validation == set(at)
    available, held_out = Counter(at.values()), Counter(at[number] for number in validation)
    assert available == {900: 36, 10: 38, 500: 34}
    assert held_out == {900: 4, 10: 4, 500: 4}
    assert [*batches.training, *batches.validation] == list(range(len(batches)))


@pytest.mark.parametrize(("count", "held_out"), [(7, 0), (31, 0), (32, 4), (39, 4), (40, 5)])
def test_where_a_timestep_has_too_few_samples_to_hold_some_out_validation_is_training(count, held_out):
    calls = numbered_calls([900] * 20) + numbered_calls([10], batch=count, first=100)

    batches = MixedBatches(CalibrationSet(calls, ALIKE), 400, 10, seed=0)
    validation = [number for number in set(drawn(batches, batches.validation)) if number >= 100]
    if held_out:
        assert len(validation) == held_out
        assert set(batches.training).isdisjoint(batches.validation)
    else:
        assert batches.validation == batches.training == range(len(batches))
        assert set(drawn(batches, batches.training)) == set(timestep_of_each(calls))


@pytest.mark.parametrize(
    ("samples", "batch_size", "expected"), [(160, 10, 20), (161, 10, 21), (8, 10, 1), (160, 1, 8), (160, 2, 16)]
)
def test_an_eighth_is_to_judge_by_and_at_most_eight_batches(samples, batch_size, expected):
    batches = MixedBatches(CalibrationSet(numbered_calls([900] * 100)), samples, batch_size, seed=0)

    assert len(drawn(batches, batches.training)) == samples
    assert len(drawn(batches, batches.validation)) == expected
    assert len(batches.validation) == -(-expected // batch_size)


@pytest.mark.parametrize("samples", [3, 5, 7, 10, 14, 15])
def test_samples_come_again_only_when_all_have_come(samples):
    batches = MixedBatches(CalibrationSet(numbered_calls([900], batch=5)), samples, 4, seed=0)

    times = Counter(drawn(batches, batches.training))
    assert sum(times.values()) == samples
    assert set(times.values()) <= {samples // 5, -(-samples // 5)}
    assert len(times) == min(samples, 5)


def test_samples_come_again_in_another_order():
    calibration_set = CalibrationSet(numbered_calls([900], batch=5))
    for seed in range(10):
        first = MixedBatches(calibration_set, 2, 4, seed)
        again = Counter(drawn(MixedBatches(calibration_set, 7, 4, seed), range(2)))
        if set(drawn(first, first.training)) != {number for number, times in again.items() if times == 2}:
            return
    pytest.fail("those that come first in one round do in the next")


def test_batches_mix_timesteps():
    batches = MixedBatches(CalibrationSet(numbered_calls(MANY), ALIKE), 24, 24, seed=0)
    timesteps = batches[0].timestep.tolist()

    assert len(timesteps) == 24
    assert sum(a == b for a, b in pairwise(timesteps)) < 16  # at random 7 of 23, sorted 21
    halves = MixedBatches(
        CalibrationSet(numbered_calls([1, 2] * 40), scheduler_with_roots({1: 1, 2: 1})), 80, 40, seed=0
    )
    assert len(halves.training) == 2
    assert all(5 < (halves[i].timestep == 1).sum() < 35 for i in halves.training)


def test_the_seed_alone_decides():
    calibration_set = CalibrationSet(numbered_calls(MANY), scheduler_with_roots(ROOTS))

    def all_drawn(seed):
        batches = MixedBatches(calibration_set, 40, 4, seed)
        return drawn(batches, range(len(batches))), drawn(batches, batches.validation)

    first = all_drawn(0)
    torch.manual_seed(5)
    torch.rand(3)
    assert all_drawn(0) == first
    for part in range(2):  # other samples, not the same in another order
        assert len({frozenset(all_drawn(seed)[part]) for seed in range(5)}) > 1


def test_samples_of_different_shapes_or_constants_share_no_batch():
    kinds = [
        {},
        {"shape": (2, 4, 6)},
        {"cross_attention_kwargs": {"scale": 0.5}},
        {"cross_attention_kwargs": {"scale": 1.0}},
        {"table": torch.arange(2.0)},
        {"table": torch.arange(2.0) + 1},
        {"mask": torch.ones(3, 5)},
        {"mask": torch.ones(3, 6)},
        {"mask": torch.ones(3, 6, dtype=torch.float16)},
        {"other": torch.ones(3, 5)},
        {"table": torch.zeros(5000)},
        {"table": torch.zeros(5000).index_fill(0, torch.tensor(2500), 1)},
    ]
    calls = [call for i, kind in enumerate(kinds) for call in numbered_calls([1, 2], first=100 * i, **kind)]

    batches = MixedBatches(CalibrationSet(calls), 1000, 2000, seed=0)
    kind_of = [{number // 100 for number in numbers(batch)} for batch in batches]
    assert all(len(found) == 1 for found in kind_of)
    by_kind = {kind_of[i].pop(): batches[i] for i in batches.training}
    assert sorted(by_kind) == list(range(len(kinds)))
    assert by_kind[1].sample.shape[1:] == (2, 4, 6)
    assert "cross_attention_kwargs" not in by_kind[0].arguments
    assert by_kind[2].arguments["cross_attention_kwargs"] == {"scale": 0.5}
    assert by_kind[3].arguments["cross_attention_kwargs"] == {"scale": 1.0}
    assert by_kind[5].arguments["table"].tolist() == [1, 2]  # has no row for each sample
    assert by_kind[7].arguments["mask"].shape == (len(by_kind[7].sample), 6)
    assert by_kind[8].arguments["mask"].dtype == torch.float16


def test_calls_of_different_batch_sizes_share_a_batch():
    calls = numbered_calls([1, 2], batch=1, table=torch.arange(2.0))
    calls += numbered_calls([1, 2], batch=4, first=100, table=torch.arange(2.0))
    scheduler = scheduler_with_roots({1: 1, 2: 1})
    (batch,) = MixedBatches(CalibrationSet(calls, scheduler), 10, 100, seed=0)
    assert sorted(numbers(batch)) == [0, 1, *range(100, 108)]


@pytest.mark.parametrize("batch_size", [1, 4, 7, 64])
def test_all_but_the_last_batch_of_a_shape_are_full(batch_size):
    calls = numbered_calls([1] * 8) + numbered_calls([1] * 8, shape=(2, 4, 6), first=100)
    batches = MixedBatches(CalibrationSet(calls), 60, batch_size, seed=0)

    for part in (batches.training, batches.validation):
        widths = [batches[i].sample.shape[-1] for i in part]
        for width in (4, 6):
            sizes = [len(batches[i].sample) for i in part if batches[i].sample.shape[-1] == width]
            assert all(size == batch_size for size in sizes[:-1])
            assert all(1 <= size <= batch_size for size in sizes)
        assert set(widths) == {4, 6}


def test_a_batch_is_the_same_each_time_whatever_became_of_it_before():
    calls = numbered_calls(MANY)
    batches = MixedBatches(CalibrationSet(calls, ALIKE), 40, 8, seed=0)
    assert len(batches) == len(list(batches)) == 6  # five and one to judge by
    assert [len(batch.sample) for batch in batches][:5] == [8, 8, 8, 8, 7]  # 13 of each timestep

    first = batches[1]
    expected, expected_timestep = numbers(first), first.timestep.tolist()
    first.sample.zero_()
    first.timestep.zero_()
    first.arguments["class_labels"].zero_()
    assert numbers(batches[1]) == batches[1].arguments["class_labels"].tolist() == expected
    assert batches[1].timestep.tolist() == expected_timestep
    assert numbers(batches[-1]) == numbers(batches[5])
    with pytest.raises(IndexError):
        batches[6]


def test_an_empty_calibration_set_is_refused():
    with pytest.raises(ValueError, match="empty"):
        MixedBatches(CalibrationSet(), 10, 4, seed=0)


@torch.no_grad()
@pytest.mark.parametrize("conditional", [False, True], ids=["UNet2DModel", "UNet2DConditionModel"])
def test_a_mixed_batch_gives_what_the_recorded_calls_gave(conditional):
    unet = tiny_unets.unet2d_condition() if conditional else tiny_unets.unet2d(num_class_embeds=4)
    expected = {}
    with record(unet, scheduler_with_roots({10: 1, 20: 1, 500: 1, 900: 1})) as calibration_set:
        for timestep in ([10.0], [500.0, 20.0], [900.0]):
            sample = torch.randn(2, unet.config.in_channels, 8, 8)
            arguments = {"encoder_hidden_states": torch.randn(2, 5, 32)}
            if not conditional:
                arguments = {"class_labels": torch.randint(0, 4, (2,))}
            outputs = unet(sample, torch.tensor(timestep), **arguments).sample
            expected |= {image.numpy().tobytes(): output for image, output in zip(sample, outputs, strict=True)}

    batches = MixedBatches(calibration_set, 8, 5, seed=1)
    assert [len(batch.sample) for batch in batches] == [5, 3]
    for batch in batches:
        for image, output in zip(batch.sample, batch.run(unet).sample, strict=True):
            # Other batches have other orders of fp32 sums; another sample's timestep or condition moves far more.
            torch.testing.assert_close(output, expected[image.numpy().tobytes()], rtol=1e-4, atol=1e-5)


def with_guidance(timesteps):
    """Calls whose second half repeats the latents of the first, as classifier-free guidance makes them."""
    calls = numbered_calls(timesteps, batch=4)
    for call in calls:
        call.sample[2:] = call.sample[:2]
    return calls


def test_a_latent_that_is_judged_by_is_not_trained_on_with_another_prompt():
    batches = MixedBatches(CalibrationSet(with_guidance(MANY), ALIKE), 10_000, 8, seed=0)

    training, validation = (set(drawn(batches, part)) for part in (batches.training, batches.validation))
    assert validation
    assert not training & validation
    assert len(training | validation) == 2 * len(MANY)  # every latent is used


def test_where_all_latents_are_one_nothing_is_held_out():
    calls = numbered_calls(MANY)
    for call in calls:
        call.sample.zero_()

    batches = MixedBatches(CalibrationSet(calls, ALIKE), 90, 8, seed=0)

    assert batches.validation == batches.training
