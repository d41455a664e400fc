"""Text-to-image with the trained emoji pipeline: prompts, calibration data, images from equal noise, measures.

Nothing is downloaded: pipeline, judges and captions ship with the repository.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline

import dq_runtime
from dq_runtime.evaluation.metrics import frechet_distance, psnr, ssim
from examples.emoji import data, judges, models

PIPELINE = Path(__file__).parent / "pipeline"
GUIDANCE_SCALES = (1.0, 5.0)  # 1 means none
STEPS = 20
BATCH = 16  # prompts that are drawn together
LATENT_SHAPE = (models.LATENT_CHANNELS, 16, 16)

Images = Mapping[float, torch.Tensor]  # by guidance scale; [B, 3, 64, 64] in [-1, 1]


@dataclass(frozen=True)
class Prompts:
    """Known captions, one each of different emoji.

    Attributes:
        emoji: their numbers, in the order of ``data.descriptions``.
        captions: what the pipeline is asked for.
        others: for each, captions of other emoji that it is compared with (see ``judges.prompt_agreement``).
    """

    emoji: list[int]
    captions: list[str]
    others: list[list[str]]

    def __len__(self) -> int:
        return len(self.captions)


def prompts(evaluated: int, calibrated: int, seed: int) -> tuple[Prompts, list[str]]:
    """Prompts to draw, and others for calibration, of other emoji.

    Raises:
        ValueError: if there are fewer emoji than prompts.
    """
    captions = [data.known_captions(each) for each in data.descriptions()]
    if evaluated + calibrated > len(captions):
        raise ValueError(
            f"There are {len(captions)} emoji, fewer than {evaluated} + {calibrated} prompts: ask for fewer"
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(captions), generator=generator)[: evaluated + calibrated].tolist()
    draws = torch.rand(len(order), generator=generator).tolist()
    drawn = [captions[i][int(u * len(captions[i]))] for i, u in zip(order, draws, strict=True)]
    others = judges.other_captions(order[:evaluated], captions, generator)
    return Prompts(order[:evaluated], drawn[:evaluated], others), drawn[evaluated:]


def load_pipeline(folder: str | Path = PIPELINE) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def with_unet(pipe: StableDiffusionPipeline, unet: Any) -> StableDiffusionPipeline:
    """A pipeline with this UNet and the other parts of ``pipe``."""
    changed = copy.copy(pipe)
    changed.unet = unet
    return changed


def collect(pipe: StableDiffusionPipeline, captions: Sequence[str], seed: int) -> dq_runtime.CalibrationSet:
    """The UNet's calls while it draws the captions, an equal share at each guidance scale."""
    calls = []
    for guidance, chosen in zip(GUIDANCE_SCALES, (captions[::2], captions[1::2]), strict=True):
        for first in range(0, len(chosen), BATCH):
            batch = list(chosen[first : first + BATCH])
            noise = torch.randn(len(batch), *LATENT_SHAPE, generator=torch.Generator().manual_seed(seed + len(calls)))
            calls.append(
                {"prompt": batch, "latents": noise, "guidance_scale": guidance, "num_inference_steps": STEPS}
                | {"output_type": "latent"}
            )
    return dq_runtime.collect_from_pipeline(pipe, calls)


@torch.no_grad()
def draw(pipe: StableDiffusionPipeline, captions: Sequence[str], guidance: float, seed: int) -> torch.Tensor:
    """One image for each caption, [B, 3, 64, 64] in [-1, 1]. The same seed gives every pipeline the same noise."""
    noise = torch.randn(len(captions), *LATENT_SHAPE, generator=torch.Generator().manual_seed(seed))
    images = [
        pipe(
            list(captions[first : first + BATCH]), latents=noise[first : first + BATCH], guidance_scale=guidance,
            num_inference_steps=STEPS, output_type="pt",
        ).images
        for first in range(0, len(captions), BATCH)
    ]  # fmt: skip
    return torch.cat(images) * 2 - 1


def draw_all(pipe: StableDiffusionPipeline, captions: Sequence[str], seed: int) -> dict[float, torch.Tensor]:
    """Images at each guidance scale."""
    return {guidance: draw(pipe, captions, guidance, seed) for guidance in GUIDANCE_SCALES}


class Judge:
    """Both trained judges. Agreement and Fréchet distance are of the images of all guidance scales together."""

    def __init__(self) -> None:
        self.classifier, self.image_text = judges.load()

    def agreement(self, images: Images, asked: Prompts) -> float:
        """The share of images that are closest to their own prompt, among ``judges.CHOICES`` captions."""
        every = torch.cat(list(images.values()))
        times = len(images)
        return judges.prompt_agreement(self.image_text, every, asked.captions * times, asked.others * times)

    @torch.no_grad()
    def frechet(self, images: Images, asked: Prompts) -> float:
        """The Fréchet distance to the real images of the same emoji, in the classifier's features."""
        features = self.classifier.features(torch.cat(list(images.values())))
        return frechet_distance(features, self.classifier.real_features[asked.emoji])


def closeness(images: Images, reference: Images) -> dict[float, dict[str, float]]:
    """For each guidance scale, the mean PSNR (dB) and SSIM against a reference from the same noise."""
    return {
        guidance: {"psnr_db": float(psnr(drawn, reference[guidance]).mean()), "ssim": ssim(drawn, reference[guidance])}
        for guidance, drawn in images.items()
    }
