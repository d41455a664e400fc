"""Trains the judges of drawn emoji, after ``train.py`` has trained the pipeline.

    python -m examples.emoji.train_judges                   # a stopped run continues behind its last checkpoint

Run it from the repository's root; it needs npm for the images. It writes ``judges/classifier.safetensors``,
``judges/image_text.safetensors`` (both fp16) and ``descriptions.json`` beside this file, and prints both judges'
accuracies. Training images are the real ones, and those that the pipeline's autoencoder decodes from their latents and
some noise; all are distorted at random. No image of another artist is seen, and each emoji is in the training: the
judges know these emoji and no others.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import nn

from examples.emoji import data, judges
from examples.emoji.train import DEVICE, Recipe, encode, fit

PIPELINE = Path(__file__).parent / "pipeline"
JUDGES = Recipe(steps=1500, batch_size=96, learning_rate=2e-3, ema_decay=0.99)
LATENT_NOISE = (0.0, 0.1, 0.2, 0.3)  # standard deviations; latents have a standard deviation of 1
SHARPNESS = 20.0  # factor of the embeddings' products
LARGEST_SHIFT, LARGEST_SCALING, LARGEST_ROTATION = 0.15, 0.15, 0.2  # of half the image, of 1, in radians
LARGEST_COLOUR_CHANGE = 0.1  # of the distance from white
LARGEST_NOISE = 0.1
HELD_OUT_SEED = 10**6  # no step of the training has it


@torch.no_grad()
def decoded(
    autoencoder: AutoencoderKL, latents: torch.Tensor, noise: float, generator: torch.Generator
) -> torch.Tensor:
    """Images [B, 3, 64, 64] of ``latents`` [B, 4, 16, 16] with noise of this standard deviation."""
    noisy = latents + noise * torch.randn(latents.shape, generator=generator).to(latents.device)
    return torch.cat([autoencoder.decode(part).sample.clamp(-1, 1) for part in noisy.split(64)])


def distorted(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The images [B, 3, H, W] on white, each shifted, scaled, rotated, tinted and made noisy at random."""

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(len(images), *shape, generator=generator) * 2 - 1

    angle, scale = LARGEST_ROTATION * uniform(), 1 + LARGEST_SCALING * uniform()
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(-1, 2, 2)
    transform = torch.cat([scale[:, None, None] * rotation, LARGEST_SHIFT * uniform(2, 1)], dim=2).to(images.device)
    grid = F.affine_grid(transform, list(images.shape), align_corners=False)
    below_white = F.grid_sample(1 - images, grid, align_corners=False)
    below_white = below_white * (1 + LARGEST_COLOUR_CHANGE * uniform(3, 1, 1)).to(images.device)
    noise = torch.randn(images.shape, generator=generator) * (LARGEST_NOISE * uniform(1, 1, 1).abs())
    return (1 - below_white + noise.to(images.device)).clamp(-1, 1)


def train(
    pool: torch.Tensor, descriptions: Sequence[data.Description], recipe: Recipe, checkpoint: Path
) -> tuple[judges.CategoryClassifier, judges.ImageTextModel]:
    """``pool`` has several images of each emoji, [emoji, several, 3, 64, 64]. Returns both judges."""
    torch.manual_seed(2)
    classifier, image_text = judges.untrained(descriptions)
    networks = nn.ModuleDict({"classifier": classifier, "image_text": image_text}).to(DEVICE)
    names = judges.categories(descriptions)
    labels = torch.tensor([names.index(each.category) for each in descriptions], device=DEVICE)
    captions = [data.known_captions(each) for each in descriptions]

    def loss(generator: torch.Generator) -> torch.Tensor:
        chosen = torch.randperm(len(pool), generator=generator)[: recipe.batch_size]
        which = torch.randint(pool.shape[1], (len(chosen),), generator=generator)
        images = distorted(pool[chosen, which], generator).to(DEVICE)
        draws = torch.rand(len(chosen), generator=generator).tolist()
        texts = [captions[i][int(u * len(captions[i]))] for i, u in zip(chosen.tolist(), draws, strict=True)]
        products = SHARPNESS * image_text.of_images(images) @ image_text.of_captions(texts).T
        own = torch.arange(len(chosen), device=DEVICE)
        matching = (F.cross_entropy(products, own) + F.cross_entropy(products.T, own)) / 2
        return matching + F.cross_entropy(classifier(images).float(), labels[chosen.to(DEVICE)], label_smoothing=0.05)

    trained = fit(networks, loss, recipe, checkpoint).eval()
    return trained["classifier"], trained["image_text"]


@torch.no_grad()
def accuracies(
    classifier: judges.CategoryClassifier,
    image_text: judges.ImageTextModel,
    images: torch.Tensor,
    descriptions: Sequence[data.Description],
) -> tuple[float, float, float]:
    """On one image of each emoji: of the category, of known captions, and of those that were held out of training."""
    names = judges.categories(descriptions)
    labels = torch.tensor([names.index(each.category) for each in descriptions])
    category = (classifier(images).argmax(1).cpu() == labels).float().mean().item()
    generator = torch.Generator().manual_seed(HELD_OUT_SEED)
    known = [data.known_captions(each) for each in descriptions]
    held_out = [data.held_out_caption(each) for each in descriptions]
    several = [i for i, caption in enumerate(held_out) if caption is not None]
    every, new = range(len(descriptions)), [[caption] for caption in held_out if caption is not None]
    return (
        category,
        judges.prompt_agreement(
            image_text, images, [each[0] for each in known], judges.other_captions(every, known, generator)
        ),
        judges.prompt_agreement(
            image_text, images[several], [caption for (caption,) in new],
            judges.other_captions(range(len(new)), new, generator),
        ),
    )  # fmt: skip


def save(file: Path, judge: nn.Module) -> None:
    file.parent.mkdir(exist_ok=True)
    save_file({name: tensor.half().contiguous().cpu() for name, tensor in judge.state_dict().items()}, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("out/emoji"), metavar="FOLDER", help="of the checkpoint")
    folder = parser.parse_args().output
    emoji = data.load(folder / "data")
    data.write_descriptions(emoji)
    images = torch.stack([each.image for each in emoji]).float() / 127.5 - 1
    autoencoder = AutoencoderKL.from_pretrained(PIPELINE, subfolder="vae").to(DEVICE).eval()
    latents, generator = encode(autoencoder, images), torch.Generator().manual_seed(HELD_OUT_SEED)
    unseen = distorted(decoded(autoencoder, latents, 0.2, generator), generator)
    pool = [decoded(autoencoder, latents, noise, generator).cpu() for noise in LATENT_NOISE]
    trained = train(torch.stack([images, *pool], dim=1), emoji, JUDGES, folder / "judges.pt")
    with torch.no_grad():
        trained[0].real_features.copy_(trained[0].features(images.to(DEVICE)))
    for file, judge in zip((judges.CLASSIFIER, judges.IMAGE_TEXT), trained, strict=True):
        save(file, judge)
    loaded = judges.load()
    for title, shown in (("real images", images), ("decoded and distorted as none in training", unseen.cpu())):
        category, known, held_out = accuracies(*loaded, shown, emoji)
        print(
            f"{title}: category {category:.1%}; own caption among {judges.CHOICES} {known:.1%}, held out {held_out:.1%}"
        )


if __name__ == "__main__":
    main()
