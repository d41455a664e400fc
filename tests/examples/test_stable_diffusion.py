"""The Stable Diffusion example on a complete pipeline of tiny random models."""

import functools
import json
import sys

import pytest
import tiny_pipeline
from diffusers import UNet2DConditionModel

import dq_runtime
from dq_runtime.layers import QuantizedLayer
from examples import stable_diffusion as example


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory):
    return tiny_pipeline.save_pipeline(tmp_path_factory.mktemp("pipeline"))


def test_a_pipeline_is_quantized_loaded_and_compared_and_a_second_run_resumes(pipeline_folder, tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n\na dog\na fox\n")
    options = ["--steps", "3", "--samples", "16", "--prompts", str(prompts), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["stable_diffusion.py", str(pipeline_folder), *options])
    # Short: how well it is quantized is not the question here.
    for name, short in {"Distillation": {"iterations": 2}, "DilateQuantConfig": {"dilation": "weight"}}.items():
        monkeypatch.setattr(example.dq_runtime, name, functools.partial(getattr(dq_runtime, name), **short))

    example.main()

    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(report["psnr_db"]) == len(example.PROMPTS)
    assert min(report["psnr_db"]) > 20
    assert report["unet_mb"]["int4"] < 0.2 * report["unet_mb"]["fp"]  # of fp32
    assert (tmp_path / "out" / "grid.png").stat().st_size > 1000
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "out" / "unet")
    assert any(isinstance(module, QuantizedLayer) for module in unet.modules())

    # The second run neither records nor trains.
    monkeypatch.setattr(example.dq_runtime, "collect_from_pipeline", None)
    monkeypatch.setattr("dq_runtime.calibration.training.Trainer._train", None)
    example.main()

    assert json.loads((tmp_path / "out" / "report.json").read_text())["psnr_db"] == report["psnr_db"]


def test_prompts_of_the_comparison_are_not_used_for_calibration():
    assert not set(example.PROMPTS) & set(example.CALIBRATION_PROMPTS)
