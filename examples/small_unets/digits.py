"""Handwritten digits: the 1 797 images of 8x8 pixels that scikit-learn ships, and two kinds of UNet that draw them.

- ``digits/class_conditional``: a ``UNet2DModel`` that takes the digit as ``class_labels``;
- ``digits/cross_attention``: a ``UNet2DConditionModel`` that reads the digit as four learned tokens through
  cross-attention.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel, UNet2DModel
from sklearn.datasets import load_digits
from torch import nn

from examples.small_unets.task import WEIGHTS, Classifier, Task

NUM_CLASSES = 10


@functools.cache
def real_images() -> tuple[torch.Tensor, torch.Tensor]:
    """Returns images [1797, 1, 8, 8], fp32 in [-1, 1], and labels [1797], int64."""
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().unsqueeze(1) / 8 - 1
    return images, torch.from_numpy(bunch.target).long()


class LabelEncoder(nn.Module):
    """Replaces a text encoder: maps each label to four learned tokens of 64 channels."""

    num_tokens = 4
    channels = 64

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_CLASSES + 1, self.num_tokens * self.channels)

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        """labels [B] int64 -> tokens [B, 4, 64]."""
        return self.embedding(labels).unflatten(-1, (self.num_tokens, self.channels))


class DigitClassifier(Classifier):
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


def class_conditional_unet() -> UNet2DModel:
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


def cross_attention_unet() -> UNet2DConditionModel:
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


CLASS_CONDITIONAL = Task(
    name="digits/class_conditional",
    image_shape=(1, 8, 8),
    num_classes=NUM_CLASSES,
    num_train=1437,
    unet_folder=WEIGHTS / "digits" / "class_conditional",
    real_images=real_images,
    untrained_unet=class_conditional_unet,
    untrained_classifier=DigitClassifier,
)
CROSS_ATTENTION = Task(
    name="digits/cross_attention",
    image_shape=(1, 8, 8),
    num_classes=NUM_CLASSES,
    num_train=1437,
    unet_folder=WEIGHTS / "digits" / "cross_attention",
    real_images=real_images,
    untrained_unet=cross_attention_unet,
    untrained_classifier=DigitClassifier,
    untrained_label_encoder=LabelEncoder,
)
