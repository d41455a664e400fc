"""Bars, curves, counts and pixels of the plots, compared with the data that they show; and the report's files."""

import copy
import importlib
import json
import math
import sys
from dataclasses import dataclass
from itertools import pairwise

import matplotlib
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from dq_runtime import CalibrationSet, calibrate, record
from dq_runtime.evaluation import plots
from dq_runtime.evaluation.layer_errors import layer_sqnr
from dq_runtime.evaluation.plots import (
    plot_activation_scales,
    plot_dilation,
    plot_image_grid,
    plot_layer_sqnr,
    short_name,
    write_report,
)
from dq_runtime.layers import quantized_layers

TIMESTEPS = [10.5, 500.0, 900.0]
SQNR = {"time_embedding.linear_1": 21.5, "mid_block.resnets.0.conv1": -3.25, "up_blocks.1.upsamplers.0.conv": 40.0}


@dataclass(frozen=True)
class Subject:
    stock: nn.Module
    quantized: nn.Module
    calibration_set: CalibrationSet

    @property
    def copy(self):
        return copy.deepcopy(self.quantized)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def subject():
    torch.manual_seed(0)
    stock = UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    ).eval()
    with torch.no_grad(), record(stock) as calibration_set:
        for timestep in TIMESTEPS:
            stock(torch.randn(1, 3, 8, 8), timestep)
    return Subject(stock, calibrate(copy.deepcopy(stock), calibration_set, distillation=None), calibration_set)


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def bars(figure):
    return [container.patches for container in figure.axes[0].containers]


def do_not_overlap(boxes):
    """True if no box overlaps the next one, sorted from top to bottom."""
    return all(above.y0 >= below.y1 for above, below in pairwise(sorted(boxes, key=lambda box: -box.y0)))


def stable_diffusion_layers():
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    layers = [name for name, module in unet.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    return [name for name in layers if name not in ("conv_in", "conv_out")]


def test_every_layer_has_a_bar_in_the_given_order_from_the_top():
    figure = plot_layer_sqnr(SQNR)

    (patches,) = bars(figure)
    rows = [patch.get_y() + patch.get_height() / 2 for patch in patches]
    assert isinstance(figure, Figure)
    assert [patch.get_width() for patch in patches] == list(SQNR.values())
    assert rows == pytest.approx([0, 1, 2])
    assert figure.axes[0].yaxis_inverted()
    assert figure.axes[0].get_yticks().tolist() == [0, 1, 2]
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["time_embedding.linear_1", "mid · resnet 0 · conv1", "up 1 · upsampler · conv"]
    assert "dB" in figure.axes[0].get_title(loc="left")
    assert "median, 21.5 dB" in " ".join(texts(figure))
    low, high = figure.axes[0].get_xlim()
    assert low < -3.25
    assert high > 40


def test_the_lowest_five_bars_are_marked_and_labelled_with_their_value():
    sqnr = {f"layer{i}": 10.0 + (i * 7) % 12 for i in range(12)}
    figure = plot_layer_sqnr(sqnr)

    lowest = {name for name, value in sqnr.items() if value <= 14}
    marked = {
        name
        for name, patch in zip(sqnr, bars(figure)[0], strict=True)
        if to_hex(patch.get_facecolor()).upper() == plots.VERMILION
    }
    assert marked == lowest
    assert set(texts(figure)) >= {"10.0", "11.0", "12.0", "13.0", "14.0"}
    assert "15.0" not in texts(figure)


def test_bars_of_infinite_and_nan_values_are_labelled():
    figure = plot_layer_sqnr({"exact": math.inf, "a": 20.0, "none": -math.inf, "broken": math.nan, "b": 30.0})

    assert [patch.get_width() for patch in bars(figure)[0]] == [30, 20, 0, 0, 30]
    assert {"∞", "-∞", "NaN", "20.0", "30.0"} <= set(texts(figure))
    assert "median, 25.0 dB" in " ".join(texts(figure))


def test_layers_that_are_all_exact_can_be_plotted(tmp_path):
    figure = plot_layer_sqnr({"a": math.inf, "b": math.inf})

    figure.savefig(tmp_path / "figure.png")
    assert texts(figure).count("∞") == 2


def test_the_names_of_all_layers_of_stable_diffusion_are_readable():
    sqnr = dict.fromkeys(stable_diffusion_layers(), 20.0)
    figure = plot_layer_sqnr(sqnr)
    figure.draw_without_rendering()

    labels = figure.axes[0].get_yticklabels()
    assert len(sqnr) > 250
    assert len({label.get_text() for label in labels}) == len(sqnr)  # short names stay unique
    assert max(len(label.get_text()) for label in labels) < 0.8 * max(map(len, sqnr))
    assert min(label.get_fontsize() for label in labels) >= 6
    assert do_not_overlap([label.get_window_extent() for label in labels])
    assert min(label.get_window_extent().x0 for label in labels) >= 0
    assert plot_layer_sqnr(SQNR).get_figheight() < 2 < 30 < figure.get_figheight()


def test_sqnr_of_no_layer_is_refused():
    with pytest.raises(ValueError, match="no layers"):
        plot_layer_sqnr({})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("up_blocks.1.attentions.2.transformer_blocks.3.attn1.to_q", "up 1 · attention 2 · block 3 · attn1.to_q"),
        ("mid_block.attentions.0.to_out.0", "mid · attention 0 · to_out.0"),
        ("down_blocks.0.downsamplers.0.conv", "down 0 · downsampler · conv"),
        ("time_embedding.linear_1", "time_embedding.linear_1"),
    ],
)
def test_short_names(name, expected):
    assert short_name(name) == expected


