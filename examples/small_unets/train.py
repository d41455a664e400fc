"""Trains the tasks' classifiers and UNets and writes them, in fp16, under ``weights/``.

    python -m examples.small_unets.train                                     # everything
    python -m examples.small_unets.train --only photos/classifier photos     # these, in this order

Run it from the repository's root. For each classifier it prints the accuracy on held-out real images. For each UNet it
prints the share of 500 samples (DDIM, 20 steps) that the classifier assigns to the requested class.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import trange

from examples.small_unets.task import Task, condition
from examples.small_unets.tasks import TASKS

LABEL_DROP = 0.1  # share of labels replaced by "no label", for classifier-free guidance
CLASSIFIER_STEPS = {"digits/classifier": 1500, "photos/classifier": 1000}  # batches of 128
CLASSIFIERS = {f"{task.unet_folder.parent.name}/classifier": task for task in TASKS.values()}


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of a UNet's training. The saved weights are a moving average with decay ``ema_decay``."""

    steps: int
    batch_size: int = 128
    ema_decay: float = 0.995
    warmup_steps: int = 1
    largest_gradient: float = math.inf  # limit of the gradient norm over all parameters
    bf16: bool = False


RECIPES = {
    "digits/class_conditional": Recipe(steps=2600),
    "digits/cross_attention": Recipe(steps=1300),
    "photos": Recipe(steps=4500, batch_size=32, ema_decay=0.998, warmup_steps=100, largest_gradient=1.0, bf16=True),
}


def train_classifier(name: str) -> None:
    task, steps = CLASSIFIERS[name], CLASSIFIER_STEPS[name]
    images, labels = task.real_images()
    classifier = task.untrained_classifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in trange(steps, desc=name):
        batch = torch.randint(task.num_train, (128,))
        noisy = images[batch] + 0.2 * torch.randn(128, *task.image_shape)
        shift_y, shift_x = torch.randint(-1, 2, (2,)).tolist()
        loss = F.cross_entropy(classifier(noisy.roll((shift_y, shift_x), (2, 3))), labels[batch], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    task.classifier_file.parent.mkdir(parents=True, exist_ok=True)
    save_file(half(classifier), task.classifier_file)
    with torch.no_grad():
        predicted = task.classifier()(images[task.num_train :]).argmax(1)
    accuracy = (predicted == labels[task.num_train :]).float().mean().item()
    print(f"{name}: accuracy {accuracy:.1%} on held-out real images")


def train_unet(task: Task, recipe: Recipe) -> None:
    images, labels = task.real_images()
    scheduler = task.noise_scheduler()
    unet = task.untrained_unet()
    encoder = task.untrained_label_encoder() if task.untrained_label_encoder else None
    networks = nn.ModuleDict({"unet": unet} if encoder is None else {"unet": unet, "encoder": encoder})
    averaged = AveragedModel(networks, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema_decay))
    optimizer = torch.optim.AdamW(networks.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1, (step + 1) / recipe.warmup_steps) * (1 + math.cos(math.pi * step / recipe.steps)) / 2,
    )
    start = time.time()
    progress = trange(recipe.steps, desc=task.name)
    for _ in progress:
        batch = torch.randint(task.num_train, (recipe.batch_size,))
        batch_labels = torch.where(torch.rand(recipe.batch_size) < LABEL_DROP, task.null_label, labels[batch])
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (recipe.batch_size,))
        noise = torch.randn(recipe.batch_size, *task.image_shape)
        noisy = scheduler.add_noise(images[batch], noise, timesteps)
        # On CPUs the backward pass of attention is faster without flash attention.
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16), sdpa_kernel(SDPBackend.MATH):
            prediction = unet(noisy, timesteps, **condition(batch_labels, encoder)).sample
        velocity = task.prediction_type == "v_prediction"
        target = scheduler.get_velocity(images[batch], noise, timesteps) if velocity else noise
        loss = F.mse_loss(prediction.float(), target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(networks.parameters(), recipe.largest_gradient)
        optimizer.step()
        schedule.step()
        averaged.update_parameters(networks)
        progress.set_postfix(loss=f"{loss.item():.3f}")
    minutes = (time.time() - start) / 60

    trained = averaged.module
    trained["unet"].to(torch.float16).save_pretrained(task.unet_folder, variant="fp16")
    if encoder is not None:
        save_file(half(trained["encoder"]), task.label_encoder_file)
    accuracy = sample_accuracy(task, 500)
    print(f"{task.name}: trained in {minutes:.1f} min; {accuracy:.1%} of 500 samples show the requested class")


def half(network: nn.Module) -> dict[str, torch.Tensor]:
    """The network's weights in fp16."""
    return {name: value.half() for name, value in network.state_dict().items()}


@torch.no_grad()
def sample_accuracy(task: Task, count: int) -> float:
    """The share of the trained UNet's samples that the classifier assigns to the requested class."""
    wanted = task.labels(count)
    generated = task.sample(task.unet(), wanted, seed=0, progress=f"{task.name}, samples")
    return (task.classifier()(generated).argmax(1) == wanted).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = (*CLASSIFIERS, *TASKS)
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    for name in parser.parse_args().only:
        torch.manual_seed(0)
        if name in CLASSIFIERS:
            train_classifier(name)
        else:
            train_unet(TASKS[name], RECIPES[name])


if __name__ == "__main__":
    main()
