"""The model card that a save leaves."""

import copy

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from huggingface_hub import ModelCard

import dq_runtime
from dq_runtime.config import FORMAT_VERSION
from dq_runtime.layers import quantized_layers
from dq_runtime.model_card import base_model, model_card


@pytest.fixture
def saved(unet2d, tmp_path):
    unet2d.quantized.save_pretrained(tmp_path / "unet")
    return tmp_path / "unet"


def test_a_save_leaves_a_card_with_what_a_user_must_know(unet2d, saved):
    card = ModelCard.load(saved / "README.md")
    body = card.text

    assert card.data.to_dict() == {"library_name": "diffusers", "tags": ["dq_runtime", "int4"]}
    assert "# UNet2DModel, W4A8\n" in body
    assert f"{len(quantized_layers(unet2d.quantized))} layers in packed INT4" in body
    assert "| activations | 8 bits, 8 for `conv_shortcut` |" in body
    assert "| activation scales | one for each of 4 timesteps from 0 to 750 |" in body
    assert "| calibration samples | 8 |" in body
    assert "| calibration scheduler | DDIMScheduler |" in body
    assert "| kept in floating point | `conv_in`, `conv_out` |" in body
    assert 'UNet2DModel.from_pretrained("this/folder")' in body


def test_the_cards_code_loads_the_checkpoint(saved, monkeypatch):
    monkeypatch.chdir(saved.parent)
    code = (saved / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names = {}
    exec(code.replace("this/folder", str(saved)), names)

    assert isinstance(names["model"], UNet2DModel)
    assert quantized_layers(names["model"])


def test_a_card_that_is_there_stays(unet2d, saved):
    (saved / "README.md").write_text("mine")
    unet2d.quantized.save_pretrained(saved)

    assert (saved / "README.md").read_text() == "mine"


def test_facts_and_signal_to_noise_ratio_stay_with_the_checkpoint(new_unet, tmp_path):
    stock = new_unet()
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    calls = dq_runtime.collect_from_scheduler(stock, DDIMScheduler(), noise, 4)
    unet = dq_runtime.calibrate(copy.deepcopy(stock), calls, dq_runtime.DilateQuantConfig(dilation="none"), None)
    unet.save_pretrained(tmp_path / "first")
    UNet2DModel.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")

    pairs = [(call.run(stock).sample, call.run(unet).sample) for call in calls.calls]
    ratios = [10 * (a.square().mean((1, 2, 3)) / (a - b).square().mean((1, 2, 3))).log10() for a, b in pairs]
    expected = torch.cat(ratios).mean().item()
    assert unet.hf_quantizer.quantization_config.calibration["prediction_snr_db"] == pytest.approx(expected, abs=0.06)
    cards = [(tmp_path / folder / "README.md").read_text() for folder in ("first", "second")]
    assert cards[0] == cards[1]
    assert "| weights trained by | rounded to nearest |" in cards[0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("owner/name", "owner/name"),
        ("/home/me/.cache/huggingface/hub/models--owner--a-b/snapshots/0123/unet", "owner/a-b"),
        ("/home/me/secret/unet", None),
        ("./unet", None),
        ("unet", None),
        ("", None),
    ],
)
def test_the_base_model_is_named_only_if_it_is_on_the_hub(name, expected, unet2d):
    unet = copy.deepcopy(unet2d.quantized)
    unet.register_to_config(_name_or_path=name)
    card = ModelCard(model_card(unet, unet.hf_quantizer.quantization_config))

    assert base_model(name) == card.data.base_model == expected
    assert "secret" not in str(card)


def test_a_folder_of_that_name_is_no_repository(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    assert base_model("owner/name") is None


def test_a_checkpoint_of_a_newer_format_is_refused_by_name(saved):
    config = saved / "config.json"
    config.write_text(config.read_text().replace(f'"format_version": {FORMAT_VERSION}', '"format_version": 99'))

    with pytest.raises(ValueError, match=r"format version 99.*up to 1: upgrade dq_runtime"):
        UNet2DModel.from_pretrained(saved)


@pytest.mark.parametrize(
    "facts",
    [["samples"], {"a": True}, {"a": [1]}, {1: "a"}, {"a": "x" * 1001}, {str(i): i for i in range(33)}, {"a": {}}],
)
def test_other_facts_are_refused(facts):
    with pytest.raises(ValueError, match="calibration"):
        dq_runtime.DilateQuantConfig(calibration=facts)
