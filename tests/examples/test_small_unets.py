"""The small UNets, the files that ship with them, and the demo's report."""

import copy
import datetime
import importlib.util
import json
import os
import platform
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

import dq_runtime
from examples.small_unets import demo
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


def report_row(**values):
    row = {
        "model": "fp32",
        "label_accuracy": 0.9875,
        "psnr_db": None,
        "ssim": None,
        "frechet": 12.3456,
        "unet_mb_fp16": 4.25,
        "unet_mb": 8.5,
        "checkpoint_mb": 4.26,
        "cpu_prepacked_mb": 2.0,
        "seconds_per_image": 0.01234,
        "calibration_seconds": None,
        "not in the table": 1,
    }
    return row | values


def test_print_table_aligns_its_columns(capsys):
    demo.print_table(
        [
            report_row(),
            report_row(model="INT4 W4A8", psnr_db=31.45, ssim=0.98765, unet_mb=1.5, calibration_seconds=71.6),
        ],
        {"bf16": "too slow"},
    )

    header, *lines, left_out = capsys.readouterr().out.splitlines()
    assert left_out == "bf16: left out, too slow"
    titles = re.split(r" {2,}", header.strip())
    assert titles == [name for name, _ in demo.COLUMNS]
    starts = [re.search(rf"\b{title}\b", header).start() for title in titles]
    table = [[line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)] for line in lines]
    assert table == [
        ["fp32", "98.8%", "-", "-", "12.35", "4.25", "8.50", "4.26", "2.00", "0.0123", "-"],
        ["INT4 W4A8", "98.8%", "31.4", "0.988", "12.35", "4.25", "1.50", "4.26", "2.00", "0.0123", "72"],
    ]


def test_the_report_states_its_date_device_and_versions():
    environment = demo.environment()

    assert json.loads(json.dumps(environment)) == environment
    assert datetime.date.fromisoformat(environment["date"])
    assert environment["torch"] == torch.__version__
    assert {"cores", "device", "python", "torch", "triton", "diffusers", "dq-runtime"} <= environment.keys()


def test_bf16_is_left_out_with_a_reason_if_it_is_many_times_slower_than_fp32(monkeypatch):
    task = TASKS["digits/class_conditional"]
    monkeypatch.setattr(demo, "bf16_slowdown", lambda: 23.4)

    unets, left_out = demo.floating_point_unets(task)

    assert list(unets) == ["fp32"]
    assert left_out.keys() == {"bf16"}
    assert "23 times as long as fp32" in left_out["bf16"]


def test_bf16_is_compared_if_it_is_not_much_slower_than_fp32(monkeypatch):
    monkeypatch.setattr(demo, "bf16_slowdown", lambda: 1.5)

    unets, left_out = demo.floating_point_unets(TASKS["digits/class_conditional"])

    assert {name: unet.dtype for name, unet in unets.items()} == {"fp32": torch.float32, "bf16": torch.bfloat16}
    assert left_out == {}


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AVX2 is an instruction set of x86")
def test_bf16_is_slow_if_onednn_may_only_use_avx2():
    code = "from examples.small_unets import demo; print(demo.bf16_slowdown() > demo.LARGEST_BF16_SLOWDOWN)"
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}  # oneDNN reads it once per process

    result = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )

    assert result.stdout == "True\n", result.stderr


def test_the_demo_writes_and_prints_its_report(monkeypatch, tmp_path, capsys):
    def quantize_middle(unet, calibration_set, bits, folder):
        kept = ["conv_in", "time_embedding", "down_blocks", "up_blocks", "conv_out"]
        config = dq_runtime.DilateQuantConfig(activation_bits=bits, dilation="none", modules_to_not_convert=kept)
        return dq_runtime.calibrate(copy.deepcopy(unet), calibration_set, config, distillation=None), 1.0

    monkeypatch.setattr(demo, "bf16_slowdown", lambda: 30.0)
    monkeypatch.setattr(demo, "quantize", quantize_middle)
    monkeypatch.setattr(demo, "CALIBRATION_SAMPLES", 10)
    monkeypatch.setattr(demo, "TIMING_BATCH", 2)
    monkeypatch.setattr(demo, "TIMING_ROUNDS", 1)
    options = ["--unet", "digits/class_conditional", "--samples", "20", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["demo", *options])

    demo.main()

    report, (printed, bars) = json.loads((tmp_path / "report.json").read_text()), capsys.readouterr()
    names = ["fp32", "INT4 W4A8", "INT4 W4A4"]
    assert [row["model"] for row in report["models"]] == names
    assert report["left_out"].keys() == {"bf16"}
    assert f"bf16: left out, {report['left_out']['bf16']}" in printed.splitlines()
    for name in names:
        assert f"Sampling {name}: 100%" in bars
    for bits in (8, 4):
        assert f"Calibrating INT4 W4A{bits}" in printed.splitlines()
        assert (tmp_path / f"w4a{bits}" / "report" / "layers.json").is_file()
    assert (tmp_path / "grid.png").is_file()


@pytest.mark.filterwarnings("ignore:divide by zero")
def test_evaluate_measures_every_model_against_the_first(monkeypatch, tmp_path):
    def sample(self, unet, labels, seed, **options):
        return full_sample(self, unet, labels, seed, num_inference_steps=4, **options)

    task, full_sample = TASKS["digits/class_conditional"], demo.Task.sample
    monkeypatch.setattr(demo.Task, "sample", sample)
    monkeypatch.setattr(demo, "TIMING_BATCH", 1)
    monkeypatch.setattr(demo, "TIMING_ROUNDS", 1)
    unets = {"fp32": task.unet(), "the same": task.unet(), "untrained": task.untrained_unet().eval()}
    rows = demo.evaluate(task, unets, {}, 30, tmp_path)

    first, same, untrained = rows
    assert [row["model"] for row in rows] == list(unets)
    assert all({name for name, _ in demo.COLUMNS} <= row.keys() for row in rows)
    assert (first["psnr_db"], first["ssim"]) == (None, None)
    assert same["psnr_db"] == 100
    assert same["ssim"] == pytest.approx(1)
    assert untrained["psnr_db"] < 15
    assert untrained["ssim"] < 0.5
    assert first["label_accuracy"] == same["label_accuracy"] > 0.8
    assert untrained["label_accuracy"] < 0.5
    assert first["frechet"] == same["frechet"] < untrained["frechet"] / 2
    parameters = sum(parameter.numel() for parameter in unets["fp32"].parameters())
    assert first["unet_mb_fp16"] == pytest.approx(2 * parameters / 1e6)
    assert first["unet_mb"] == pytest.approx(4 * parameters / 1e6)
    assert first["quantized_weights_over_fp16"] is None
    assert all(row["seconds_per_image"] > 0 for row in rows)
    assert tmp_path.joinpath("grid.png").is_file()


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
    assert {"examples.small_unets.demo", "examples.small_unets.train"} <= modules
    assert all(importlib.util.find_spec(module) for module in modules)