def test_every_layers_scales_are_a_curve_over_the_timesteps(subject):
    figure = plot_activation_scales(subject.quantized)

    layers = quantized_layers(subject.quantized)
    assert isinstance(figure, Figure)
    assert len(figure.axes[0].lines) == len(layers)
    for line, layer in zip(figure.axes[0].lines, layers.values(), strict=True):
        assert list(line.get_xdata()) == TIMESTEPS
        np.testing.assert_array_equal(line.get_ydata(), layer.act_scale.numpy())
    assert figure.axes[0].get_yscale() == "log"
    assert "timestep" in figure.axes[0].get_xlabel()


def test_the_six_scales_that_vary_the_most_are_named(subject):
    unet = subject.copy
    layers = {name: layer for name, layer in quantized_layers(unet).items() if name.endswith(("conv1", "conv2"))}
    others = [layer for name, layer in quantized_layers(unet).items() if name not in layers]
    for layer in others:
        layer.act_scale.fill_(0.5)
    for factor, layer in enumerate(layers.values(), start=1):
        layer.act_scale.copy_(torch.tensor([1.0, 1.0 + factor, 0.5]))
    twin = next(name for name in quantized_layers(unet) if name.endswith("time_emb_proj"))
    quantized_layers(unet)[twin].act_scale.copy_(list(layers.values())[-1].act_scale)

    figure = plot_activation_scales(unet)
    figure.draw_without_rendering()

    expected = [f"{short_name(n)}: {2 * (1 + k):.1f}-fold" for k, n in enumerate(layers, start=1)][-6:]
    first_twin = min(twin, list(layers)[-1], key=list(quantized_layers(unet)).index)
    expected[-1] = f"{short_name(first_twin)} and 1 alike: {2 * (1 + len(layers)):.1f}-fold"
    labels = [text for text in figure.axes[0].texts if "fold" in text.get_text()]
    assert len(layers) > 6
    assert sorted(text.get_text() for text in labels) == sorted(expected)
    assert do_not_overlap([matplotlib.text.Text.get_window_extent(text) for text in labels])
    colored = [line.get_color() for line in figure.axes[0].lines if line.get_color() != plots.PALE]
    assert len(set(colored)) == len(colored) == 6


def test_labels_of_curves_that_end_together_are_kept_apart_and_beside_the_plot(subject):
    unet = subject.copy
    for factor, layer in enumerate(quantized_layers(unet).values(), start=2):
        layer.act_scale.copy_(torch.tensor([1.0 / factor, 1.0, 1.0]))  # at the upper end of the axis

    figure = plot_activation_scales(unet)
    figure.draw_without_rendering()

    labels = [text for text in figure.axes[0].texts if "fold" in text.get_text()]
    boxes = [matplotlib.text.Text.get_window_extent(text) for text in labels]
    assert len(labels) == 6
    assert do_not_overlap(boxes)
    assert max((box.y0 + box.y1) / 2 for box in boxes) < figure.axes[0].bbox.y1 + 1
    assert max(box.x1 for box in boxes) < figure.bbox.x1


def test_a_single_timestep_is_a_point(subject):
    unet = copy.deepcopy(subject.stock)
    calibrate(unet, CalibrationSet(subject.calibration_set.calls[:1]), distillation=None)
    figure = plot_activation_scales(unet)

    assert {line.get_marker() for line in figure.axes[0].lines} == {"o"}
    assert not [text for text in texts(figure) if "fold" in text]


