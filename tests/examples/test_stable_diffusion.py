"""The Stable Diffusion example on a complete pipeline of tiny random models."""

import functools
import json
import string
import sys

import pytest
import tiny_unets
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import dq_runtime
from dq_runtime.layers import QuantizedLayer
from examples import stable_diffusion as example

TOKENS = 16


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory):
    """A saved pipeline whose tokenizer knows single letters."""
    folder = tmp_path_factory.mktemp("pipeline")
    letters = string.ascii_lowercase
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=TOKENS, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    autoencoder = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, sample_size=16,
    )  # fmt: skip
    unet = tiny_unets.unet2d_condition()
    pipeline = StableDiffusionPipeline(
        vae=autoencoder, text_encoder=CLIPTextModel(text), unet=unet, safety_checker=None,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        tokenizer=CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS), feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


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
    monkeypatch.setattr("dq_runtime.calibration.distillation._Trainer._train", None)
    example.main()

    assert json.loads((tmp_path / "out" / "report.json").read_text())["psnr_db"] == report["psnr_db"]


def test_prompts_of_the_comparison_are_not_used_for_calibration():
    assert not set(example.PROMPTS) & set(example.CALIBRATION_PROMPTS)
