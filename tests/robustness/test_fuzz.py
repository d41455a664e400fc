"""Random damage and random arguments: some of the cases that ``make fuzz`` runs for minutes."""

import logging

import pytest
from damaged_checkpoints import damaged_load, load, saved_checkpoints
from damaged_files import calibration_file, damaged_calibration_file, random_argument

FINE = {"refused", "refused by diffusers", "the same image", "warned", "no checkpoint of ours", "the same", "accepted"}


@pytest.fixture(autouse=True)
def _no_log():
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


def test_no_damage_of_a_checkpoint_goes_unnoticed(tmp_path):
    image, checkpoints = saved_checkpoints(tmp_path)
    for folder in checkpoints:
        assert load(folder, image)[0] == "the same image"  # or nothing below would mean anything
        assert load(folder, image + 1)[0] == "SILENT"
    found = [damaged_load(checkpoints[seed % 2], tmp_path / "damaged", seed, image) for seed in range(16)]

    assert [case for case in found if case[1] not in FINE] == []
    assert sum(case[1] == "refused" for case in found) >= 5


def test_no_damage_of_a_calibration_set_goes_unnoticed(tmp_path):
    calibration_set = calibration_file(tmp_path / "calls")
    found = [
        damaged_calibration_file(tmp_path / "calls", tmp_path / "damaged", seed, calibration_set) for seed in range(100)
    ]

    assert [case for case in found if case[1] not in FINE] == []


def test_random_arguments_are_accepted_or_refused_by_name():
    found = [random_argument(seed) for seed in range(400)]

    assert [case for case in found if case[1] not in FINE] == []
