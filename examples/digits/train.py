"""Trains the three networks of the digits task and writes them, in fp16, under ``weights/``.

    python examples/digits/train.py                        # everything
    python examples/digits/train.py --only classifier      # or class_conditional, or cross_attention

Prints the accuracy that the classifier reaches on the 360 held-out real digits, and, for each UNet, how many of 500
DDIM-20 samples the classifier reads as the digit that was asked for.
"""

from __future__ import annotations

import argparse
import time

import digits
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import trange

LABEL_DROP = 0.1  # share of labels replaced by "no label", so that guidance works
EMA_DECAY = 0.995
STEPS = {"class_conditional": 2600, "cross_attention": 1300}  # optimizer steps, batches of 128


def train_classifier(steps: int) -> None:
    images, labels = digits.real_digits()
    classifier = digits.Classifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in trange(steps, desc="classifier"):
        batch = torch.randint(digits.NUM_TRAIN, (128,))
        noisy = images[batch] + 0.2 * torch.randn(128, 1, 8, 8)
        shift_y, shift_x = torch.randint(-1, 2, (2,)).tolist()
        loss = F.cross_entropy(classifier(noisy.roll((shift_y, shift_x), (2, 3))), labels[batch], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    weights = {name: value.half() for name, value in classifier.state_dict().items()}
    digits.WEIGHTS.mkdir(exist_ok=True)
    save_file(weights, digits.WEIGHTS / "classifier.safetensors")
    with torch.no_grad():
        predicted = digits.load_classifier()(images[digits.NUM_TRAIN :]).argmax(1)
    accuracy = (predicted == labels[digits.NUM_TRAIN :]).float().mean().item()
    print(f"classifier: {accuracy:.1%} of the held-out real digits")


def train_unet(kind: str, steps: int) -> None:
    images, labels = digits.real_digits()
    scheduler = digits.noise_scheduler()
    unet = digits.new_unet(kind).to(memory_format=torch.channels_last)
    encoder = digits.LabelEncoder()
    networks = nn.ModuleDict({"unet": unet, "encoder": encoder})
    averaged = AveragedModel(networks, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
    optimizer = torch.optim.AdamW(networks.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    start = time.time()
    progress = trange(steps, desc=kind)
    for _ in progress:
        batch = torch.randint(digits.NUM_TRAIN, (128,))
        batch_labels = torch.where(torch.rand(128) < LABEL_DROP, digits.NULL_LABEL, labels[batch])
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (128,))
        noise = torch.randn(128, 1, 8, 8)
        noisy = scheduler.add_noise(images[batch], noise, timesteps)
        if kind == "class_conditional":
            prediction = unet(noisy, timesteps, class_labels=batch_labels).sample
        else:
            prediction = unet(noisy, timesteps, encoder_hidden_states=encoder(batch_labels)).sample
        loss = F.mse_loss(prediction, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        averaged.update_parameters(networks)
        progress.set_postfix(loss=f"{loss.item():.3f}")
    minutes = (time.time() - start) / 60

    trained = averaged.module
    trained["unet"].to(torch.float16).save_pretrained(digits.WEIGHTS / kind, variant="fp16")
    if kind == "cross_attention":
        weights = {name: value.half() for name, value in trained["encoder"].state_dict().items()}
        save_file(weights, digits.WEIGHTS / "label_encoder.safetensors")

    wanted = torch.arange(500) % digits.NUM_CLASSES
    generated = digits.sample(digits.load_unet(kind), digits.load_condition(kind), wanted, seed=0)
    with torch.no_grad():
        accuracy = (digits.load_classifier()(generated).argmax(1) == wanted).float().mean().item()
    print(f"{kind}: trained in {minutes:.1f} min; {accuracy:.1%} of 500 samples read as the digit asked for")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("classifier", *digits.UNETS))
    parser.add_argument("--steps", type=int, help="optimizer steps of each UNet")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.only in (None, "classifier"):
        train_classifier(steps=1500)
    for kind in digits.UNETS:
        if arguments.only in (None, kind):
            train_unet(kind, arguments.steps or STEPS[kind])


if __name__ == "__main__":
    main()
