"""The small UNets, the files that ship with them, and the commands that documents name."""

import importlib.util
import json
import re
import socket
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

from examples.small_unets.tasks import TASKS

REPOSITORY = Path(__file__).parents[2]
SMALL_UNETS = REPOSITORY / "examples" / "small_unets"
NAMES = ("digits/class_conditional", "digits/cross_attention", "photos")
SHAPES = {"digits/class_conditional": (1, 8, 8), "digits/cross_attention": (1, 8, 8), "photos": (3, 24, 24)}
UNET_LIMIT, WEIGHTS_LIMIT = 6_000_000, 14 * 2**20  # bytes


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def test_every_task_is_tested_here():
    assert {name: task.image_shape for name, task in TASKS.items()} == SHAPES
    assert all(task.name == name for name, task in TASKS.items())


@pytest.mark.parametrize("name", NAMES)
def test_a_trained_unet_loads_in_fp32_with_finite_weights_of_the_right_shapes(name):
    unet = TASKS[name].unet()
    shipped, untrained = unet.state_dict(), TASKS[name].untrained_unet().state_dict()

    assert {name: tensor.shape for name, tensor in shipped.items()} == {n: t.shape for n, t in untrained.items()}
    assert {tensor.dtype for tensor in shipped.values()} == {torch.float32}
    assert all(bool(tensor.isfinite().all()) for tensor in shipped.values())
    assert not unet.training
    assert TASKS[name].unet(torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("name", NAMES)
def test_a_trained_unet_is_configured_as_an_untrained_one(name):
    shipped, untrained = (
        json.loads(unet.to_json_string()) for unet in (TASKS[name].unet(), TASKS[name].untrained_unet())
    )
    del shipped["_name_or_path"]

    assert shipped == untrained


@pytest.mark.parametrize(("name", "count"), [("digits/cross_attention", 1797), ("photos", 10_000)])
def test_the_real_images_are_complete(name, count):
    images, labels = TASKS[name].real_images()

    assert images.shape == (count, *SHAPES[name])
    assert images.dtype == torch.float32
    assert (images.min(), images.max()) == (-1, 1)
    assert labels.shape == (count,)
    assert labels.dtype == torch.int64
    assert labels.unique().tolist() == list(range(TASKS[name].num_classes))


def test_the_photos_are_cropped_the_same_way_each_time_and_never_downloaded(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a connection was opened")

    images, labels = TASKS["photos"].real_images()
    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    again, labels_again = TASKS["photos"].real_images.__wrapped__()  # bypasses the cache

    assert again is not images
    assert torch.equal(again, images)
    assert torch.equal(labels_again, labels)


@pytest.mark.parametrize(("name", "count", "accuracy"), [("digits/cross_attention", 360, 0.98), ("photos", 1000, 0.99)])
def test_a_classifier_recognizes_held_out_images(name, count, accuracy):
    task = TASKS[name]
    images, labels = (tensor[task.num_train :] for tensor in task.real_images())

    predicted = task.classifier()(images).argmax(1)

    assert len(predicted) == count
    assert (predicted == labels).float().mean() >= accuracy
    assert task.classifier().features(images[:2]).shape == (2, 64)


def test_the_photo_classifier_tolerates_some_noise():
    task = TASKS["photos"]
    images, labels = (tensor[task.num_train :] for tensor in task.real_images())
    noise = 0.1 * task.noise(len(images), seed=0)

    assert (task.classifier()(images + noise).argmax(1) == labels).float().mean() >= 0.98


def test_the_weights_are_small_enough_to_ship():
    files = [path for path in SMALL_UNETS.joinpath("weights").rglob("*") if path.is_file()]

    assert len(files) == 9
    assert sum(path.stat().st_size for path in files) < WEIGHTS_LIMIT
    for task in TASKS.values():
        (unet_file,) = task.unet_folder.glob("*.safetensors")
        assert unet_file.stat().st_size <= UNET_LIMIT


@pytest.mark.parametrize("name", NAMES)
def test_a_trained_unet_draws_the_requested_classes(name):
    task, labels = TASKS[name], TASKS[name].labels(60)
    images = task.sample(task.unet(), labels, seed=5, num_inference_steps=10)

    assert images.shape == (60, *SHAPES[name])
    assert images.dtype == torch.float32
    assert images.min() >= -1
    assert images.max() <= 1
    assert (task.classifier()(images).argmax(1) == labels).float().mean() > 0.9
    assert images[:10].std(0).mean() > 0.2  # the ten classes differ
    assert images[:: task.num_classes].std(0).mean() > 0.1  # and so do the images of a class


@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler])
def test_other_schedulers_draw_the_requested_classes(scheduler_class):
    task = TASKS["digits/class_conditional"]
    scheduler = scheduler_class.from_config(task.noise_scheduler().config, timestep_spacing="leading")
    labels = task.labels(20)

    images = task.sample(task.unet(), labels, seed=3, num_inference_steps=15, scheduler=scheduler)

    assert (task.classifier()(images).argmax(1) == labels).float().mean() > 0.8


def test_a_seed_fixes_the_noise_that_a_scheduler_adds():
    task, labels = TASKS["digits/class_conditional"], torch.tensor([3, 1, 4])
    unet, scheduler = task.unet(), DDPMScheduler.from_config(task.noise_scheduler().config)

    first, again, other = (
        task.sample(unet, labels, seed, num_inference_steps=2, scheduler=scheduler, batch_size=2) for seed in (0, 0, 1)
    )

    assert torch.equal(first, again)
    assert (first - other).abs().max() > 0.1


def test_a_seed_fixes_the_noise_for_every_batch_size():
    task, labels = TASKS[NAMES[0]], torch.tensor([3, 1, 4])
    unet = task.unet()

    def draw(seed, batch_size):
        return task.sample(unet, labels, seed, num_inference_steps=2, batch_size=batch_size)

    torch.testing.assert_close(draw(0, batch_size=2), draw(0, batch_size=3), rtol=0, atol=1e-4)  # another order of sums
    assert (draw(0, batch_size=3) - draw(1, batch_size=3)).abs().max() > 0.1


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_bf16_unet_draws_nearly_the_same_images(name):
    task, labels = TASKS[name], torch.tensor([3, 1, 4])
    fp32, bf16 = (
        task.sample(task.unet(dtype), labels, seed=0, num_inference_steps=2)
        for dtype in (torch.float32, torch.bfloat16)
    )

    assert bf16.dtype == torch.float32
    assert 0 < (bf16 - fp32).square().mean().sqrt() < 0.05


def test_the_documented_commands_exist():
    documents = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "docs/measurements.md", ".ci/run")]
    text = "\n".join(path.read_text() for path in documents)
    makefile = (REPOSITORY / "Makefile").read_text()
    commands = set(re.findall(r"(?:^|`)make ([a-z][\w-]*)", text, re.MULTILINE))
    targets = set(re.findall(r"^([a-z][\w-]*):", makefile, re.MULTILINE))
    phony = set(re.findall(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)[0].split())

    assert {"demo", "test"} <= commands <= targets
    assert phony <= targets
    for script in set(re.findall(r"\b(?:examples|benchmarks)/[\w/]+\.py\b", text + makefile)):
        assert (REPOSITORY / script).is_file(), script
    modules = set(re.findall(r"-m (examples[\w.]+)", text + makefile))
    assert {"examples.emoji.demo", "examples.small_unets.train"} <= modules
    assert all(importlib.util.find_spec(module) for module in modules)
