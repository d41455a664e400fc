"""A small task: real labelled images, a UNet and a classifier trained on them, and the sampling loop.

``digits.py`` and ``photos.py`` define the tasks, ``tasks.py`` lists them, ``train.py`` trains their weights.
"""

from __future__ import annotations

import functools
import inspect
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, ModelMixin
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

WEIGHTS = Path(__file__).parent / "weights"


class Classifier(nn.Module):
    """A convolutional classifier that evaluates generated images. The Fréchet distance uses its features."""

    fc2: nn.Linear

    @abstractmethod
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """images [B, C, H, W] -> features [B, 64]."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images [B, C, H, W] -> logits [B, num_classes]."""
        return self.fc2(self.features(images))


@dataclass(frozen=True)
class Task:
    """Class-conditional image generation, small enough for a CPU.

    Attributes:
        image_shape: (C, H, W).
        num_classes: labels are 0 to ``num_classes`` - 1; ``null_label`` stands for "no label".
        num_train: the number of real images for training, the first ones; the others are held out.
        unet_folder: the folder of the trained UNet. The files of its classifier and its label encoder are beside it.
        real_images: returns all real images [N, C, H, W], fp32 in [-1, 1], and their labels [N], int64.
        untrained_unet: creates a ``UNet2DModel``, or a ``UNet2DConditionModel`` if the task has a label encoder.
        untrained_classifier: creates the classifier.
        untrained_label_encoder: creates the encoder from labels [B] to tokens [B, T, D], the input of the UNet's
            cross-attention; None if the UNet takes the labels directly.
        prediction_type: the UNet's prediction target in diffusers' terms, "epsilon" or "v_prediction".
    """

    name: str
    image_shape: tuple[int, int, int]
    num_classes: int
    num_train: int
    unet_folder: Path
    real_images: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    untrained_unet: Callable[[], ModelMixin]
    untrained_classifier: Callable[[], Classifier]
    untrained_label_encoder: Callable[[], nn.Module] | None = None
    prediction_type: str = "epsilon"

    @property
    def null_label(self) -> int:
        return self.num_classes

    @property
    def classifier_file(self) -> Path:
        return self.unet_folder.parent / "classifier.safetensors"

    @property
    def label_encoder_file(self) -> Path:
        return self.unet_folder.parent / "label_encoder.safetensors"

    def unet(self, dtype: torch.dtype = torch.float32) -> ModelMixin:
        """Loads the trained UNet from its fp16 weights."""
        unet_class = type(self.untrained_unet())
        return unet_class.from_pretrained(self.unet_folder, variant="fp16", torch_dtype=dtype).eval()

    def classifier(self) -> Classifier:
        """Loads the trained classifier in fp32."""
        classifier = self.untrained_classifier()
        classifier.load_state_dict(load_file(self.classifier_file))
        return classifier.eval()

    @functools.cached_property
    def label_encoder(self) -> nn.Module | None:
        """The trained label encoder, in fp32; None if the UNet takes the labels directly."""
        if self.untrained_label_encoder is None:
            return None
        encoder = self.untrained_label_encoder()
        encoder.load_state_dict(load_file(self.label_encoder_file))
        return encoder.eval().requires_grad_(False)

    def condition(self, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """labels [B] int64 -> keyword arguments of the UNet's forward."""
        return condition(labels, self.label_encoder)

    def noise_scheduler(self) -> DDIMScheduler:
        """The noise schedule that the UNet was trained with."""
        return DDIMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=True, prediction_type=self.prediction_type)

    def labels(self, count: int) -> torch.Tensor:
        """Labels that cycle through all classes: [count] int64."""
        return torch.arange(count) % self.num_classes

    def noise(self, count: int, seed: int) -> torch.Tensor:
        """Standard normal noise [count, C, H, W], fp32."""
        return torch.randn(count, *self.image_shape, generator=torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def sample(
        self,
        unet: ModelMixin,
        labels: torch.Tensor,
        seed: int,
        num_inference_steps: int = 20,
        scheduler: Any = None,
        batch_size: int = 100,
        progress: str | None = None,
    ) -> torch.Tensor:
        """Draws one image per label. The same seed gives every model the same noise.

        Args:
            labels: [B] int64.
            scheduler: ``noise_scheduler()`` by default. Create other diffusers schedulers from its ``config`` with
                ``timestep_spacing="leading"``: at timestep 999 the signal level is nearly zero, and schedulers without
                ``clip_sample`` divide by it. The noise that a stochastic scheduler adds also depends on ``batch_size``.
            progress: the title of a progress bar; None shows no bar.

        Returns:
            images [B, C, H, W] fp32 in [-1, 1].
        """
        scheduler = scheduler or self.noise_scheduler()
        options = {}
        if "generator" in inspect.signature(scheduler.step).parameters:
            options["generator"] = torch.Generator().manual_seed(seed + 1)  # differs from the seed of the initial noise
        images = []
        batches = list(zip(self.noise(len(labels), seed).split(batch_size), labels.split(batch_size), strict=True))
        bar = tqdm(total=len(batches) * num_inference_steps, desc=progress, disable=progress is None)
        for batch, batch_labels in batches:
            arguments = {name: value.to(unet.dtype) if value.is_floating_point() else value
                         for name, value in self.condition(batch_labels).items()}  # fmt: skip
            scheduler.set_timesteps(num_inference_steps)
            batch = batch * scheduler.init_noise_sigma
            for timestep in scheduler.timesteps:
                scaled = scheduler.scale_model_input(batch, timestep).to(unet.dtype)
                prediction = unet(scaled, timestep, **arguments).sample.float()
                batch = scheduler.step(prediction, timestep, batch, **options).prev_sample
                bar.update()
            images.append(batch.clamp(-1, 1))
        bar.close()
        return torch.cat(images)


def condition(labels: torch.Tensor, label_encoder: nn.Module | None) -> dict[str, torch.Tensor]:
    """labels [B] int64 -> keyword arguments of a UNet with this label encoder, or with none."""
    if label_encoder is None:
        return {"class_labels": labels}
    return {"encoder_hidden_states": label_encoder(labels)}
