"""The quality benchmark: what its methods do, what it measures, and that an interrupted run goes on."""

import importlib
import itertools
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import tiny_emoji
import torch
from diffusers import UNet2DModel
from torch import nn

import dq_runtime
from benchmarks.peers import unets
from benchmarks.quality import calibration_cost, compare, methods, peak_memory, report, rows, subjects
from dq_runtime.layers import quantized_layers
from examples.emoji import demo
from examples.emoji import models as emoji_models
from examples.emoji import task as emoji_task


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, layers_per_block=1, block_out_channels=(32, 64), norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def calibration_set(unet):
    sample = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), dq_runtime.record(unet) as recorded:
        for timestep, size in ((10, 1.0), (500, 4.0)):
            unet(sample * size, timestep)
    return recorded


@pytest.fixture(scope="module")
def tiny_emoji_pipeline(tmp_path_factory):
    return emoji_task.load_pipeline(tiny_emoji.save_pipeline(tmp_path_factory.mktemp("emoji")))


def test_every_method_is_a_row_at_its_numbers_of_bits():
    names, quick = rows.row_names(quick=False), rows.row_names(quick=True)

    assert names[0] == quick[0] == "fp32"
    ours = [name for name in names if ", W4A" in name]
    assert len(ours) == len(set(ours)) == 2 * len(methods.METHODS) - len(methods.ONLY_AT)
    assert {f"{name}, W4A{bits}" for name, bits in methods.ONLY_AT.items()} < set(ours)
    assert set(quick) < set(names)
    assert {f"{name}, W4A4" for name in methods.QUICK} < set(quick)


@pytest.mark.parametrize(
    ("method", "scales", "dilated"),
    [
        ("round to nearest, min-max", 1, False),
        ("SmoothQuant", 1, True),
        ("one static scale", 1, False),
        ("WD", 1, True),
        ("WD as published + TPQ", 2, True),
    ],
)
def test_a_method_has_the_parts_that_its_name_says(unet, calibration_set, method, scales, dilated, monkeypatch):
    # Whether dilation helps this random UNet does not matter here.
    calibrate = importlib.import_module("dq_runtime.calibration.calibrate")
    monkeypatch.setattr(calibrate, "prediction_errors", lambda *_: [1.0, 2.0])
    quantized = methods.METHODS[method](unet, calibration_set, 4, 0)

    by_name = quantized_layers(quantized)
    layers = by_name.values()
    assert quantized is not unet
    assert not quantized_layers(unet)
    assert {len(layer.act_scale) for layer in layers} == {scales}
    for name, layer in by_name.items():
        bits = 8 if "conv_shortcut" in name else 4
        assert layer.activation_bits == bits
        assert layer.act_zero_point.abs().max() <= 2 ** (bits - 1)
    assert any(bool((layer.weight_dilation != 1).any()) for layer in layers) == dilated
    output = quantized(calibration_set.calls[0].sample, 10).sample
    expected = calibration_set.calls[0].run(unet).sample
    assert 0 < (output - expected).square().mean() / expected.square().mean() < 0.5


def test_min_max_covers_the_whole_range(unet, calibration_set):
    quantized = methods.METHODS["round to nearest, min-max"](unet, calibration_set, 8, 0)
    seen = []
    handle = unet.mid_block.resnets[0].conv1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for call in calibration_set.calls:
        call.run(unet)
    handle.remove()

    x, layer = torch.cat(seen), quantized.mid_block.resnets[0].conv1
    width = max(x.max().item(), 0) - min(x.min().item(), 0)
    assert layer.act_scale.item() == pytest.approx(width / 255, rel=1e-5)
    stock = unet.mid_block.resnets[0].conv1.weight
    torch.testing.assert_close(layer.weight_scale, stock.abs().flatten(1).amax(1) / 7)


