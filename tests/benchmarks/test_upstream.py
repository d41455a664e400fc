"""The plugin that runs diffusers' own tests with our UNets, on a small checkout of one test file."""

import json
from pathlib import Path

import pytest

from benchmarks.upstream import run
from benchmarks.upstream.differences import VERDICTS, counts, differences, is_clean, needs_hub, page, read_verdicts

MODULE = "tests/test_unets.py"
CONFTEST = """
import sys
from pathlib import Path

vars(sys)["path"].insert(1, str(Path(__file__).parents[1] / "src"))  # as diffusers' does
"""
TESTS = """
import random

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel, UNet2DModel
from transformers import CLIPTextModel, CLIPTokenizer

SMALL = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 8}
BLOCKS = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}


def unet(**arguments):
    torch.manual_seed(0)
    return UNet2DModel(**SMALL, **BLOCKS, **arguments)


def is_quantized(model):
    return any(type(module).__name__ == "QuantConv2d" for module in model.modules())


def is_fused(model):
    return any(type(module).__module__.startswith("dq_runtime.fused_") for module in model.modules())


def test_a_new_unet_is_quantized_and_fused():
    assert is_quantized(unet()) and is_fused(unet())


def test_random_numbers_are_those_of_a_stock_unet():
    torch.manual_seed(0)
    UNet2DModel.__init__.__wrapped__(UNet2DModel.__new__(UNet2DModel), **SMALL, **BLOCKS)
    expected = torch.rand(1)
    assert not unet().training, "it would run unfused"
    assert torch.equal(torch.rand(1), expected)


def test_begins_with_the_random_numbers_of_every_test():
    torch.rand(1), np.random.rand(), random.random()


def test_begins_with_the_random_numbers_of_every_test_again():
    assert torch.initial_seed() == 0 and torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(0))
    assert np.random.rand() == np.random.RandomState(0).rand() and random.random() == random.Random(0).random()


def test_the_same_weights_give_the_same_tensors():
    first, second = unet().state_dict(), unet().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["mid_block.resnets.0.conv1.packed_weight"] is not second["mid_block.resnets.0.conv1.packed_weight"]


def test_a_loaded_unet_is_quantized_and_fused(tmp_path):
    unet().save_pretrained(tmp_path)
    loaded = UNet2DModel.from_pretrained(tmp_path)
    assert is_quantized(loaded) and is_fused(loaded)


def test_other_models_stay_as_they_are():
    arguments = {"down_block_types": ("DownBlock2D",) * 2, "cross_attention_dim": 8}
    assert not is_quantized(ControlNetModel(**{k: SMALL[k] for k in SMALL if k != "sample_size"}, **arguments))


def test_a_unet_whose_inputs_are_unknown_stays_as_it_is():
    text_time = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    model = UNet2DConditionModel(
        **SMALL, **BLOCKS, **text_time, cross_attention_dim=8, projection_class_embeddings_input_dim=8
    )
    assert not is_quantized(model)


def test_a_unet_that_appends_an_image_to_the_sample_is_quantized():
    image = {"encoder_hid_dim": 8, "encoder_hid_dim_type": "image_proj", "addition_embed_type": "image_hint"}
    assert is_quantized(UNet2DConditionModel(**SMALL, **BLOCKS, **image, in_channels=8, cross_attention_dim=8))


def test_a_large_unet_stays_as_it_is(monkeypatch):
    monkeypatch.setattr("benchmarks.upstream.quantize.MOST_PARAMETERS", 10)
    assert not is_quantized(unet())


def test_clip_needs_no_hub():
    tokens = CLIPTokenizer.from_pretrained("hf-internal-testing/tiny-random-clip")("a cat").input_ids
    encoder = CLIPTextModel.from_pretrained("peft-internal-testing/tiny-clip-text-2")
    assert encoder(torch.tensor([tokens])).last_hidden_state.shape == (1, len(tokens), 32)


def test_the_hub():
    UNet2DModel.from_pretrained("owner/unet")


def test_that_is_skipped():
    pytest.skip("no accelerator")


@pytest.mark.xfail
def test_that_should_fail():
    raise ValueError("as expected")


def test_that_fails():
    assert not is_quantized(unet()), "the UNet is quantized"  # see huggingface.co
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Of one run with fused UNets: test -> what the plugin wrote."""
    checkout = tmp_path_factory.mktemp("checkout")
    files = {"pyproject.toml": "", "tests/__init__.py": "", "tests/conftest.py": CONFTEST, MODULE: TESTS}
    for name, text in {**files, "src/diffusers/__init__.py": "raise ImportError('not the installed one')"}.items():
        file = checkout / name
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_text(text)
    run.run_tests(checkout, MODULE, "fused", checkout / "outcomes.json")
    tests = json.loads((checkout / "outcomes.json").read_text())
    return {name.removeprefix(f"{MODULE}::"): test for name, test in tests.items()}


def test_the_plugin_quantizes_the_unets_of_tests(outcomes):
    failed = {name: test for name, test in outcomes.items() if test["outcome"] == "failed"}

    assert failed.keys() == {"test_the_hub", "test_that_fails"}, failed
    assert outcomes["test_a_loaded_unet_is_quantized_and_fused"]["quantized"] == 2
    assert outcomes["test_clip_needs_no_hub"]["quantized"] == 0


