"""Plots of a quantized UNet, and a report with all of them.

The plots need matplotlib, which the extra ``evaluation`` installs. Every function returns a new ``Figure``. The module
does not use pyplot, with its windows and global settings.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from dq_runtime.evaluation.layer_errors import layer_sqnr
from dq_runtime.layers import QuantConv2d, QuantizedLayer, quantized_layers
from dq_runtime.validation import instance, integer, path, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

    from dq_runtime.calibration.collect import CalibrationSet

DPI = 150
# The colours of Okabe and Ito, which colour-blind readers can distinguish.
BLUE, VERMILION = "#0072B2", "#D55E00"
ACCENTS = (VERMILION, BLUE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
SOFT_BLUE, INK, GREY, PALE, RULE, BAND = "#86B5D9", "#222222", "#757575", "#BDBDBD", "#E8E8E8", "#F6F6F6"
LABEL_SIZE, SMALL_SIZE = 8.0, 6.5  # points

LOWEST = 5  # number of layers whose SQNR is written beside the bar
BINS = 40
LEADER = {"arrowstyle": "-", "linewidth": 0.6, "shrinkA": 2, "shrinkB": 0, "relpos": (0, 0.5)}
PADDING, BAR_HEIGHT = 0.12, 0.14  # inches; BAR_HEIGHT is per layer
SMALLEST_CELL = 64  # pixels; smaller images are enlarged
SHORTER = (
    (r"\b(down|up)_blocks\.(\d+)\.", r"\1 \2 · "),
    (r"\bmid_block\.", "mid · "),
    (r"\b(resnet|attention)s\.(\d+)\.", r"\1 \2 · "),
    (r"\btransformer_blocks\.(\d+)\.", r"block \1 · "),
    (r"\b(down|up)samplers\.0\.", r"\1sampler · "),
)


def plot_layer_sqnr(sqnr: Mapping[str, float]) -> Figure:
    """Plots one bar per layer, in the order of the forward pass from top to bottom.

    Args:
        sqnr: dB by layer name (see ``layer_sqnr``). Infinity gets a label and the length of the longest finite bar.

    Raises:
        ValueError: if there are no layers.
    """
    instance("sqnr", sqnr, Mapping)
    if not sqnr:
        raise ValueError("There are no layers to plot: no call reached a quantized layer")
    for name, value in sqnr.items():
        if not isinstance(name, str) or not isinstance(value, Real):
            raise TypeError(f"sqnr must map names of layers to dB, got {shown(name)}: {shown(value)}")
    figure, axes = _figure(7.5, 1.4 + BAR_HEIGHT * len(sqnr))
    finite = {name: value for name, value in sqnr.items() if math.isfinite(value)}
    lowest = sorted(finite, key=finite.__getitem__)[:LOWEST]
    longest = max([*finite.values(), 1.0])
    widths = [value if math.isfinite(value) else longest * (value == math.inf) for value in sqnr.values()]
    colors = [VERMILION if name in lowest else SOFT_BLUE if name in finite else PALE for name in sqnr]
    axes.barh(range(len(sqnr)), widths, height=0.6, color=colors, zorder=2)
    for row, (name, value) in enumerate(sqnr.items()):
        if name in lowest or name not in finite:
            text = f"{value:.1f}" if name in finite else str(value).replace("inf", "∞").replace("nan", "NaN")
            axes.annotate(
                text, (max(widths[row], 0), row), (3, 0), textcoords="offset points", va="center_baseline", color=INK,
                fontsize=SMALL_SIZE,
            )  # fmt: skip

    blocks = [short_name(name).rpartition(" · ")[0].split(" · ")[0] for name in sqnr]  # "" outside of blocks
    for start, stop in _runs(blocks)[1::2]:
        axes.axhspan(start - 0.5, stop - 0.5, color=BAND, linewidth=0, zorder=0)
    axes.set_yticks(range(len(sqnr)), [short_name(name) for name in sqnr], fontsize=SMALL_SIZE)
    axes.set_ylim(len(sqnr) - 0.5, -0.5)
    axes.set_xlim(min([*widths, 0.0]) * 1.08, longest * 1.08)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", top=True, labeltop=True)
    axes.grid(axis="x", color=RULE, linewidth=0.5)
    subtitle = ""
    if finite:
        median = float(np.median(list(finite.values())))
        axes.axvline(median, color=INK, linewidth=0.6, zorder=4)
        subtitle = f"line: median, {median:.1f} dB; orange: the lowest {len(lowest)} of {len(sqnr)} layers"
    _write_titles(axes, "Signal-to-quantization-noise ratio of layer outputs, dB", subtitle, above=14)
    return figure


def plot_activation_scales(unet: Any) -> Figure:
    """Plots the activation scale of every layer against the timestep and names the curves that vary the most.

    Raises:
        ValueError: if the UNet is not quantized.
    """
    layers = _layers(unet)
    timesteps = unet.hf_quantizer.quantization_config.timesteps
    figure, axes = _figure(8.5, 4.8)
    curves = {name: layer.act_scale.double().cpu().numpy() for name, layer in layers.items()}
    alike: dict[bytes, list[str]] = {}  # layers that read the same tensor share their scales
    for name, curve in curves.items():
        alike.setdefault(curve.tobytes(), []).append(name)
    variation = {names[0]: curves[names[0]].max() / curves[names[0]].min() for names in alike.values()}
    varied = sorted((name for name in variation if variation[name] > 1), key=variation.__getitem__, reverse=True)
    named = dict(zip(varied, ACCENTS, strict=False))
    marker = "o" if len(timesteps) == 1 else None
    for name, curve in curves.items():
        style = {"color": named[name], "linewidth": 1.3, "zorder": 3} if name in named else {"color": PALE}
        axes.plot(timesteps, curve, **{"linewidth": 0.5, "zorder": 2, "marker": marker, "markersize": 3} | style)
    axes.set_yscale("log")
    _plain_log_ticks(axes.yaxis)
    axes.grid(axis="y", color=RULE, linewidth=0.5)
    axes.set_xlabel("timestep", fontsize=LABEL_SIZE, color=INK)
    axes.margins(x=0.01)
    ends = {name: float(curves[name][-1]) for name in named}
    for name, height in _spread(axes, ends).items():
        others = len(alike[curves[name].tobytes()]) - 1
        text = short_name(name) + (f" and {others} alike" if others else "") + f": {variation[name]:.1f}-fold"
        axes.annotate(
            text, (timesteps[-1], ends[name]), (1.04, height), textcoords="axes fraction", va="center",
            fontsize=SMALL_SIZE, color=INK,
            arrowprops=LEADER | {"color": named[name]},
        )  # fmt: skip
    subtitle = f"{len(layers)} layers, {len(timesteps)} timesteps"
    if named:
        subtitle += f"; named: the {len(named)} that vary the most, by their largest over their smallest scale"
    _write_titles(axes, "Activation scale of each layer against the timestep", subtitle)
    return figure


def plot_dilation(unet: Any) -> Figure:
    """Plots a histogram of the dilation factors of all input channels of all layers.

    Channels with a factor of exactly 1, which Weight Dilation does not change, have a separate bar.

    Raises:
        ValueError: if the UNet is not quantized.
    """
    factors = torch.cat([layer.weight_dilation.flatten() for layer in _layers(unet).values()]).double().cpu().numpy()
    figure, axes = _figure(6.5, 3.8)
    shrinks = bool((factors < 1).any())
    # One bin is centred on 1.
    positions = np.log(factors) if shrinks else factors - 1
    step = float(np.ptp(positions)) / BINS or 0.01
    first, last = math.floor(positions.min() / step + 0.5), math.floor(positions.max() / step + 0.5)
    edges = (np.arange(first, last + 2) - 0.5) * step
    counts = np.histogram(positions[factors != 1], edges)[0]
    ones = int((factors == 1).sum())
    edges = np.exp(edges) if shrinks else 1 + edges
    centre = -first
    axes.bar(
        edges[centre], ones, np.diff(edges)[centre], align="edge", color=PALE, edgecolor="white", linewidth=0.8,
        label=f"exactly 1: {ones / len(factors):.1%}",
    )  # fmt: skip
    axes.bar(
        edges[:-1], counts, np.diff(edges), align="edge", color=BLUE, edgecolor="white", linewidth=0.8,
        label=f"others: {1 - ones / len(factors):.1%}",
    )  # fmt: skip
    axes.set_yscale("log")
    if shrinks:
        axes.set_xscale("log")
        _plain_log_ticks(axes.xaxis)
    axes.set_xlabel("dilation factor", fontsize=LABEL_SIZE, color=INK)
    axes.set_ylabel("input channels", fontsize=LABEL_SIZE, color=INK)
    axes.grid(axis="y", color=RULE, linewidth=0.5)
    axes.legend(frameon=False, fontsize=LABEL_SIZE, labelcolor=INK, handlelength=1.0)
    subtitle = f"{len(factors):,} input channels; largest {factors.max():.2f}"
    subtitle += f", smallest {factors.min():.2f}" if shrinks else ""
    _write_titles(axes, "Weight Dilation: factors of all input channels", subtitle)
    return figure


def plot_image_grid(images: Mapping[str, torch.Tensor], columns: int = 10) -> Figure:
    """Plots one row of images per model, with its name. Pixels are enlarged without interpolation.

    Args:
        images: [B, C, H, W] in [-1, 1] by model name; C is 1 or 3, H and W are the same for all models.
        columns: the number of images per row; further images are left out.

    Raises:
        ValueError: if there are no images, or images have another shape.
    """
    from matplotlib.figure import Figure
    from matplotlib.textpath import TextPath

    height, width = _image_size(images)
    integer("columns", columns, 1)
    zoom = max(1, round(SMALLEST_CELL / max(height, width)))
    columns = min(columns, max(len(batch) for batch in images.values()))
    gap, indent = 3, 12  # pixels
    widest = max(TextPath((0, 0), f"{name}.", size=LABEL_SIZE).get_extents().width for name in images)
    margin = 2 * indent + round(widest * DPI / 72)
    total_width = margin + columns * (width * zoom + gap)
    total_height = len(images) * (height * zoom + gap) + gap
    figure = Figure(figsize=(total_width / DPI, total_height / DPI), dpi=DPI, facecolor="white")
    for row, (name, batch) in enumerate(images.items()):
        bottom = total_height - (row + 1) * (height * zoom + gap)
        middle = (bottom + height * zoom / 2) / total_height
        figure.text(indent / total_width, middle, name, va="center", fontsize=LABEL_SIZE, color=INK)
        for column, image in enumerate(batch[:columns]):
            left = margin + column * (width * zoom + gap)
            place = left / total_width, bottom / total_height, width * zoom / total_width, height * zoom / total_height
            axes = figure.add_axes(place)
            axes.set_axis_off()
            pixels = (image.detach().float().cpu().clamp(-1, 1) / 2 + 0.5).permute(1, 2, 0).numpy()
            pixels = pixels[..., 0] if pixels.shape[2] == 1 else pixels
            axes.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    return figure


def write_report(
    unet: Any,
    reference: Any,
    calibration_set: CalibrationSet,
    folder: str | Path,
    images: Mapping[str, torch.Tensor] | None = None,
) -> list[Path]:
    """Measures a quantized UNet. Writes all plots, and the numbers of each layer as JSON.

    Args:
        unet, reference, calibration_set: see ``layer_sqnr``.
        folder: the output folder, created if it does not exist.
        images: see ``plot_image_grid``.

    Returns:
        the files: ``layer_sqnr.png``, ``activation_scales.png``, ``dilation.png``, ``images.png`` if there are images,
        and ``layers.json``. There ``sqnr_db`` is null if it is not finite or no call reached the layer.
    """
    folder = path("folder", folder)
    sqnr = layer_sqnr(unet, reference, calibration_set)
    figures = {
        "layer_sqnr.png": plot_layer_sqnr(sqnr),
        "activation_scales.png": plot_activation_scales(unet),
        "dilation.png": plot_dilation(unet),
    }
    if images is not None:
        figures["images.png"] = plot_image_grid(images)
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=DPI)
    layers = quantized_layers(unet)
    in_order = [*sqnr, *(name for name in layers if name not in sqnr)]
    numbers = {name: _numbers(layers[name], sqnr.get(name, math.nan)) for name in in_order}
    (folder / "layers.json").write_text(json.dumps(numbers, indent=2) + "\n")
    return [folder / name for name in (*figures, "layers.json")]


def short_name(name: str) -> str:
    """A layer's dotted name in the plots' short form: ``up 1 · attention 0 · block 0 · attn1.to_q``."""
    for pattern, replacement in SHORTER:
        name = re.sub(pattern, replacement, name)
    return name


def _numbers(layer: QuantizedLayer, sqnr: float) -> dict[str, Any]:
    """A layer's entry in the report. ``shape`` is the shape of the stock layer's weight."""
    is_conv = isinstance(layer, QuantConv2d)
    return {
        "sqnr_db": sqnr if math.isfinite(sqnr) else None,
        "kind": "conv2d" if is_conv else "linear",
        "shape": list(layer.stock_shape),
        "dilation_median": float(np.median(layer.weight_dilation.cpu().numpy())),
        "dilation_max": layer.weight_dilation.max().item(),
        "act_scale_min": layer.act_scale.min().item(),
        "act_scale_max": layer.act_scale.max().item(),
    }


def _layers(unet: Any) -> dict[str, QuantizedLayer]:
    instance("unet", unet, nn.Module)
    layers = quantized_layers(unet)
    if not layers:
        raise ValueError("The UNet is not quantized: calibrate it, or load a quantized one")
    return layers


def _image_size(images: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    """The common height and width of all images."""
    instance("images", images, Mapping)
    for name, batch in images.items():
        instance(f"images[{shown(name)}]", batch, torch.Tensor)
    if not images:
        raise ValueError("There are no images to plot")
    size = next(iter(images.values())).shape[-2:]
    for name, batch in images.items():
        if batch.ndim != 4 or batch.shape[1] not in (1, 3) or batch.shape[-2:] != size or not len(batch):
            raise ValueError(
                f"{name}: expected images [B, 1 or 3, H, W], H and W as the first model's {list(size)}, got "
                f"{list(batch.shape)}"
            )
    return size[0], size[1]


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure with one plot without a frame; width and height in inches."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=PADDING, h_pad=PADDING)
    figure = Figure(figsize=(width, height), dpi=DPI, layout=layout, facecolor="white")
    axes = figure.add_subplot()
    axes.spines[:].set_visible(False)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=LABEL_SIZE, color=PALE, labelcolor=INK, width=0.6, which="both")
    return figure, axes


def _write_titles(axes: Axes, title: str, subtitle: str, above: float = 0) -> None:
    """Writes a title and a grey subtitle above the plot's left edge, raised by ``above`` points."""
    axes.set_title(title, loc="left", fontsize=11, color=INK, pad=21 + above)
    axes.annotate(
        subtitle, (0, 1), (0, 8 + above), xycoords="axes fraction", textcoords="offset points", fontsize=LABEL_SIZE,
        color=GREY,
    )  # fmt: skip


def _runs(values: list[str]) -> list[tuple[int, int]]:
    """The start and stop indices of runs of equal values."""
    starts = [i for i, value in enumerate(values) if i == 0 or values[i - 1] != value]
    return list(zip(starts, [*starts[1:], len(values)], strict=True))


def _spread(axes: Axes, values: Mapping[str, float], distance: float = 0.05) -> dict[str, float]:
    """Heights of labels on a log axis, as fractions of it: near their values, ``distance`` apart, below its end."""
    low, high = np.log(axes.get_ylim())
    heights: dict[str, float] = {}
    height = -math.inf
    for below, name in enumerate(sorted(values, key=values.__getitem__), start=1):
        height = max((math.log(values[name]) - low) / (high - low), height + distance)
        heights[name] = min(height, 1 - distance * (len(values) - below))
    return heights


def _plain_log_ticks(axis: Axis) -> None:
    """Sets ticks such as 0.5, 1 and 2 on a log axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