def dilate(unet, factors):
    """Sets the dilation of the first channels to these factors, and of all others to 1."""
    remaining = list(factors)
    for layer in quantized_layers(unet).values():
        layer.weight_dilation.fill_(1)
        part, remaining = remaining[: layer.weight_dilation.numel()], remaining[layer.weight_dilation.numel() :]
        layer.weight_dilation[: len(part)] = torch.tensor(part)
    assert not remaining
    return torch.cat([layer.weight_dilation for layer in quantized_layers(unet).values()]).double().numpy()


@pytest.mark.parametrize(
    "factors", [[1.5, 1.25, 1.001, 8.0, 8.0], [0.125, 0.5, 0.999, 2.0, 8.0], []], ids=["above", "below", "ones"]
)
def test_the_histogram_counts_every_channel_where_its_factor_is(subject, factors):
    unet = subject.copy
    every = dilate(unet, factors)
    figure = plot_dilation(unet)

    (ones,), others = bars(figure)
    assert isinstance(figure, Figure)
    assert ones.get_height() == len(every) - len(factors)
    assert ones.get_x() < 1 < ones.get_x() + ones.get_width()
    assert sum(bar.get_height() for bar in others) == len(factors)
    for bar in others:
        left, right = bar.get_x(), bar.get_x() + bar.get_width()
        assert bar.get_height() == sum(left <= factor < right for factor in factors)
    assert figure.axes[0].get_xscale() == ("log" if min(every) < 1 else "linear")
    (legend,) = [text.get_text() for text in figure.axes[0].get_legend().get_texts() if "exactly 1" in text.get_text()]
    assert f"{100 * (1 - len(factors) / len(every)):.1f}%" in legend


def test_the_histogram_of_a_calibrated_unet_counts_its_factors(subject):
    every = torch.cat([layer.weight_dilation for layer in quantized_layers(subject.quantized).values()])
    figure = plot_dilation(subject.quantized)

    (ones,), others = bars(figure)
    assert 0 < ones.get_height() == int((every == 1).sum()) < len(every)
    assert ones.get_height() + sum(bar.get_height() for bar in others) == len(every)
    assert f"{len(every):,} input channels" in " ".join(texts(figure))
    assert f"largest {every.max():.2f}" in " ".join(texts(figure))


@pytest.mark.parametrize("plot", [plot_activation_scales, plot_dilation])
def test_an_unquantized_unet_is_refused(subject, plot):
    with pytest.raises(ValueError, match="not quantized"):
        plot(subject.stock)