def test_the_plugin_tells_why_a_test_failed_or_was_skipped(outcomes):
    assert outcomes["test_that_is_skipped"] == {
        "outcome": "skipped",
        "error": "Skipped: no accelerator",
        "quantized": 0,
    }
    assert outcomes["test_that_should_fail"]["error"] == "ValueError: as expected"
    assert needs_hub(outcomes["test_the_hub"])
    assert not needs_hub(outcomes["test_that_fails"])
    assert outcomes["test_that_fails"]["error"].startswith("AssertionError: the UNet is quantized assert not True")


def test_the_plugin_tells_which_unets_stay_in_floating_point(outcomes):
    unknown = outcomes["test_a_unet_whose_inputs_are_unknown_stays_as_it_is"]

    assert unknown["quantized"] == 0
    assert "RuntimeError" in unknown["left"][0]
    assert outcomes["test_a_large_unet_stays_as_it_is"]["left"] == ["too large to calibrate here"]


def test_a_module_that_the_checkout_lacks_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.py"):
        run.run_tests(tmp_path, "nothing.py", "stock", tmp_path / "outcomes.json")


PASSED, FAILED = {"outcome": "passed"}, {"outcome": "failed", "error": "AssertionError: 0.3 is not 0.2"}


def test_a_difference_has_the_first_verdict_that_matches_test_mode_and_error():
    verdicts = [
        {"test": "slice", "error": "TypeError", "verdict": "BUG", "reason": "wrong error"},
        {"test": "slice", "mode": "quantized", "verdict": "BUG", "reason": "wrong mode"},
        {"test": "slice", "error": "is not", "verdict": "expected slice", "reason": "numbers of other weights"},
    ]
    stock = {"slice": PASSED, "same": FAILED, "other": PASSED}
    ours = {"slice": FAILED, "same": FAILED, "other": FAILED}

    rows = differences(stock, ours, "fused", verdicts)

    assert [(row["test"], row["verdict"]) for row in rows] == [("slice", "expected slice"), ("other", "unjudged")]


def test_a_test_that_did_not_run_is_a_difference():
    (row,) = differences({"a": PASSED}, {}, "fused", [])

    assert (row["stock"], row["ours"]) == ("passed", "not run")


def test_counts():
    tests = {"a": {**PASSED, "quantized": 2}, "b": {**FAILED, "quantized": 0}, "c": PASSED}

    assert counts(tests) == {"tests": 3, "passed": 2, "failed": 1, "with_quantized": 1}


@pytest.mark.parametrize(("verdict", "clean"), [("expected slice", True), ("BUG", False), ("unjudged", False)])
def test_a_report_is_clean_without_bugs_and_open_verdicts(verdict, clean):
    row = {"test": "t[a|b]", "mode": "fused", "stock": "passed", "ours": "failed", "error": "E", "reason": "R"}
    module = {"counts": {"stock": {"passed": 3}, "fused": {"passed": 2, "failed": 1}}, "differences": [row]}
    row["verdict"] = verdict
    report = {
        "environment": {"date": "2026-01-01", "versions": {"torch": "2"}, "cpu_model": "CPU", "threads": 1},
        "tests_version": "1.0",
        "modules": {MODULE: module},
    }

    assert is_clean(report) is clean
    assert f"| {MODULE} | fused | 2 | 1 | 0 | 0 | 0 | 1 |" in page(report)
    assert f"| t[a\\|b] | fused | passed | failed | E | {verdict} |" in page(report)


def test_each_verdict_has_a_reason_and_known_patterns():
    for entry in read_verdicts():
        assert entry.keys() <= {"test", "mode", "error", "verdict", "reason"}
        assert entry["verdict"]
        assert entry["reason"]
        assert entry.keys() & {"test", "error"}, "it would match every test"
    assert VERDICTS.parent == Path(run.__file__).parent


def test_an_interrupted_report_compares_the_modes_that_ran(tmp_path):
    file = run.outcomes_of(tmp_path, MODULE, "stock")
    file.parent.mkdir()
    file.write_text(json.dumps({"a": PASSED}))

    assert run.compare(tmp_path, MODULE)["counts"] == {"stock": {"tests": 1, "passed": 1, "with_quantized": 0}}


@pytest.mark.parametrize(("tests_version", "kept"), [("1.0", True), ("0.9", False)])
def test_a_report_keeps_files_of_tests_that_ran_before_with_the_same_versions(tmp_path, tests_version, kept):
    init = tmp_path / "src/diffusers/__init__.py"
    init.parent.mkdir(parents=True)
    init.write_text('__version__ = "1.0"')
    report = run.new_report(tmp_path, tmp_path / "report.json")
    report["environment"]["date"] = "2026-01-01"
    earlier = report | {"tests_version": tests_version, "modules": {MODULE: {"counts": {}, "differences": []}}}
    (tmp_path / "report.json").write_text(json.dumps(earlier))

    assert (MODULE in run.new_report(tmp_path, tmp_path / "report.json")["modules"]) is kept
