"""The studies that README quotes: timesteps' importance, skip ranges, samplers that no calibration has seen."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs a script's command line, with some of its constants changed, and returns its report."""
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])

    def report(name, *arguments, **constants):
        script = importlib.import_module(name)
        for constant, value in constants.items():
            monkeypatch.setattr(script, constant, value)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments, "--output", str(tmp_path / "report.json")])
        script.main()
        return json.loads((tmp_path / "report.json").read_text())

    return report


def test_a_trained_unet_forgets_errors_as_the_closed_form_says(run):
    report = run("timestep_importance", IMAGES=8, STEPS=4)

    assert [row["timestep"] for row in report["rows"]] == sorted(row["timestep"] for row in report["rows"])
    assert len(report["rows"]) == 4
    # What the last step gets wrong is in the image as it is; before it, within the spread that README tells of.
    first, *others = report["rows"]
    assert first["ratio"] == pytest.approx(1, rel=0.1)
    assert all(0.1 < row["ratio"] < 10 for row in others)
    assert max(row["measured"] for row in others) > 10 * first["measured"]


def test_each_source_of_a_skip_gets_a_quantizer_of_its_own(run):
    report = run("skip_ranges", STEPS=2, CALIBRATION_SAMPLES=4)

    layers = {row["layer"] for row in report["rows"]}
    assert layers == {f"up_blocks.{block}.resnets.{i}.conv_shortcut" for block in range(3) for i in range(2)}
    gains = [row["two quantizers"] - row["none"] for row in report["rows"] if row["activation_bits"] == 4]
    assert sum(gains) / len(gains) > 0
    assert all(row["none"] > 10 for row in report["rows"] if row["activation_bits"] == 8)


def test_two_quantizers_win_where_ranges_are_far_apart(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    study = importlib.import_module("skip_ranges")
    generator = torch.Generator().manual_seed(0)
    weight, rows = (torch.randn(*shape, generator=generator) for shape in ((8, 16), (256, 16)))
    rows[:, :8] *= 100
    weight[:, :8] /= 100

    one, two = (study.output_sqnr(weight, [rows], torch.ones(16), 4, ends) for ends in ([16], [8, 16]))

    assert two > one + 3


def test_a_sampler_with_the_calibrated_steps_loses_nothing(run):
    script = importlib.import_module("unseen_timesteps")
    names = ("DDIM, 20 steps", "LCM, 4 steps")
    samplers = {name: script.SAMPLERS[name] for name in names}
    report = run("unseen_timesteps", "--bits", "4", SAMPLERS=samplers, IMAGES=4, CALIBRATION_SAMPLES=8)

    ddim, lcm = report["rows"]
    assert [ddim["sampler"], lcm["sampler"]] == list(names)
    assert ddim["loss_db"] == 0
    assert ddim["psnr_db"] > 20
    assert lcm["loss_db"] != 0
    assert lcm["psnr_db"] > 20