def test_one_row_leaves_all_convolutions_alone(unet, calibration_set):
    quantized = methods.dilatequant("none", None, None, linears_alone=True)(unet, calibration_set, 8, 0)

    linears = {name for name, module in unet.named_modules() if isinstance(module, nn.Linear)}
    assert set(quantized_layers(quantized)) == linears
    assert len(linears) > 4


def test_one_row_leaves_the_layers_close_to_the_output_alone(unet, calibration_set):
    quantized = methods.dilatequant("none", None, None, late_layers_kept=True)(unet, calibration_set, 8, 0)

    stock = {name for name, module in unet.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    kept = {name for name in stock if name.startswith(("up_blocks.1.", "up_blocks.0.upsamplers"))}
    kept |= {f"up_blocks.0.resnets.{i}.conv_shortcut" for i in range(2)} | {"conv_in", "conv_out"}
    assert kept < stock
    assert set(quantized_layers(quantized)) == stock - kept


def test_the_demo_keeps_the_late_layers_of_the_emoji_unet():
    assert set(demo.KEPT) == {"conv_in", "conv_out", *methods.late_layers(emoji_models.untrained_unet())}


def test_emoji_are_measured_at_both_guidance_scales(tmp_path, tiny_emoji_pipeline, monkeypatch):
    subject = subjects.Emoji()
    subject.pipeline = tiny_emoji_pipeline
    subject.calibration_samples = 4
    monkeypatch.setattr(subjects.emoji, "STEPS", 2)
    monkeypatch.setitem(subjects.SUBJECTS, "emoji", subject)

    fp32, rounded = (
        rows.measure("emoji", name, 0, 4, tmp_path) for name in (rows.FP32, "round to nearest, min-max, W4A8")
    )

    calls = dq_runtime.CalibrationSet.load(tmp_path / "calibration_0.pt").calls
    assert [len(call.sample) for call in calls] == [2, 2, 4, 4]  # with guidance each prompt is drawn twice
    drawn = torch.load(tmp_path / "fp32_0.pt")
    assert drawn.shape == (8, 3, 64, 64)
    assert (drawn[:4] - drawn[4:]).abs().mean() > 1e-3
    assert fp32["psnr_db"] is None
    assert fp32["guided_psnr_db"] is None
    assert 10 < rounded["guided_psnr_db"] < rounded["psnr_db"] < 100
    assert rounded["quantized_weight_share"] > 0.9
    assert rounded["frechet"] - rounded["frechet_increase"] == pytest.approx(fp32["frechet"])


def test_peak_memory_is_what_a_block_takes_at_most_and_not_what_was_free_before():
    # The C library keeps freed memory that lies below something in use, and counts it as free.
    blocks = [torch.ones(250_000) for _ in range(100)]
    top = blocks.pop()
    del blocks
    with peak_memory.above_now() as peak:
        held = [torch.ones(250_000) for _ in range(100)]
        time.sleep(0.1)  # it is looked at every few milliseconds
        del held
        time.sleep(0.1)
        torch.ones(2_500_000)

    assert 98 < peak["allocated_mb"] < 105
    assert 95 < peak["resident_mb"] < 130
    assert top.sum() == 250_000


def test_mean_and_deviation_are_over_the_seeds():
    measured = dict.fromkeys(report.COLUMNS, 1.0)
    measured |= {"library": None, "weight_bits": 4, "activation_bits": 8, "quantized_weight_share": 1.0}
    results = {"a, W4A8": {str(seed): measured | {"psnr_db": psnr} for seed, psnr in enumerate((30.0, 31.0, 35.0))}}
    results["b"] = {"0": measured | {"psnr_db": None, "library": "other 1.2"}}

    a, b = report.summary(results)
    assert (a["seeds"], a["psnr_db"]) == (3, 32.0)
    assert a["psnr_db_std"] == pytest.approx(7**0.5)
    assert (b["seeds"], b["psnr_db"], b["psnr_db_std"], b["frechet_std"]) == (1, None, None, None)
    part = {"part": "P", "activation_bits": 8, "psnr_db": 1, "psnr_db_std": 2, "psnr_db_by_seed": [3, -1]}
    summary = {"summary": [a, b], "contributions": [part]}
    others = {"task": "digits", "images": 7, "steps": 20, "calibration_samples": 9, "command": "python x.py"}
    environment = {"date": "2026-01-02", "cpu_model": "C", "versions": {"torch": "2.0"}}
    page = report.page(summary | others | {"environment": environment}, "plot.png")
    for text in (
        "| a, W4A8 | 3 | 4/8 | 100.0% ± 0.0% | 32.0 ± 2.6 |",
        "| b | 1 | 4/8 | 100.0% | - |",
        "| P | W4A8 | +1.0 ± 2.0 | +3.0, -1.0 |",
        "`python x.py`, 2026-01-02, C, torch 2.0, other 1.2.",
        "(plot.png)",
    ):
        assert text in page
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table[:4]}) == 1


