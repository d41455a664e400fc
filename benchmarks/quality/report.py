"""The results of ``compare.py`` as means over the seeds, a page and a plot."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.peers.unets import PEERS
from benchmarks.quality.methods import ACTIVATION_BITS, METHODS

PAIRS = (  # part, method without it, method with it
    ("WD, untrained", "one static scale", "WD"),
    ("TPQ, untrained", "WD", "WD + TPQ"),
    ("BKD", "WD + TPQ", "WD + TPQ + BKD"),
    ("polish", "WD + TPQ + BKD", "WD + TPQ + BKD, polished"),
    ("late layers kept", "WD + TPQ + BKD", "WD + TPQ + BKD, late layers kept"),
    ("WD", "TPQ + BKD", "WD + TPQ + BKD"),
    ("TPQ", "WD + BKD", "WD + TPQ + BKD"),
    ("8 bits for shortcuts", "WD + TPQ + BKD, shortcuts alike", "WD + TPQ + BKD"),
)
COLUMNS = {
    "label_accuracy": ("accuracy", "{:.1%}"),
    "psnr_db": ("PSNR, dB", "{:.1f}"),
    "guided_psnr_db": ("PSNR at guidance 5", "{:.1f}"),
    "pooled_psnr_db": ("pooled", "{:.1f}"),
    "ssim": ("SSIM", "{:.3f}"),
    "frechet": ("Fréchet", "{:.2f}"),
    "frechet_increase": ("over fp32", "{:+.2f}"),
    "unet_mb": ("MB", "{:.2f}"),
    "calibration_seconds": ("s", "{:.0f}"),
    "calibration_peak_mb": ("peak MB", "{:.0f}"),
}
COLOURS = {8: "#0072b2", 4: "#d55e00"}  # W4A8 and W4A4
WEIGHT_ONLY, EIGHT_BIT_WEIGHTS = "#009e73", "#999999"
MARKERS = {"dq_runtime": "o", "sdnq": "D", "quanto": "s", "torchao": "^"}
BEST, LINEARS_ALONE = "WD + TPQ + BKD, polished", "WD + TPQ + BKD, linears alone"
LATE_LAYERS_KEPT = "WD + TPQ + BKD, late layers kept"


def summary(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Mean and standard deviation over the seeds, one row per method."""
    rows = []
    for name, by_seed in results.items():
        row: dict[str, Any] = {"name": name, "seeds": len(by_seed)}
        first = next(iter(by_seed.values()))
        row |= {key: first[key] for key in ("library", "weight_bits", "activation_bits", "quantized_weight_share")}
        for column in COLUMNS:
            values = [measured[column] for measured in by_seed.values() if measured.get(column) is not None]
            row[column] = statistics.mean(values) if values else None
            row[f"{column}_std"] = statistics.stdev(values) if len(values) > 1 else None
        rows.append(row)
    return rows