def random_images(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def drawn(figure):
    """The array and the position of each image, row by row."""
    return [(axes.images[0].get_array(), axes.get_position()) for axes in figure.axes]


def test_the_grid_has_one_row_per_model_with_its_first_images():
    images = {"fp32": random_images(5, 3, 8, 6), "INT4": -random_images(2, 3, 8, 6)}
    figure = plot_image_grid(images, columns=3)

    expected = [*images["fp32"][:3], *images["INT4"]]
    shown = drawn(figure)
    assert isinstance(figure, Figure)
    assert [text.get_text() for text in figure.texts] == list(images)
    assert len(shown) == 5
    for (pixels, _), image in zip(shown, expected, strict=True):
        np.testing.assert_allclose(pixels, (image.permute(1, 2, 0).numpy() + 1) / 2, atol=1e-6)
    tops = [round(place.y1, 6) for _, place in shown]
    lefts = [round(place.x0, 6) for _, place in shown]
    assert tops == [tops[0]] * 3 + [tops[3]] * 2
    assert tops[0] > tops[3]
    assert lefts[0] < lefts[1] < lefts[2]
    assert lefts[3:] == lefts[:2]
    assert not any(axes.axison for axes in figure.axes)


@pytest.mark.parametrize("channels", [1, 3])
def test_every_pixel_is_enlarged_to_a_square_of_its_shade(tmp_path, channels):
    image = random_images(1, channels, 5, 4)
    figure = plot_image_grid({"a long name of a model": image})
    figure.savefig(tmp_path / "grid.png")

    zoom = round(plots.SMALLEST_CELL / 5)
    with Image.open(tmp_path / "grid.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    corner = pixels[3 : 3 + 5 * zoom, -(4 * zoom + 3) : -3]
    expected = ((image[0].permute(1, 2, 0).numpy() + 1) * 127.5).repeat(zoom, 0).repeat(zoom, 1)
    assert np.abs(corner - expected).max() <= 2  # of 255: matplotlib has 256 greys
    assert (pixels[3 : 3 + 5 * zoom, : -(4 * zoom + 3)] < 128).any()  # the name
    assert (pixels[:, -(4 * zoom + 15) : -(4 * zoom + 3)] == 255).all()  # the name ends before the image


def test_values_out_of_range_and_half_precision_are_shown():
    pixels = drawn(plot_image_grid({"bf16": torch.tensor([-3.0, 0.0, 3.0]).view(1, 1, 1, 3).bfloat16()}))[0][0]

    assert pixels.tolist() == [[0, 0.5, 1]]


@pytest.mark.parametrize("shape", [(2, 2, 8, 8), (2, 8, 8), (0, 1, 8, 8), (2, 1, 8, 9)], ids=str)
def test_images_of_other_shapes_are_refused_by_the_models_name(shape):
    with pytest.raises(ValueError, match="INT4: expected images"):
        plot_image_grid({"fp32": torch.zeros(2, 1, 8, 8), "INT4": torch.zeros(shape)})


def test_no_images_are_refused():
    with pytest.raises(ValueError, match="no images"):
        plot_image_grid({})


@pytest.mark.parametrize("with_images", [False, True])
def test_write_report_writes_these_files(subject, tmp_path, with_images):
    images = {"fp32": random_images(2, 1, 8, 8)} if with_images else None
    folder = tmp_path / "new" / "report"
    files = write_report(subject.quantized, subject.stock, subject.calibration_set, folder, images)

    names = ["layer_sqnr.png", "activation_scales.png", "dilation.png", *["images.png"] * with_images, "layers.json"]
    assert files == [folder / name for name in names]
    assert sorted(folder.iterdir()) == sorted(files)
    for file in files[:-1]:
        with Image.open(file) as picture:
            assert picture.format == "PNG"
            assert np.ptp(np.asarray(picture.convert("L"))) > 100
            assert picture.info["dpi"] == pytest.approx((150, 150), abs=0.1)


def test_the_report_holds_the_numbers_of_every_layer(subject, tmp_path):
    unet, stock = subject.copy, copy.deepcopy(subject.stock)
    unet.unused = copy.deepcopy(unet.time_embedding.linear_1)
    stock.unused = nn.Linear(8, 32)
    layer, exact = unet.mid_block.resnets[0].conv1, unet.mid_block.resnets[0].conv2
    layer.weight_dilation.copy_(torch.tensor([1.0] * 8 + [2.0] * 7 + [5.0]))
    stock.mid_block.resnets[0].conv2.bias.fill_(math.nan)
    write_report(unet, stock, subject.calibration_set, tmp_path)

    numbers = json.loads((tmp_path / "layers.json").read_text(), parse_constant=pytest.fail)
    sqnr = layer_sqnr(unet, stock, subject.calibration_set)
    assert list(numbers) == [*sqnr, "unused"]
    assert numbers.keys() == quantized_layers(unet).keys()
    assert numbers["time_embedding.linear_1"]["sqnr_db"] == sqnr["time_embedding.linear_1"]
    assert numbers["unused"]["sqnr_db"] is None
    assert numbers[exact.name]["sqnr_db"] is None
    assert numbers[layer.name] == {
        "sqnr_db": sqnr[layer.name],
        "kind": "conv2d",
        "shape": [16, 16, 3, 3],
        "dilation_median": 1.5,
        "dilation_max": 5.0,
        "act_scale_min": layer.act_scale.min().item(),
        "act_scale_max": layer.act_scale.max().item(),
    }
    for name, entry in numbers.items():
        module = stock.get_submodule(name)
        assert entry["shape"] == list(module.weight.shape)
        assert entry["kind"] == {nn.Linear: "linear", nn.Conv2d: "conv2d"}[type(module)]


def test_matplotlib_is_imported_on_first_use(monkeypatch):
    monkeypatch.delitem(sys.modules, plots.__name__)
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    module = importlib.import_module(plots.__name__)

    assert module is not plots
    with pytest.raises(ImportError, match="matplotlib"):
        module.plot_layer_sqnr(SQNR)


def test_plots_leave_pyplot_and_the_global_settings_alone(subject, monkeypatch, tmp_path):
    before = matplotlib.rcParams.copy()
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it would raise

    write_report(subject.quantized, subject.stock, subject.calibration_set, tmp_path, {"a": random_images(1, 1, 8, 8)})

    assert matplotlib.rcParams.copy() == before