def test_a_part_adds_what_rows_with_and_without_it_differ_by_on_equal_seeds():
    results = {
        f"{name}, W4A4": {str(seed): {"psnr_db": psnr} for seed, psnr in enumerate(by_seed)}
        for name, by_seed in {
            "WD + BKD": (30.0, 31.0),
            "WD + TPQ + BKD": (31.0, 34.0, 99.0),
            "TPQ + BKD": (1.0,),
        }.items()
    }

    (found,) = report.contributions(results)
    assert (found["part"], found["activation_bits"], found["psnr_db"]) == ("TPQ", 4, 2.0)
    assert found["psnr_db_std"] == pytest.approx(2**0.5)
    assert found["psnr_db_by_seed"] == [1.0, 3.0]


def test_the_plot_shows_every_method_and_every_library(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(report.Figure, "savefig", lambda figure, path: figures.append(figure))
    rows = [
        {"name": name, "psnr_db": 30.0 + i, "psnr_db_std": None, "unet_mb": 1.5, "weight_bits": 4}
        | {"activation_bits": bits, "quantized_weight_share": share}
        for i, (name, bits, share) in enumerate(
            [*((f"{name}, W4A{bits}", bits, 1.0) for name in report.METHODS for bits in (8, 4)), ("torchao a", 32, 0.2)]
        )
    ]
    monkeypatch.setattr(report, "PEERS", {"torchao a": None})

    report.plot([*rows, rows[0] | {"name": "fp32", "psnr_db": None}], tmp_path / "plot.png")

    methods, sizes = figures[0].axes
    names = [label.get_text() for label in methods.get_yticklabels()]
    assert names == [name for name in report.METHODS if name != report.LINEARS_ALONE]
    drawn = [line.get_xdata() for line in methods.lines if line.get_marker() == "o"]
    assert sorted(x for points in drawn for x in points) == [
        row["psnr_db"] for row in rows[:-1] if report.LINEARS_ALONE not in row["name"]
    ]
    points = {line.get_ydata()[0]: line for line in sizes.lines if len(line.get_ydata()) == 1}
    by_name = {row["name"]: points[row["psnr_db"]] for row in rows if row["psnr_db"] in points}
    assert len(by_name) == 7
    torchao, best = by_name["torchao a"], by_name[f"{report.BEST}, W4A4"]
    assert (torchao.get_marker(), torchao.get_markerfacecolor()) == ("^", "white")
    assert (best.get_marker(), best.get_color()) == ("o", best.get_markerfacecolor())
    assert (
        len({by_name[name].get_color() for name in ("torchao a", f"{report.BEST}, W4A8", f"{report.BEST}, W4A4")}) == 3
    )


def test_a_run_goes_on_where_it_was_stopped(monkeypatch, tmp_path):
    asked, broken = [], set()

    def measure(_task, name, seed, _images, folder):
        asked.append((name, seed))
        if name in broken:
            raise RuntimeError("out of memory")
        (folder / f"fp32_{seed}.pt").touch()
        row = dict.fromkeys(report.COLUMNS, float(seed)) | {"weight_bits": 4, "activation_bits": 8}
        return row | {"library": None, "quantized_weight_share": 1.0}

    monkeypatch.setattr(compare, "measure", measure)
    monkeypatch.setattr(compare, "one_row_each", ThreadPoolExecutor)
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    output = tmp_path / "quality.json"

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["compare.py", "--output", str(output), "--jobs", "1", *arguments])
        compare.main()

    run("--row", "WD, W4A8", "--seeds", "1")
    assert asked == [("fp32", 0), ("WD, W4A8", 0)]
    asked.clear()
    broken.add("WD, W4A4")
    with pytest.raises(SystemExit, match="Some rows failed"):
        run("--row", "WD, W4A8", "--row", "WD, W4A4", "--seeds", "2")
    assert asked == [("fp32", 1), ("WD, W4A4", 0), ("WD, W4A8", 1), ("WD, W4A4", 1)]
    document = json.loads(output.read_text())
    assert set(document["results"]["WD, W4A8"]) == {"0", "1"}
    assert "WD, W4A4" not in document["results"]
    assert document["environment"]["device"]
    asked.clear()
    broken.clear()
    next(tmp_path.rglob("fp32_1.pt")).unlink()
    run("--row", "WD, W4A8", "--row", "WD, W4A4", "--seeds", "2")
    assert asked == [("fp32", 1), ("WD, W4A4", 0), ("WD, W4A4", 1)]
    with pytest.raises(SystemExit):
        run("--images", "7")  # the file holds rows of another number of images
    assert output.with_suffix(".png").exists()
    assert "| WD, W4A8 | 2 | 4/8 |" in output.with_suffix(".md").read_text()