def contributions(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The gain in PSNR (dB) of each part, seed by seed: rows with it minus rows without it."""
    found = []
    for (part, without, with_it), bits in itertools.product(PAIRS, ACTIVATION_BITS):
        before, after = (results.get(f"{name}, W4A{bits}", {}) for name in (without, with_it))
        gains = [after[seed]["psnr_db"] - before[seed]["psnr_db"] for seed in before if seed in after]
        if len(gains) > 1:
            mean, deviation = statistics.mean(gains), statistics.stdev(gains)
            gained = {"psnr_db": mean, "psnr_db_std": deviation, "psnr_db_by_seed": gains}
            found.append({"part": part, "activation_bits": bits, **gained})
    return found


def page(report: Mapping[str, Any], plot: str) -> str:
    """The report in Markdown: the table, the gain of each part, and the plot, a file of that name."""
    rows, environment = report["summary"], report["environment"]
    versions = [f"{name} {version}" for name, version in environment["versions"].items()]
    versions += sorted({row["library"] for row in rows if row["library"]})
    lines = [
        f"# Image quality: {report['task']}",
        "",
        f"{report['images']} images a seed, {report['steps']} steps, {report['calibration_samples']} calibration",
        f"samples; `{report['command']}`, {environment['date']}, {environment['cpu_model']}, {', '.join(versions)}.",
        "The columns are described in `benchmarks/quality/compare.py`.",
        "",
        *_table(rows),
        "",
    ]
    if report["contributions"]:
        lines += ["| part | of | adds to PSNR, dB | seed by seed |", "|---|---|---|---|"]
        for part in report["contributions"]:
            seeds = ", ".join(f"{gain:+.1f}" for gain in part["psnr_db_by_seed"])
            gain = f"{part['psnr_db']:+.1f} ± {part['psnr_db_std']:.1f}"
            lines += [f"| {part['part']} | W4A{part['activation_bits']} | {gain} | {seeds} |"]
        lines += [""]
    return "\n".join([*lines, f"![PSNR of every method, and against the size of the UNet]({plot})", ""])


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    columns = {name: column for name, column in COLUMNS.items() if any(row[name] is not None for row in rows)}
    titles = ["method", "seeds", "W/A", *(title for title, _ in columns.values())]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        cells = [row["name"], str(row["seeds"]), f"{row['weight_bits']}/{row['activation_bits']}"]
        for column, (_, form) in columns.items():
            spread = row[f"{column}_std"]
            cell = "-" if row[column] is None else form.format(row[column])
            if spread is not None and column not in ("unet_mb", "calibration_seconds", "calibration_peak_mb"):
                cell += " ± " + form.replace("+", "").format(spread)
            cells.append(cell)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plots PSNR of our own methods, which have equal sizes, and PSNR of all against the size of the UNet."""
    by_name = {row["name"]: row for row in rows if row["psnr_db"] is not None}
    figure = Figure(figsize=(11, 4.5), dpi=150, layout="constrained")
    methods, sizes = figure.subplots(1, 2, width_ratios=(1, 1.2))
    _plot_methods(methods, by_name)
    _plot_sizes(sizes, by_name)
    for axes in (methods, sizes):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def _plot_methods(axes: Axes, by_name: Mapping[str, Any]) -> None:
    names = [
        name for name in METHODS if name != LINEARS_ALONE and any(f"{name}, W4A{bits}" in by_name for bits in COLOURS)
    ]
    for bits, colour in COLOURS.items():
        chosen = [(y, by_name[f"{name}, W4A{bits}"]) for y, name in enumerate(names) if f"{name}, W4A{bits}" in by_name]
        if chosen:
            axes.errorbar(
                [row["psnr_db"] for _, row in chosen], [y for y, _ in chosen],
                xerr=[row["psnr_db_std"] or 0 for _, row in chosen], fmt="o", ms=5, lw=1.5, color=colour,
                label=f"W4A{bits}",
            )  # fmt: skip
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("PSNR to fp32 at equal noise, dB")
    axes.grid(axis="x", lw=0.4)
    if names:
        axes.legend(frameon=False, fontsize=8, loc="upper right")


def _plot_sizes(axes: Axes, by_name: Mapping[str, Any]) -> None:
    shown = {f"{name}, W4A{bits}": "dq_runtime" for name in (BEST, LATE_LAYERS_KEPT, LINEARS_ALONE) for bits in COLOURS}
    shown |= {name: name.split()[0] for name in PEERS}
    for name, library in shown.items():
        if name in by_name:
            row = by_name[name]
            colour = _colour(row)
            axes.errorbar(
                row["unet_mb"], row["psnr_db"], row["psnr_db_std"] or 0, fmt=MARKERS[library], ms=7, lw=1.5,
                zorder=3 if library == "dq_runtime" else 2,
                color=colour, mfc=colour if row["quantized_weight_share"] > 0.9 else "white",
            )  # fmt: skip
    axes.margins(x=0.1)
    axes.set_xlim(left=0)
    axes.set_xlabel("UNet, MB")
    axes.set_ylabel("PSNR to fp32 at equal noise, dB")
    axes.grid(lw=0.4)

    def sample(label: str, marker: str = "o", colour: str = "black", face: str | None = None) -> Line2D:
        return Line2D([], [], ls="", marker=marker, color=colour, mfc=face or colour, label=label)

    libraries = [sample(library, marker) for library, marker in MARKERS.items()]
    bits = [sample(f"W4A{bits}", "s", colour) for bits, colour in COLOURS.items()]
    bits += [sample("4-bit weights alone", "s", WEIGHT_ONLY), sample("8-bit weights", "s", EIGHT_BIT_WEIGHTS)]
    bits += [sample("hollow: convolutions in fp32", face="white")]
    axes.legend(handles=libraries + bits, frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def _colour(row: Mapping[str, Any]) -> str:
    if row["weight_bits"] > 4:
        return EIGHT_BIT_WEIGHTS
    return COLOURS.get(row["activation_bits"], WEIGHT_ONLY)
