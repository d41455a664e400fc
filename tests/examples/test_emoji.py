"""The emoji example's training, on a few synthetic images and for a few steps; nothing is downloaded."""

import dataclasses

import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTokenizer

from examples.emoji import data, models, train

EMOJI = [
    data.Emoji(name, keywords, "Objects", torch.full((3, 64, 64), shade, dtype=torch.uint8))
    for name, keywords, shade in (("red fox", ("animal", "wild", "sly"), 40), ("sun", ("sky",), 200), ("key", (), 120))
]
CAPTIONS = [data.known_captions(emoji) for emoji in EMOJI]
SHORT = dataclasses.replace(train.DENOISER, steps=4, batch_size=2, warmup_steps=1, checkpoint_every=2)


class Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def tokenizer():
    return models.trained_tokenizer(caption for several in CAPTIONS for caption in several)


def test_known_captions_never_have_the_held_out_pair_of_keywords():
    assert data.held_out_caption(EMOJI[0]) == "red fox, animal, wild"
    assert CAPTIONS[0] == [
        "red fox", "red fox emoji", "a picture of red fox", "red fox, animal", "red fox, wild", "red fox, sly",
        "red fox, animal, sly", "red fox, wild, sly",
    ]  # fmt: skip
    assert data.held_out_caption(EMOJI[1]) is None


def test_each_word_of_the_captions_is_one_token_in_a_fixed_length(tokenizer):
    ids = models.token_ids(tokenizer, ["red fox, animal", ""])

    assert ids.shape == (2, models.TOKENS)
    end = tokenizer.eos_token_id
    assert tokenizer.convert_ids_to_tokens(ids[0, :6]) == [
        "<|startoftext|>", "red</w>", "fox</w>", ",</w>", "animal</w>", "<|endoftext|>",
    ]  # fmt: skip
    assert ids[1].tolist() == [tokenizer.bos_token_id] + [end] * (models.TOKENS - 1)


def test_normalized_latents_have_mean_0_and_variance_1_and_the_same_reconstructions():
    torch.manual_seed(0)
    autoencoder = models.untrained_autoencoder()
    images = torch.rand(4, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        before = autoencoder(images).sample
        models.normalize_latents(autoencoder, train.encode(autoencoder, images))
        after, latents = autoencoder(images).sample, train.encode(autoencoder, images)

    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)  # fp32, in another order
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-4)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), rtol=0, atol=1e-4)


def test_a_stopped_training_continues_bit_for_bit(tmp_path, tokenizer):
    torch.manual_seed(0)
    latents = torch.randn(len(EMOJI), 4, 16, 16)

    def stop(step, averaged):
        if step == 3:  # behind the checkpoint of step 2
            raise Stopped

    whole = train.train_denoiser(latents, CAPTIONS, tokenizer, SHORT, tmp_path / "whole.pt")
    every_step = dataclasses.replace(SHORT, report_every=1)
    with pytest.raises(Stopped):
        train.train_denoiser(latents, CAPTIONS, tokenizer, every_step, tmp_path / "stopped.pt", stop)
    continued = train.train_denoiser(latents, CAPTIONS, tokenizer, SHORT, tmp_path / "stopped.pt")

    assert torch.load(tmp_path / "stopped.pt")["step"] == SHORT.steps
    expected = whole.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in continued.state_dict().items())


def test_the_saved_pipeline_is_loaded_by_stock_diffusers_and_small(tmp_path, tokenizer):
    torch.manual_seed(0)
    images = torch.stack([emoji.image for emoji in EMOJI]).float() / 127.5 - 1
    recipe = dataclasses.replace(train.AUTOENCODER, steps=2, batch_size=2, warmup_steps=1)
    autoencoder = train.train_autoencoder(images, recipe, tmp_path)
    denoiser = torch.nn.ModuleDict(
        {"text_encoder": models.untrained_text_encoder(tokenizer), "unet": models.untrained_unet()}
    ).eval()
    folder = tmp_path / "pipeline"
    for _ in range(2):  # the second replaces the first
        models.save(models.pipeline(autoencoder, tokenizer, denoiser), folder)

    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("sun", num_inference_steps=1, output_type="np").images[0]

    assert image.shape == (64, 64, 3)
    assert (tmp_path / "autoencoder.png").exists()
    assert sum(file.stat().st_size for file in folder.rglob("*")) < 26e6
    for name, tensor in pipe.unet.state_dict().items():
        assert torch.equal(tensor, denoiser["unet"].state_dict()[name].half().float())
    files = CLIPTokenizer(vocab=str(folder / "tokenizer/vocab.json"), merges=str(folder / "tokenizer/merges.txt"))
    assert files("red fox, wild").input_ids == tokenizer("red fox, wild").input_ids
