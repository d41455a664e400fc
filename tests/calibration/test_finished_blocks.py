"""Interrupted distillation: nothing is lost, nothing left lying about, and nothing foreign taken for one's own."""

import copy
import logging
import os
import shutil
import signal
import tempfile

import pytest
import torch
from diffusers import DDPMScheduler
from distilling import (
    FEW_BLOCKS,
    SMALL,
    assert_same_state,
    assert_unchanged,
    distilled,
    interrupt,
    messages,
    recorded,
    snapshot,
)
from killed_saves import killed_after

from dq_runtime import CalibrationSet, DilateQuantConfig, Distillation, calibrate
from dq_runtime.calibration import error_feedback, finished_blocks, training
from dq_runtime.calibration.replay import TensorStore


def test_an_interruption_leaves_the_unet_and_no_files(plain, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    unet = copy.deepcopy(plain.unet).train()
    unet.conv_in.requires_grad_(False)
    before = snapshot(unet)
    for owner, method, at in (
        (training.Trainer, "distil", 3),
        (torch.optim.Adam, "step", 5),
        (error_feedback, "round_with_feedback", 4),
        (training, "outputs_of", 2),
        (training.Trainer, "polish", 0),
    ):
        with monkeypatch.context() as patch:
            calls = interrupt(patch, owner, method, at)
            with pytest.raises(KeyboardInterrupt):
                calibrate(unet, plain.calibration_set, plain.config, Distillation(**SMALL | {"polish_iterations": 1}))
            assert len(calls) == at + 1
        assert_unchanged(unet, before)
        assert not list(tmp_path.iterdir()), method


def test_an_interrupted_calibration_goes_on_behind_the_last_finished_block(plain, monkeypatch, tmp_path, log):
    with monkeypatch.context() as patch:
        calls = interrupt(patch, training.Trainer, "distil", -1)
        expected = plain.distil(polish_iterations=1)
        blocks = [args[1] for args in calls]
    assert len(blocks) == 6

    for expected_calls in (blocks[:3], blocks[2:5]):  # interrupted twice
        with monkeypatch.context() as patch:
            calls = interrupt(patch, training.Trainer, "distil", 2)
            with pytest.raises(KeyboardInterrupt):
                plain.distil(polish_iterations=1, folder=tmp_path)
            assert [args[1] for args in calls] == expected_calls

    with monkeypatch.context() as patch:
        calls = interrupt(patch, training.Trainer, "distil", -1)
        result = plain.distil(polish_iterations=1, folder=str(tmp_path))
        assert [args[1] for args in calls] == blocks[4:]
    assert_same_state(result, expected)
    assert f"{blocks[0]}: taken from {tmp_path}" in messages(log, logging.INFO)

    with monkeypatch.context() as patch:
        calls = interrupt(patch, training.Trainer, "distil", -1)
        assert_same_state(plain.distil(folder=tmp_path), plain.distilled)
        assert not calls  # and how it is polished is no matter


def test_another_process_goes_on_with_the_calibration_set_that_was_saved(plain, monkeypatch, tmp_path):
    calibration_set, folder = recorded(plain.unet, scheduler=DDPMScheduler()), tmp_path / "blocks"
    calibration_set.save(tmp_path / "calls.pt")
    expected = distilled(plain.unet, calibration_set, plain.config)
    with monkeypatch.context() as patch:
        interrupt(patch, training.Trainer, "distil", 2)
        with pytest.raises(KeyboardInterrupt):
            distilled(plain.unet, calibration_set, plain.config, folder=folder)

    with monkeypatch.context() as patch:
        calls = interrupt(patch, training.Trainer, "distil", -1)
        loaded = CalibrationSet.load(tmp_path / "calls.pt")
        result = distilled(plain.unet, loaded, plain.config, folder=folder)
        assert len(calls) == 4
    assert_same_state(result, expected)


@pytest.mark.parametrize(
    ("owner", "method", "at"),
    [
        (torch.optim.Adam, "step", 5),
        (training, "inputs_of", 6),
        (training.Trainer, "_validate", 6),
        (finished_blocks, "write_tree", 3),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_interruption_inside_a_block_costs_that_block_alone(plain, monkeypatch, tmp_path, owner, method, at):
    with monkeypatch.context() as patch:
        interrupt(patch, owner, method, at)
        with pytest.raises(KeyboardInterrupt):
            plain.distil(folder=tmp_path)
    finished = {file.stem for file in tmp_path.glob("*.safetensors")}
    assert finished
    assert not list((tmp_path / "activations").iterdir())

    with monkeypatch.context() as patch:
        calls = interrupt(patch, training.Trainer, "distil", -1)
        result = plain.distil(folder=tmp_path)
        assert finished.isdisjoint(args[1] for args in calls)
    assert_same_state(result, plain.distilled)


@pytest.fixture(scope="module")
def finished_folder(plain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    plain.distil(folder=folder)
    return folder


@pytest.fixture
def folder(finished_folder, tmp_path):
    """A copy of what a finished calibration wrote."""
    for file in finished_folder.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "of another block", "one bit"])
def test_a_block_that_cannot_be_read_is_done_again(plain, folder, monkeypatch, log, damage):
    name = "down_blocks.1.attentions.0"
    file = folder / f"{name}.safetensors"
    content = file.read_bytes()
    file.write_bytes(
        {
            "truncated": content[: len(content) // 2],
            "garbage": b"\xff" * 100,
            "empty": b"",
            "one bit": content[:-1] + bytes([content[-1] ^ 1]),
            "of another block": (folder / "time_embedding.linear_1.safetensors").read_bytes(),
        }[damage]
    )

    calls = interrupt(monkeypatch, training.Trainer, "distil", -1)
    result = plain.distil(folder=folder)
    assert [args[1] for args in calls] == [name]
    assert_same_state(result, plain.distilled)
    assert any(str(file) in line and f"{name} is distilled again" in line for line in messages(log, logging.WARNING))


def other_weights(unet, calibration_set):
    unet = copy.deepcopy(unet)
    with torch.no_grad():
        unet.down_blocks[1].resnets[0].conv1.weight[0, 0, 0, 0] += 1e-3
    return unet, calibration_set, DilateQuantConfig(**FEW_BLOCKS), {}


def other_data(unet, calibration_set):
    changed = copy.deepcopy(calibration_set)
    changed.calls[0].sample[0, 0, 0, 0] += 0.5
    return unet, changed, DilateQuantConfig(**FEW_BLOCKS), {}


OTHERS = {
    "weights": other_weights,
    "data": other_data,
    "bits": lambda unet, calls: (unet, calls, DilateQuantConfig(activation_bits=6, **FEW_BLOCKS), {}),
    "iterations": lambda unet, calls: (unet, calls, DilateQuantConfig(**FEW_BLOCKS), {"iterations": 1}),
    "seed": lambda unet, calls: (unet, calls, DilateQuantConfig(**FEW_BLOCKS), {"seed": 1}),
}


@pytest.mark.parametrize("other", OTHERS)
def test_the_folder_of_another_calibration_is_refused(plain, folder, other):
    unet, calibration_set, config, settings = OTHERS[other](plain.unet, plain.calibration_set)
    before = snapshot(unet)
    files = {file: file.read_bytes() for file in folder.iterdir() if file.is_file()}

    with pytest.raises(ValueError, match=rf"^{folder} holds the blocks of another calibration"):
        calibrate(unet, calibration_set, config, Distillation(**SMALL | settings | {"folder": folder}))
    assert_unchanged(unet, before)
    assert {file: file.read_bytes() for file in folder.iterdir() if file.is_file()} == files


@pytest.mark.parametrize("content", ["", "{}", "[1]", "no json", b"\xff\xfe\x00"], ids=repr)
def test_a_folder_whose_record_cannot_be_read_is_refused(plain, folder, content):
    record_file = folder / "calibration.json"
    record_file.write_bytes(content if isinstance(content, bytes) else content.encode())

    with pytest.raises(ValueError, match="another calibration"):
        plain.distil(folder=folder)


def test_files_of_others_stay(plain, tmp_path):
    foreign = tmp_path / "activations" / "my_features.safetensors"
    foreign.parent.mkdir()
    foreign.write_text("precious")

    plain.distil(folder=tmp_path)
    assert [file.name for file in foreign.parent.iterdir()] == [foreign.name]
    assert not (tmp_path / "calibration.lock").exists()


def test_only_the_owner_may_read_the_files(finished_folder):
    files = [file for file in finished_folder.rglob("*") if file.is_file()]
    assert len(files) > 3
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}


def test_a_second_calibration_in_one_folder_is_told_so(plain, tmp_path):
    before = snapshot(plain.unet)
    with finished_blocks.work_folder(tmp_path), pytest.raises(ValueError, match=f"Another process .* {tmp_path}"):
        calibrate(plain.unet, plain.calibration_set, plain.config, Distillation(**SMALL, folder=tmp_path))
    assert_unchanged(plain.unet, before)

    with finished_blocks.work_folder(tmp_path):  # the lock is free again
        pass


def test_a_full_disk_at_the_start_leaves_a_folder_that_can_be_used(plain, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        interrupt(patch, finished_blocks.json, "dumps", 1)  # of the record: the first is the fingerprint's
        with pytest.raises(KeyboardInterrupt):
            plain.distil(folder=tmp_path)
    assert not list(tmp_path.glob("*calibration*"))
    assert_same_state(plain.distil(folder=tmp_path), plain.distilled)


def test_a_calibration_that_is_killed_twice_goes_on_to_the_same_result(plain, tmp_path):
    for seconds in (0.3, 0.7):
        killed_after(lambda: plain.distil(folder=tmp_path), seconds)

    assert_same_state(plain.distil(folder=tmp_path), plain.distilled)
    assert not list((tmp_path / "activations").iterdir())


def killed(folder):
    """A process that holds a folder's lock and has stored activations, killed."""
    process = os.fork()
    if process == 0:
        with finished_blocks.work_folder(folder) as (used, prefix):
            TensorStore(used / "activations", prefix)["inputs_0"] = torch.ones(3)
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(process, 0)


def test_what_a_killed_calibration_left_is_removed_next_time(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    given = tmp_path / "given"
    for folder in (given, None):
        killed(folder)
    (given / "activations" / "other.safetensors").touch()
    assert len(list(tmp_path.rglob("*.inputs_0.safetensors"))) == 2

    with finished_blocks.work_folder(None) as (temporary, _):
        assert {path.name for path in tmp_path.iterdir()} == {"given", temporary.name}
    with finished_blocks.work_folder(given):
        assert [file.name for file in (given / "activations").iterdir()] == ["other.safetensors"]


def test_a_new_temporary_folder_that_another_process_takes_for_one_that_was_left_is_replaced(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    lock_file, taken = finished_blocks._lock_file, []

    def taken_twice(file):
        if len(taken) < 2:
            taken.append(file.parent)
            if len(taken) == 1:
                raise ValueError("Another process")  # cleans this folder
            shutil.rmtree(file.parent)  # and has removed the next one
        return lock_file(file)

    monkeypatch.setattr(finished_blocks, "_lock_file", taken_twice)

    with finished_blocks.work_folder(None) as (folder, _):
        assert folder.is_dir()
        assert folder not in taken
    assert not list(tmp_path.iterdir())