def test_rows_come_from_a_process_that_has_imported_everything():
    with compare.one_row_each(1) as pool:
        assert pool.submit(eval, "'benchmarks.quality.compare' in __import__('sys').modules").result()


def test_rows_of_libraries_that_are_not_installed_stay_in_the_file(monkeypatch, tmp_path):
    name = next(iter(unets.PEERS))
    monkeypatch.setattr(unets, "missing", lambda peer: "not installed")
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    monkeypatch.setattr(compare, "run_rows", lambda *_: True)
    row = dict.fromkeys(report.COLUMNS, 1.0) | {"weight_bits": 4, "activation_bits": 8}
    row |= {"library": "other 1.2", "quantized_weight_share": 1.0}
    output = tmp_path / "quality.json"
    output.write_text(json.dumps({"images": compare.IMAGES, "results": {name: {"0": row}}}))
    monkeypatch.setattr(sys, "argv", ["compare.py", "--output", str(output)])

    assert name not in rows.rows_to_measure(quick=False)
    compare.main()

    assert json.loads(output.read_text())["results"] == {name: {"0": row}}


def test_end_to_end_training_comes_closer_than_rounding(unet, calibration_set, monkeypatch):
    clock = itertools.count(0.0, 0.05)  # a step of training takes that long, on every machine
    monkeypatch.setattr(calibration_cost, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    record, rounded, trained = {}, *(UNet2DModel.from_config(unet.config).eval() for _ in range(2))
    for copy in (rounded, trained):
        copy.load_state_dict(unet.state_dict())
    config = dq_runtime.DilateQuantConfig(activation_bits=4, dilation="weight")
    dq_runtime.calibrate(rounded, calibration_set, config, distillation=None)
    with calibration_cost.training_by(
        lambda distil, *arguments: calibration_cost.train_end_to_end(*arguments[:-1], 1.0), record
    ):
        dq_runtime.calibrate(trained, calibration_set, config, dq_runtime.Distillation())

    call = calibration_set.calls[-1]  # the timestep that matters most
    expected = call.run(unet).sample
    errors = [(call.run(model).sample - expected).square().mean().item() for model in (rounded, trained)]
    assert errors[1] < 0.8 * errors[0]
    assert record["seconds"] > 1
    assert record["resident_mb"] > 0
    assert record["allocated_mb"] > 0
