"""Trains a text-to-image pipeline for emoji: the autoencoder, then the text encoder and the UNet.

    python -m examples.emoji.train                          # everything, under out/emoji
    python -m examples.emoji.train --output FOLDER          # there; a stopped run continues behind its last checkpoint

Run it from the repository's root; it needs npm for the images. It writes into the folder:

- ``pipeline/``: what ``StableDiffusionPipeline.from_pretrained`` loads, in fp16
- ``samples/``: images of known prompts (rows above) and of prompts that no caption has (last row), as training goes
- ``autoencoder.png``: images and their reconstructions, alternating rows
- ``autoencoder.pt``, ``denoiser.pt``: checkpoints, replaced when complete
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import CLIPTokenizer

from examples.emoji import data, models

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KL_WEIGHT = 1e-3
LARGEST_SHIFT = 4  # of the autoencoder's training images, in pixels
CAPTION_DROP = 0.1  # share of captions replaced by "", for classifier-free guidance
LARGEST_SNR = 5  # timesteps of less noise weigh no more than one of this SNR (https://arxiv.org/abs/2303.09556)
CAPTION_LOSS_WEIGHT = 0.1
GUIDANCE = 3.0
SAMPLING_STEPS = 20

KNOWN_PROMPTS = """
dog face; cat face; fox; panda; elephant; penguin; owl; frog; spouting whale; octopus; butterfly; lady beetle; rose;
cactus; palm tree; mushroom; red apple; banana; strawberry; pizza; hamburger; doughnut; birthday cake; ladder; rocket;
fire engine; bicycle; sailboat; snowman; rainbow; umbrella; sun; guitar; soccer ball; key; light bulb; red heart; crown;
grinning face; a picture of skull
"""
NEW_PROMPTS = """
panda, animal, nature; a picture of pizza, food; blue heart, love; green fish; purple car; red umbrella; yellow flower;
black dog
"""


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of one training. The weights that are kept are a moving average with decay ``ema_decay``."""

    steps: int
    batch_size: int
    learning_rate: float
    ema_decay: float
    warmup_steps: int = 300
    decay_share: float = 0.35  # of the steps, at the end, in which the learning rate falls to 0
    checkpoint_every: int = 250
    report_every: int = 1000

    def rate(self, step: int) -> float:
        """The learning rate at ``step``."""
        falling = (self.steps - step) / (self.decay_share * self.steps)
        return self.learning_rate * min(1.0, (step + 1) / self.warmup_steps, falling)


AUTOENCODER = Recipe(steps=2500, batch_size=8, learning_rate=2e-3, ema_decay=0.995)
DENOISER = Recipe(steps=9000, batch_size=32, learning_rate=1e-3, ema_decay=0.999)


