"""Photographs: 24x24 RGB crops of ten pictures that scikit-learn and scikit-image ship. The class is the picture.

Every crop is a random square window, scaled down. Half of the crops are mirrored. Training and held-out crops come from
the same pictures and overlap. They test whether a model has learned these pictures, not whether it generalizes.
"""

from __future__ import annotations

import functools
from importlib.resources import as_file, files

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from PIL import Image
from torch import nn
from tqdm import tqdm

from examples.small_unets.task import WEIGHTS, Classifier, Task

PHOTOS = (  # package and file of each label, in order
    ("sklearn.datasets", "images/china.jpg"),
    ("sklearn.datasets", "images/flower.jpg"),
    ("skimage", "data/astronaut.png"),
    ("skimage", "data/chelsea.png"),
    ("skimage", "data/coffee.png"),
    ("skimage", "data/hubble_deep_field.jpg"),
    ("skimage", "data/ihc.png"),
    ("skimage", "data/motorcycle_left.png"),
    ("skimage", "data/retina.jpg"),
    ("skimage", "data/rocket.jpg"),
)
SIZE = 24
NUM_TRAIN, NUM_HELD_OUT = 9000, 1000
SMALLEST_WINDOW, LARGEST_WINDOW = 0.3, 0.6  # relative to the picture's shorter side
LARGEST_PHOTO = 500  # pixels; a longer shorter side is scaled to SHORTER_SIDE before cropping, for speed
SHORTER_SIDE = 400


def load_photo(package: str, file: str) -> Image.Image:
    """Loads one RGB picture from the installed package. Nothing is downloaded."""
    with as_file(files(package).joinpath(file)) as path, Image.open(path) as picture:
        photo = picture.convert("RGB")
    if min(photo.size) <= LARGEST_PHOTO:
        return photo
    scale = SHORTER_SIDE / min(photo.size)
    return photo.resize((round(photo.width * scale), round(photo.height * scale)), Image.Resampling.BOX)


@functools.cache
def real_images() -> tuple[torch.Tensor, torch.Tensor]:
    """Returns images [10000, 3, 24, 24], fp32 in [-1, 1], and labels [10000], int64. They are the same in every run."""
    random = np.random.default_rng(0)
    photos = [load_photo(*photo) for photo in PHOTOS]
    labels = torch.arange(NUM_TRAIN + NUM_HELD_OUT) % len(photos)
    crops = np.stack([crop(photos[label], random) for label in tqdm(labels.tolist(), desc="Cropping photographs")])
    return torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 127.5 - 1, labels


def crop(photo: Image.Image, random: np.random.Generator) -> np.ndarray:
    """A random window of the picture, [24, 24, 3] uint8. Each pixel is the mean of the area that it covers."""
    side = min(photo.size) * random.uniform(SMALLEST_WINDOW, LARGEST_WINDOW)
    left, top = random.uniform(0, photo.width - side), random.uniform(0, photo.height - side)
    box = (left, top, left + side, top + side)
    pixels = np.asarray(photo.resize((SIZE, SIZE), Image.Resampling.BOX, box))
    return pixels[:, ::-1] if random.random() < 0.5 else pixels


class PhotoClassifier(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.conv3 = nn.Conv2d(64, 64, 3, padding=1)
        self.fc1 = nn.Linear(64 * 9, 64)
        self.fc2 = nn.Linear(64, len(PHOTOS))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """images [B, 3, 24, 24] -> features [B, 64]."""
        x = images
        for convolution in (self.conv1, self.conv2, self.conv3):
            x = F.max_pool2d(F.relu(convolution(x)), 2)
        return F.relu(self.fc1(x.flatten(1)))


def unet() -> UNet2DModel:
    """A UNet with three resolutions (24, 12, 6) and attention at the lower two."""
    return UNet2DModel(
        sample_size=SIZE,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(32, 64, 128),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
        norm_num_groups=8,
        num_class_embeds=len(PHOTOS) + 1,
    )


PHOTO_CROPS = Task(
    name="photos",
    image_shape=(3, SIZE, SIZE),
    num_classes=len(PHOTOS),
    num_train=NUM_TRAIN,
    unet_folder=WEIGHTS / "photos" / "unet",
    real_images=real_images,
    untrained_unet=unet,
    untrained_classifier=PhotoClassifier,
    prediction_type="v_prediction",  # at pure noise it asks for the mean image: colours are learned early
)
