"""The estimates of time: of calls by their overhead and their samples, and corrected by finished blocks."""

from dataclasses import replace

import pytest
import torch

from dq_runtime import Distillation
from dq_runtime.calibration import distillation
from dq_runtime.calibration.collect import RecordedCall
from dq_runtime.cli import estimate
from dq_runtime.cli.drawing import repeated

PROBE = estimate.Probe(
    device=torch.device("cpu"), overhead=1.0, seconds=0.5, blocks={"a": 1.0, "b": 3.0}, search=0.25, weights=1000,
    parameters=250, activations=40, targets=70, stored=30, block_parameters=100, block_activations=20,
)  # fmt: skip


def test_recording_takes_its_calls_and_the_search_runs_them_again():
    expected = estimate.estimate(PROBE, 10, 2, 64, 0, Distillation(iterations=0))

    assert expected.collecting == 10 * (1.0 + 2 * 0.5)
    assert expected.searching == expected.collecting + estimate.CANDIDATES * 0.25
    passes = estimate.PASSES * (1.0 + 20 * 0.5)
    assert expected.blocks == pytest.approx(passes + estimate.FEEDBACK * 0.25)


def test_memory_holds_the_model_and_one_block_in_training_or_all_packed_weights():
    small = estimate.estimate(PROBE, 10, 2, 64, 0, Distillation(batch_size=4))
    beside = estimate.estimate(PROBE, 10, 2, 64, 10**9, Distillation(batch_size=4))

    training = estimate.BLOCK_BYTES * 100 + distillation.KEPT_BYTES * 4 * 20
    assert small.memory == pytest.approx(estimate.PROCESS_BYTES + 1000 + training)
    many_weights = replace(PROBE, parameters=25000)
    packed = estimate.estimate(many_weights, 10, 2, 64, 0, Distillation(batch_size=4))
    assert packed.memory == pytest.approx(estimate.PROCESS_BYTES + 1000 + 25000 / 2)
    assert beside.memory == pytest.approx(estimate.PROCESS_BYTES + 1000 + 10**9)


@pytest.mark.parametrize(("device", "at_once"), [("cpu", 2), ("meta", 32)])
def test_activations_are_bounded_on_a_cpu(monkeypatch, device, at_once):
    monkeypatch.setattr(distillation, "ACTIVATION_BYTES", 2 * 20 * distillation.KEPT_BYTES)
    measured = replace(PROBE, device=torch.device(device))
    few, many = (estimate.estimate(measured, 32, 1, 64, 0, Distillation(batch_size=size)) for size in (1, 32))

    assert many.memory - few.memory == pytest.approx((at_once - 1) * 20 * distillation.KEPT_BYTES)


def test_training_takes_time_in_proportion_to_its_iterations_and_polish_is_apart():
    few, many, polished = (
        estimate.estimate(
            PROBE, 100, 2, 64, 0, Distillation(samples=64, iterations=iterations, polish_iterations=polish)
        )
        for iterations, polish in ((100, 0), (200, 0), (100, 50))
    )

    forward = 1.0 + 32 * 0.5
    assert many.blocks - few.blocks == pytest.approx(100 * estimate.TRAINING_STEP * forward)
    assert (few.polish, polished.blocks) == (0, few.blocks)
    assert polished.polish > 50 * forward
    assert polished.memory > few.memory


def test_the_disk_holds_recorded_samples_targets_and_what_later_blocks_read():
    expected = estimate.estimate(PROBE, 100, 2, 64, 0, Distillation(samples=64))

    weights = estimate.FILE_BYTES * (250 + 3 * 100) + 250 / 2 + 100 * 4
    assert expected.disk == 200 * 64 + (64 + 8) * (70 + 30) + weights
    returned, sources = {"a": 1, "b": 10, "c": 100, "d": 5}, {"a": set(), "b": {"a"}, "c": {"b"}, "d": {"a", "c"}}
    assert estimate._stored(returned, sources) == 1 + 100 + (1 + 100)  # at d; a's output waits for it


def test_time_of_a_call_is_its_overhead_and_that_of_its_samples(monkeypatch):
    class Model:
        device = torch.device("cpu")

    calls = []
    monkeypatch.setattr(RecordedCall, "run", lambda self, model: calls.append(self.sample.shape[0]))
    monkeypatch.setattr(estimate, "_seconds", lambda run, device: run() or 0.3 + 0.1 * calls[-1])
    call = RecordedCall(torch.zeros(2, 4, 8, 8), torch.zeros(1), {})

    overhead, seconds = estimate._time_of_calls(Model(), call)

    assert set(calls) == {2, 8}
    assert overhead == pytest.approx(0.3)
    assert seconds == pytest.approx(0.1)


def test_finished_blocks_correct_the_rest(monkeypatch, capsys):
    now = iter([0.0, 0.0, 10.0])
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: next(now))
    expected = estimate.Estimate(collecting=0.0, searching=0.0, blocks=20.0, polish=5.0, memory=0.0, disk=0.0)
    remaining = estimate.Remaining(PROBE, expected, frozenset())

    remaining("", 0, 2)
    remaining("a", 1, 2)  # a quarter of the blocks' time, in 10 s: twice what was expected

    assert "block 1 of 2: a; about 40 s left" in capsys.readouterr().err  # 30 s of b, and twice 5 s


def test_repeated_calls_repeat_what_has_a_row_for_each_sample():
    rows, ids = torch.arange(2.0)[:, None], torch.zeros(2, 3)
    call = RecordedCall(rows, torch.tensor([7.0]), {"added": {"text": rows}, "ids": ids, "scale": 2.0}, ("ids",))

    larger = repeated(call, 2)

    assert larger.sample.flatten().tolist() == [0, 0, 1, 1]
    assert torch.equal(larger.arguments["added"]["text"], larger.sample)
    assert larger.arguments["ids"] is ids
    assert (larger.timestep.tolist(), larger.arguments["scale"]) == ([7.0], 2.0)