def fit(
    networks: nn.Module,
    loss: Callable[[torch.Generator], torch.Tensor],
    recipe: Recipe,
    checkpoint: Path,
    report: Callable[[int, nn.Module], None] = lambda step, averaged: None,
) -> nn.Module:
    """Train ``networks`` and return their moving average.

    ``loss`` draws a batch with the given generator, which is seeded by the step. So a training that continues from
    ``checkpoint`` equals one that was never stopped, bit for bit.
    """
    averaged = AveragedModel(networks, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema_decay))
    optimizer = torch.optim.AdamW(networks.parameters(), betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    parts = {"networks": networks, "averaged": averaged, "optimizer": optimizer}
    first = load_checkpoint(checkpoint, parts) if checkpoint.exists() else 0
    start, losses = time.perf_counter(), []
    for step in range(first, recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        # On CPUs the backward pass of attention is faster without flash attention.
        with torch.autocast(DEVICE.type, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            value = loss(torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(networks.parameters(), 1.0)
        optimizer.step()
        averaged.update_parameters(networks)
        losses.append(value.detach())
        done = step + 1
        if done % recipe.checkpoint_every == 0 or done == recipe.steps:
            save_checkpoint(checkpoint, parts, done)
            seconds = (time.perf_counter() - start) / (done - first)
            mean = torch.stack(losses).mean().item()
            print(f"{checkpoint.stem} {done}/{recipe.steps}: loss {mean:.4f}, {seconds * 1e3:.0f} ms/step", flush=True)
            losses.clear()
        if done % recipe.report_every == 0 or done == recipe.steps:
            report(done, averaged.module)
    return averaged.module


def save_checkpoint(file: Path, parts: dict, step: int) -> None:
    beside = file.with_name(file.name + ".partial")
    torch.save({"step": step, **{name: part.state_dict() for name, part in parts.items()}}, beside)
    beside.replace(file)


def load_checkpoint(file: Path, parts: dict) -> int:
    """Load the parts' states and return the number of finished steps."""
    saved = torch.load(file, map_location=DEVICE, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    return saved["step"]


def train_autoencoder(images: torch.Tensor, recipe: Recipe, folder: Path) -> AutoencoderKL:
    """``images`` (count, 3, 64, 64) are in [-1, 1]. Latents of the result have mean 0 and variance 1."""
    torch.manual_seed(0)
    autoencoder = models.untrained_autoencoder().to(DEVICE)

    def loss(generator: torch.Generator) -> torch.Tensor:
        batch = shifted(images[torch.randint(len(images), (recipe.batch_size,), generator=generator)], generator)
        batch = batch.to(DEVICE)
        latents = autoencoder.encode(batch).latent_dist
        sample = latents.mean + latents.std * torch.randn(latents.mean.shape, generator=generator).to(DEVICE)
        return reconstruction_loss(
            autoencoder.decode(sample).sample.float(), batch
        ) + KL_WEIGHT * latents.kl().mean() / (latents.mean[0].numel())

    def report(step: int, averaged: nn.Module) -> None:
        shown = images[:: max(1, len(images) // 24)][:24]
        decoded = averaged.decode(encode(averaged, shown)).sample.cpu()
        error = F.mse_loss(decoded.clamp(-1, 1), shown).item() / 4
        print(f"autoencoder {step}: PSNR {-10 * np.log10(error):.2f} dB", flush=True)
        rows = zip(shown.split(12), decoded.split(12), strict=True)
        save_grid(torch.cat([row for pair in rows for row in pair]), 12, folder / "autoencoder.png")

    trained = fit(autoencoder, loss, recipe, folder / "autoencoder.pt", torch.no_grad()(report))
    models.normalize_latents(trained, encode(trained, images))
    return trained.eval()


def shifted(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The images, all shifted alike and half of the times mirrored; the border is white."""
    top, left, mirror = (torch.rand(3, generator=generator) * torch.tensor([2 * LARGEST_SHIFT + 1] * 2 + [2])).long()
    height, width = images.shape[2:]
    padded = F.pad(images, (LARGEST_SHIFT,) * 4, value=1.0)[:, :, top : top + height, left : left + width]
    return padded.flip(3) if mirror else padded


def reconstruction_loss(decoded: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Absolute and squared error; and the absolute error of differences between neighbours, for sharp edges."""
    error = decoded - images
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + error.square().mean() + edges


@torch.no_grad()
def encode(autoencoder: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    return torch.cat([autoencoder.encode(part.to(DEVICE)).latent_dist.mean for part in images.split(64)])


def train_denoiser(
    latents: torch.Tensor,
    captions: list[list[str]],
    tokenizer: CLIPTokenizer,
    recipe: Recipe,
    checkpoint: Path,
    report: Callable[[int, nn.Module], None] = lambda step, averaged: None,
) -> nn.ModuleDict:
    """``latents`` (count, 4, 16, 16); ``captions`` has several for each. Returns the text encoder and the UNet.

    A linear layer, which is only used in training, predicts the latents from a caption's last state. This teaches the
    text encoder what an image shows long before the UNet's gradients do.
    """
    torch.manual_seed(1)
    networks = nn.ModuleDict(
        {
            "text_encoder": models.untrained_text_encoder(tokenizer),
            "unet": models.untrained_unet(),
            "caption_head": nn.Linear(models.TEXT_CHANNELS, latents[0].numel()),
        }
    ).to(DEVICE)
    scheduler = models.noise_scheduler()
    tokens = [models.token_ids(tokenizer, several) for several in captions]
    no_caption = models.token_ids(tokenizer, [""])[0]
    size, num_timesteps = recipe.batch_size, scheduler.config.num_train_timesteps

    def loss(generator: torch.Generator) -> torch.Tensor:
        chosen = torch.randint(len(latents), (size,), generator=generator)
        which = torch.rand(size, generator=generator)
        ids = [tokens[i][int(u * len(tokens[i]))] for i, u in zip(chosen.tolist(), which.tolist(), strict=True)]
        dropped = torch.rand(size, 1, generator=generator) < CAPTION_DROP
        ids = torch.where(dropped, no_caption, torch.stack(ids)).to(DEVICE)
        # One timestep from each of ``size`` equal ranges: less variance than independent ones.
        timesteps = ((torch.arange(size) + torch.rand(size, generator=generator)) / size * num_timesteps).long()
        noise = torch.randn(size, *latents.shape[1:], generator=generator).to(DEVICE)
        clean = latents[chosen.to(DEVICE)]
        noisy = scheduler.add_noise(clean, noise, timesteps)
        text = networks["text_encoder"](ids).last_hidden_state
        prediction = networks["unet"](noisy, timesteps.to(DEVICE), text).sample.float()
        error = (prediction - scheduler.get_velocity(clean, noise, timesteps)).square().mean((1, 2, 3))
        alpha = scheduler.alphas_cumprod[timesteps]
        snr = alpha / (1 - alpha)
        weights = ((snr.clamp(max=LARGEST_SNR) + 1) / (snr + 1)).to(DEVICE)
        caption_error = F.mse_loss(networks["caption_head"](text[:, -1]).float(), clean.flatten(1))
        return (weights * error).mean() + CAPTION_LOSS_WEIGHT * caption_error

    return fit(networks, loss, recipe, checkpoint, report)


def prompts(text: str) -> list[str]:
    return [" ".join(prompt.split()) for prompt in text.split(";")]


@torch.no_grad()
def draw(pipe: StableDiffusionPipeline, texts: list[str]) -> torch.Tensor:
    """One image for each text, shape (texts, 3, 64, 64), in [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(texts), models.LATENT_CHANNELS, 16, 16, generator=generator)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        images = pipe(
            texts,
            latents=noise.to(DEVICE),
            num_inference_steps=SAMPLING_STEPS,
            guidance_scale=GUIDANCE,
            output_type="pt",
        ).images
    return images.float().cpu() * 2 - 1


def save_grid(images: torch.Tensor, columns: int, file: Path) -> None:
    """``images`` (count, 3, height, width) in [-1, 1], row by row, as one PNG."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [torch.cat(list(row), dim=2) for row in images.split(columns)]
    pixels = ((torch.cat(rows, dim=1).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("out/emoji"), metavar="FOLDER")
    folder = parser.parse_args().output
    emoji = data.load(folder / "data")
    images = torch.stack([each.image for each in emoji]).float() / 127.5 - 1
    captions = [data.known_captions(each) for each in emoji]
    autoencoder = train_autoencoder(images, AUTOENCODER, folder)
    tokenizer = models.trained_tokenizer(caption for several in captions for caption in several)

    def report(step: int, averaged: nn.Module) -> None:
        pipe = models.pipeline(autoencoder, tokenizer, averaged)
        save_grid(draw(pipe, prompts(KNOWN_PROMPTS) + prompts(NEW_PROMPTS)), 8, folder / f"samples/{step:06}.png")
        models.save(pipe, folder / "pipeline")

    train_denoiser(encode(autoencoder, images), captions, tokenizer, DENOISER, folder / "denoiser.pt", report)


if __name__ == "__main__":
    main()
