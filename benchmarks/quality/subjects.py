"""What ``compare.py`` measures on, in one form: the small UNets with labels, and the emoji pipeline with prompts."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch

import dq_runtime
from benchmarks.quality import study
from dq_runtime.evaluation.metrics import frechet_distance
from examples.emoji import task as emoji
from examples.small_unets.task import Task
from examples.small_unets.tasks import TASKS


class LabelledImages:
    """A small UNet that draws images of labels.

    Attributes:
        calibration_samples: images that are drawn for calibration.
        sets: numbers of sets of images that ``draw`` returns one after the other.
    """

    calibration_samples = study.CALIBRATION_SAMPLES
    sets = 1

    def __init__(self, task: Task) -> None:
        self.task = task

    def unet(self) -> Any:
        return self.task.unet()

    def collect(self, unet: Any, images: int, seed: int) -> dq_runtime.CalibrationSet:
        """A seed's calibration set. It shares nothing with the ``images`` that ``draw`` returns for the seed."""
        return study.collect(self.task, unet, seed)

    def draw(self, unet: Any, images: int, seed: int) -> torch.Tensor:
        """[sets * images, C, H, W] in [-1, 1]; the same noise for every UNet."""
        return self.task.sample(unet, self.task.labels(images), study.FIRST_IMAGE_SEED + seed, study.STEPS)

    @torch.no_grad()
    def accuracy(self, drawn: torch.Tensor, seed: int) -> float:
        """The share of a seed's images that show what was asked for."""
        return (self.task.classifier()(drawn).argmax(1) == self.task.labels(len(drawn))).float().mean().item()

    @torch.no_grad()
    def frechet(self, drawn: torch.Tensor, seed: int) -> float:
        """The Fréchet distance to the real images."""
        features = self.task.classifier().features
        return frechet_distance(features(drawn), features(self.task.real_images()[0]))


class Emoji:
    """The emoji pipeline: a set of images at each guidance scale, 1 and 5, for the same prompts and noise."""

    calibration_samples = 64
    sets = len(emoji.GUIDANCE_SCALES)

    @cached_property
    def pipeline(self) -> Any:
        return emoji.load_pipeline()

    def unet(self) -> Any:
        return self.pipeline.unet

    def collect(self, unet: Any, images: int, seed: int) -> dq_runtime.CalibrationSet:
        _, captions = emoji.prompts(images, self.calibration_samples, seed)
        return emoji.collect(emoji.with_unet(self.pipeline, unet), captions, seed)

    def draw(self, unet: Any, images: int, seed: int) -> torch.Tensor:
        asked, _ = emoji.prompts(images, self.calibration_samples, seed)
        pipe = emoji.with_unet(self.pipeline, unet)
        return torch.cat(list(emoji.draw_all(pipe, asked.captions, study.FIRST_IMAGE_SEED + seed).values()))

    def accuracy(self, drawn: torch.Tensor, seed: int) -> float:
        return emoji.Judge().agreement(*self._judged(drawn, seed))

    def frechet(self, drawn: torch.Tensor, seed: int) -> float:
        """The Fréchet distance to the real images of the same emoji."""
        return emoji.Judge().frechet(*self._judged(drawn, seed))

    def _judged(self, drawn: torch.Tensor, seed: int) -> tuple[dict[float, torch.Tensor], emoji.Prompts]:
        images = len(drawn) // self.sets
        asked, _ = emoji.prompts(images, self.calibration_samples, seed)
        return dict(zip(emoji.GUIDANCE_SCALES, drawn.split(images), strict=True)), asked


SUBJECTS: dict[str, LabelledImages | Emoji] = {name: LabelledImages(task) for name, task in TASKS.items()}
SUBJECTS["emoji"] = Emoji()
