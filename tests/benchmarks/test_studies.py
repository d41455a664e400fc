"""The studies that README quotes: timesteps' importance, skip ranges, unseen timesteps, attention in int8."""

import functools
import json
import sys

import pytest
import torch
from fused_unets import call, new_unet, quantized

import dq_runtime
from benchmarks.quality import int8_attention, skip_ranges, study, timestep_importance, unseen_timesteps
from dq_runtime.layers import quantized_layers


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs a script's command line, with some of its constants changed, and returns its report."""

    def report(script, *arguments, **constants):
        for constant, value in constants.items():
            monkeypatch.setattr(script, constant, value)
        monkeypatch.setattr(sys, "argv", [script.__name__, *arguments, "--output", str(tmp_path / "report.json")])
        script.main()
        return json.loads((tmp_path / "report.json").read_text())

    return report


def test_a_trained_unet_forgets_errors_as_the_closed_form_says(run):
    report = run(timestep_importance, IMAGES=8, STEPS=4)

    assert [row["timestep"] for row in report["rows"]] == sorted(row["timestep"] for row in report["rows"])
    assert len(report["rows"]) == 4
    # What the last step gets wrong is in the image as it is; before it, within the spread that README tells of.
    first, *others = report["rows"]
    assert first["ratio"] == pytest.approx(1, rel=0.1)
    assert all(0.1 < row["ratio"] < 10 for row in others)
    assert max(row["measured"] for row in others) > 10 * first["measured"]


def test_each_source_of_a_skip_gets_a_quantizer_of_its_own(run):
    report = run(skip_ranges, STEPS=2, CALIBRATION_SAMPLES=4)

    layers = {row["layer"] for row in report["rows"]}
    assert layers == {f"up_blocks.{block}.resnets.{i}.conv_shortcut" for block in range(3) for i in range(2)}
    gains = [row["two quantizers"] - row["none"] for row in report["rows"] if row["activation_bits"] == 4]
    assert sum(gains) / len(gains) > 0
    assert all(row["none"] > 10 for row in report["rows"] if row["activation_bits"] == 8)


def test_two_quantizers_win_where_ranges_are_far_apart():
    generator = torch.Generator().manual_seed(0)
    weight, rows = (torch.randn(*shape, generator=generator) for shape in ((8, 16), (256, 16)))
    rows[:, :8] *= 100
    weight[:, :8] /= 100

    one, two = (skip_ranges.output_sqnr(weight, [rows], torch.ones(16), 4, ends) for ends in ([16], [8, 16]))

    assert two > one + 3


def test_a_sampler_of_other_steps_draws_with_each_kind_of_scales(run, monkeypatch):
    names, steps = ("DDIM, 20 steps", "LCM, 4 steps"), (6, 3)
    samplers = {name: (unseen_timesteps.SAMPLERS[name][0], number) for name, number in zip(names, steps, strict=True)}
    config = functools.partial(dq_runtime.DilateQuantConfig, dilation="weight")
    monkeypatch.setattr(unseen_timesteps.dq_runtime, "DilateQuantConfig", config)
    arguments = ("--bits", "4", "--seeds", "1")
    report = run(unseen_timesteps, *arguments, SAMPLERS=samplers, IMAGES=4, CALIBRATION_SAMPLES=4)

    ddim, lcm = report["rows"]
    assert [ddim["sampler"], lcm["sampler"]] == list(names)
    assert ddim["psnr_db"].keys() == {"nearest"}
    assert lcm["psnr_db"].keys() == {"nearest", "interpolated", "own_scales", "own_calibration"}
    measured = [value for row in (ddim, lcm) for values in row["psnr_db"].values() for value in values]
    assert len(set(measured)) == len(measured) == 5
    assert min(measured) > 20


def test_attention_in_int8_costs_an_image_next_to_nothing(run, monkeypatch):
    monkeypatch.setattr(study, "CALIBRATION_SAMPLES", 4)
    monkeypatch.setattr(study, "STEPS", 2)

    report = run(int8_attention, "--seeds", "1", IMAGES=4, ITERATIONS=0, STEPS=2, ACTIVATION_BITS=(4,))

    psnr_db = {row["unet"]: row["mean_psnr_db"] for row in report["rows"]}
    assert list(psnr_db) == ["fp32", "W4A4", "fp32, int8 attention", "W4A4, int8 attention"]
    assert psnr_db["fp32"] == 100 > psnr_db["fp32, int8 attention"] > 60
    assert 0 < abs(psnr_db["W4A4"] - psnr_db["W4A4, int8 attention"]) < 3


def test_attention_to_more_random_tokens_loses_more(run):
    rows = run(int8_attention, "--random")["rows"]

    for spread in (1, 2, 4):
        ratios = [row["sqnr_db"] for row in rows if row["spread"] == spread]
        assert ratios == sorted(ratios, reverse=True)
        assert 29 < min(ratios) < max(ratios) < 40


def test_gains_of_scales_are_seed_by_seed():
    seeds = {
        "fp32": [{"accuracy": 1.0}, {"accuracy": 0.5}],
        "nearest": [{"accuracy": 0.5, "psnr_db": 30.0}, {"accuracy": 0.5, "psnr_db": 34.0}],
        "interpolated": [{"accuracy": 0.5, "psnr_db": 31.0}, {"accuracy": 0.75, "psnr_db": 37.0}],
    }

    summary = unseen_timesteps.summary(seeds)

    assert summary["accuracy"] == {"fp32": 0.75, "nearest": 0.5, "interpolated": 0.625}
    assert summary["psnr_db"] == {"nearest": [30.0, 34.0], "interpolated": [31.0, 37.0]}
    assert summary["gain_db"] == {"interpolated": {"mean": 2.0, "std": pytest.approx(2**0.5)}}


def test_tables_between_timesteps_lie_between_theirs_and_on_them_are_theirs():
    unet = quantized()
    first, second, *_ = own = unet.config.quantization_config.timesteps

    same = unseen_timesteps.with_tables(
        unet, new_unet("conv projections"), own, unseen_timesteps.interpolated(unet, own)
    )
    between = unseen_timesteps.interpolated(unet, [(first + second) / 2])

    assert torch.equal(call(same), call(unet))
    for name, layer in quantized_layers(unet).items():
        torch.testing.assert_close(between[name]["act_scale"], layer.act_scale[:2].mean()[None])
        assert between[name]["act_zero_point"].dtype == torch.int32
