"""Two small models that judge drawn emoji: a classifier of their category, and a model that compares image and caption.

``train_judges.py`` trains them. Their weights and the emoji's descriptions ship with the repository: judging needs no
download.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from examples.emoji import data

CLASSIFIER, IMAGE_TEXT = (
    Path(__file__).parent / "judges" / f"{name}.safetensors" for name in ("classifier", "image_text")
)
FEATURES = 32  # of the classifier; the Fréchet distance needs many more images than features
EMBEDDING = 64
CHOICES = 32  # captions from which the image-text model picks


def image_encoder(outputs: int) -> nn.Sequential:
    """images [B, 3, 64, 64] in [-1, 1] -> [B, outputs]."""
    channels = (3, 16, 32, 64, 128)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(channels):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * channels[-1], 128), nn.SiLU(), nn.Linear(128, outputs))


class CategoryClassifier(nn.Module):
    """From images to the emoji's categories, in alphabetical order. ``real_features`` are those of the real images."""

    real_features: torch.Tensor

    def __init__(self, categories: int, real_images: int) -> None:
        super().__init__()
        self.encoder = image_encoder(FEATURES)
        self.head = nn.Linear(FEATURES, categories)
        self.register_buffer("real_features", torch.zeros(real_images, FEATURES))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """images [B, 3, 64, 64] in [-1, 1] -> [B, FEATURES]."""
        return F.silu(self.encoder(images))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images [B, 3, 64, 64] in [-1, 1] -> logits [B, categories]."""
        return self.head(self.features(images))


class ImageTextModel(nn.Module):
    """Images and captions as unit vectors, whose product is large if the caption describes the image.

    A caption is the mean of its words' vectors, in any order. Words that are not in ``vocabulary`` are left out.
    """

    def __init__(self, vocabulary: Sequence[str]) -> None:
        super().__init__()
        self.index = {word: i for i, word in enumerate(vocabulary)}
        self.image_encoder = image_encoder(EMBEDDING)
        self.words = nn.EmbeddingBag(len(vocabulary), EMBEDDING, mode="mean")
        self.text_head = nn.Sequential(
            nn.Linear(EMBEDDING, 2 * EMBEDDING), nn.SiLU(), nn.Linear(2 * EMBEDDING, EMBEDDING)
        )

    def of_images(self, images: torch.Tensor) -> torch.Tensor:
        """images [B, 3, 64, 64] in [-1, 1] -> [B, EMBEDDING]."""
        return F.normalize(self.image_encoder(images).float(), dim=1)

    def of_captions(self, captions: Sequence[str]) -> torch.Tensor:
        """[B, EMBEDDING]."""
        words = [[self.index[word] for word in caption_words(caption) if word in self.index] for caption in captions]
        device = self.words.weight.device
        offsets = torch.tensor([0, *map(len, words)], device=device).cumsum(0)[:-1]
        means = self.words(torch.tensor([*itertools.chain(*words)], dtype=torch.long, device=device), offsets)
        return F.normalize(self.text_head(means).float(), dim=1)


def caption_words(caption: str) -> list[str]:
    return re.findall("[a-z0-9]+", caption.lower())


def untrained(descriptions: Sequence[data.Description]) -> tuple[CategoryClassifier, ImageTextModel]:
    """Both judges for the emoji with these descriptions."""
    captions = [caption for each in descriptions for caption in data.known_captions(each)]
    vocabulary = sorted({word for caption in captions for word in caption_words(caption)})
    return CategoryClassifier(len(categories(descriptions)), len(descriptions)), ImageTextModel(vocabulary)


def categories(descriptions: Sequence[data.Description]) -> list[str]:
    """In alphabetical order, which is that of the classifier's outputs."""
    return sorted({each.category for each in descriptions})


def load() -> tuple[CategoryClassifier, ImageTextModel]:
    """The trained judges, in fp32."""
    judges = untrained(data.descriptions())
    for judge, file in zip(judges, (CLASSIFIER, IMAGE_TEXT), strict=True):
        judge.load_state_dict(load_file(file))
        judge.eval().requires_grad_(False)
    return judges


@torch.no_grad()
def prompt_agreement(
    judge: ImageTextModel, images: torch.Tensor, prompts: Sequence[str], others: Sequence[Sequence[str]]
) -> float:
    """The share of images that are closer to their own prompt than to each of the other captions.

    Args:
        images: [B, 3, 64, 64] in [-1, 1].
        prompts: of the images.
        others: captions of other emoji, for each image.
    """
    own = judge.of_captions(prompts)
    right = 0
    for embedding, its_own, captions in zip(judge.of_images(images), own, others, strict=True):
        right += bool((judge.of_captions(captions) @ embedding).max() < its_own @ embedding)
    return right / len(images)


def other_captions(
    wanted: Sequence[int], captions: Sequence[Sequence[str]], generator: torch.Generator
) -> list[list[str]]:
    """``CHOICES`` - 1 captions for each wanted emoji, one each of different other emoji.

    Args:
        wanted: indices of emoji.
        captions: those of each emoji, from which one is drawn.
    """
    drawn = []
    for emoji in wanted:
        order = [i for i in torch.randperm(len(captions), generator=generator).tolist() if i != emoji]
        chosen = [captions[i] for i in order[: CHOICES - 1]]
        draws = torch.rand(len(chosen), generator=generator).tolist()
        drawn.append([several[int(u * len(several))] for several, u in zip(chosen, draws, strict=True)])
    return drawn
