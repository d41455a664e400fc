"""The digits task: real images, the trained models that ship beside this file, and how to sample from them.

Images are scikit-learn's bundled 8x8 handwritten digits (1 797 of them), scaled to [-1, 1]. Three networks were
trained on them by ``train.py`` and are stored under ``weights/``:

- ``class_conditional``: a ``UNet2DModel`` that takes the digit as ``class_labels``;
- ``cross_attention``: a ``UNet2DConditionModel`` that reads the digit as four learned tokens through cross-attention
  (``label_encoder.safetensors``);
- ``classifier.safetensors``: a small convolutional classifier, the judge of the generated images.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, ModelMixin, UNet2DConditionModel, UNet2DModel
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import nn

WEIGHTS = Path(__file__).parent / "weights"
NUM_CLASSES = 10
NULL_LABEL = NUM_CLASSES  # the label that stands for "no label"
NUM_TRAIN = 1437  # the first 1 437 images train, the last 360 test
UNETS = ("class_conditional", "cross_attention")

Condition = Callable[[torch.Tensor], dict[str, torch.Tensor]]


def real_digits() -> tuple[torch.Tensor, torch.Tensor]:
    """All real digits.

    Returns:
        images [1797, 1, 8, 8] fp32 in [-1, 1], and their labels [1797] int64.
    """
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().unsqueeze(1) / 8 - 1
    return images, torch.from_numpy(bunch.target).long()


def noise_scheduler() -> DDIMScheduler:
    """The noise schedule that the UNets were trained with."""
    return DDIMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=True)


class LabelEncoder(nn.Module):
    """Stands in for a text encoder: a label becomes four learned tokens of 64 channels."""

    num_tokens = 4
    channels = 64

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_CLASSES + 1, self.num_tokens * self.channels)

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        """labels [B] int64 -> tokens [B, 4, 64]."""
        return self.embedding(labels).unflatten(-1, (self.num_tokens, self.channels))


class Classifier(nn.Module):
    """A small convolutional classifier; its penultimate features measure the Fréchet distance."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.fc1 = nn.Linear(64 * 16, 64)
        self.fc2 = nn.Linear(64, NUM_CLASSES)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """images [B, 1, 8, 8] -> features [B, 64]."""
        x = F.relu(self.conv1(images))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return F.relu(self.fc1(x.flatten(1)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images [B, 1, 8, 8] -> logits [B, 10]."""
        return self.fc2(self.features(images))


def new_unet(kind: str) -> UNet2DModel | UNet2DConditionModel:
    """An untrained UNet of one of the two kinds in ``UNETS``."""
    if kind == "class_conditional":
        return UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(32, 64, 96),
            down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            attention_head_dim=32,
            norm_num_groups=32,
            num_class_embeds=NUM_CLASSES + 1,
        )
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(64, 64, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        norm_num_groups=32,
        cross_attention_dim=LabelEncoder.channels,
    )


def load_unet(kind: str, dtype: torch.dtype = torch.float32) -> UNet2DModel | UNet2DConditionModel:
    """A trained UNet, from its fp16 weights."""
    model_class = UNet2DModel if kind == "class_conditional" else UNet2DConditionModel
    return model_class.from_pretrained(WEIGHTS / kind, variant="fp16", torch_dtype=dtype).eval()


def load_classifier() -> Classifier:
    """The trained classifier, in fp32."""
    classifier = Classifier()
    classifier.load_state_dict(load_file(WEIGHTS / "classifier.safetensors"))
    return classifier.eval()


def load_condition(kind: str) -> Condition:
    """How labels [B] become the keyword arguments with which a UNet of this kind is called."""
    if kind == "class_conditional":
        return lambda labels: {"class_labels": labels}
    encoder = LabelEncoder()
    encoder.load_state_dict(load_file(WEIGHTS / "label_encoder.safetensors"))
    return lambda labels: {"encoder_hidden_states": encoder(labels).detach()}


@torch.no_grad()
def sample(
    unet: ModelMixin,
    condition: Condition,
    labels: torch.Tensor,
    seed: int,
    num_inference_steps: int = 20,
    batch_size: int = 100,
) -> torch.Tensor:
    """Draws one digit per label with DDIM; the same seed gives every model the same noise.

    Args:
        labels: [B] int64.

    Returns:
        images [B, 1, 8, 8] fp32 in [-1, 1].
    """
    scheduler = noise_scheduler()
    scheduler.set_timesteps(num_inference_steps)
    noise = torch.randn(len(labels), 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    images = []
    for batch, batch_labels in zip(noise.split(batch_size), labels.split(batch_size), strict=True):
        arguments = {name: value.to(unet.dtype) if value.is_floating_point() else value
                     for name, value in condition(batch_labels).items()}  # fmt: skip
        for timestep in scheduler.timesteps:
            prediction = unet(batch.to(unet.dtype), timestep, **arguments).sample.float()
            batch = scheduler.step(prediction, timestep, batch).prev_sample
        images.append(batch.clamp(-1, 1))
    return torch.cat(images)
