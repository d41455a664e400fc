"""The parts of the emoji pipeline, untrained, and the pipeline made of trained ones."""

from __future__ import annotations

import copy
import itertools
import json
import re
import shutil
import string
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TOKENS = 16  # of every prompt, padding included
TEXT_CHANNELS = 128
LATENT_CHANNELS = 4


def trained_tokenizer(captions: Iterable[str]) -> CLIPTokenizer:
    """A tokenizer to which every word of ``captions`` (lower-case letters, digits, commas) is one token.

    It is trained by byte-pair encoding without a limit. The same captions give the same tokens: names break ties.
    (The trainer of the package tokenizers breaks them at random.)
    """
    counts = Counter(word for caption in captions for word in re.findall("[a-z]+|[0-9]|,", caption))
    spelled = {word: [*word[:-1], f"{word[-1]}</w>"] for word in counts}
    merges: list[tuple[str, str]] = []
    while spelled := {word: parts for word, parts in spelled.items() if len(parts) > 1}:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in spelled.items():
            for pair in itertools.pairwise(parts):
                pairs[pair] += counts[word]
        merges.append(max(pairs, key=lambda pair: (pairs[pair], pair)))
        spelled = {word: merged(parts, merges[-1]) for word, parts in spelled.items()}
    symbols = [*string.ascii_lowercase, *string.digits, ","]
    tokens = ["<|startoftext|>", "<|endoftext|>", *symbols, *(f"{symbol}</w>" for symbol in symbols)]
    vocabulary = {token: i for i, token in enumerate([*tokens, *map("".join, merges)])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)


def merged(parts: list[str], pair: tuple[str, str]) -> list[str]:
    """``parts`` with every occurrence of ``pair`` as one part."""
    result: list[str] = []
    for part in parts:
        if result and (result[-1], part) == pair:
            result[-1] += part
        else:
            result.append(part)
    return result


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Shape (captions, TOKENS)."""
    encoded = tokenizer(captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    return encoded.input_ids


def untrained_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=TEXT_CHANNELS, intermediate_size=4 * TEXT_CHANNELS, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=TOKENS, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return CLIPTextModel(config)


def untrained_autoencoder() -> AutoencoderKL:
    """From images (3, 64, 64) to latents (4, 16, 16)."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64), layers_per_block=1, norm_num_groups=8, latent_channels=LATENT_CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, sample_size=64,
        mid_block_add_attention=False, scaling_factor=1.0,
    )  # fmt: skip


def untrained_unet() -> UNet2DConditionModel:
    """Attention is at the resolutions (8, 8) and, in the middle block, (4, 4), where most of the weights are."""
    return UNet2DConditionModel(
        sample_size=16, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, layers_per_block=1,
        block_out_channels=(32, 64, 208), norm_num_groups=16, attention_head_dim=2, cross_attention_dim=TEXT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def noise_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise levels; the network predicts the velocity."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing",
        steps_offset=1,
    )  # fmt: skip


@torch.no_grad()
def normalize_latents(autoencoder: AutoencoderKL, latents: torch.Tensor) -> None:
    """Give each latent channel mean 0 and variance 1 over ``latents`` (..., 4, 16, 16); reconstructions do not change.

    The 1×1 convolutions on both sides of the latents take up the factors, so that pipelines need not know them.
    """
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    into, out = autoencoder.quant_conv, autoencoder.post_quant_conv
    out.bias += out.weight[:, :, 0, 0] @ mean
    out.weight *= deviation[None, :, None, None]
    into.bias[:LATENT_CHANNELS] -= mean
    into.bias[:LATENT_CHANNELS] /= deviation
    into.weight[:LATENT_CHANNELS] /= deviation[:, None, None, None]
    into.bias[LATENT_CHANNELS:] -= 2 * deviation.log()  # the second half of the channels are logarithms of variances


def pipeline(autoencoder: AutoencoderKL, tokenizer: CLIPTokenizer, denoiser: nn.ModuleDict) -> StableDiffusionPipeline:
    """The parts as a pipeline. ``denoiser`` has the modules ``unet`` and ``text_encoder``."""
    pipe = StableDiffusionPipeline(
        vae=autoencoder, text_encoder=denoiser["text_encoder"], tokenizer=tokenizer, unet=denoiser["unet"],
        scheduler=noise_scheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save(pipe: StableDiffusionPipeline, folder: Path) -> None:
    """Write the pipeline in fp16; a folder that is there is replaced when the new one is complete."""
    beside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)
    halves = {name: copy.deepcopy(getattr(pipe, name)).half() for name in ("vae", "text_encoder", "unet")}
    StableDiffusionPipeline(**{**pipe.components, **halves}, requires_safety_checker=False).save_pretrained(beside)
    pipe.tokenizer.backend_tokenizer.model.save(str(beside / "tokenizer"))  # vocab.json and merges.txt
    # Unless told otherwise, diffusers loads its models in fp32 and transformers its own in the dtype of their config.
    config = beside / "text_encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "float32"}, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)
