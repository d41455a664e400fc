"""Bounds on the speed of the benchmarks' UNets on GPUs, computed without a GPU.

    python -m benchmarks.static_analysis.roofline [--unet sd15]... [--batch 2] [--output FILE]

A forward pass is a list of kernels, each with a least time on a device; the bound is the sum over the kernels.
``kernel_bounds`` defines the kernels, unfused and fused, and their costs; ``devices`` has the ceilings.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import diffusers
import torch

from benchmarks.command_line import new_parser
from benchmarks.result_files import RESULTS
from benchmarks.static_analysis.devices import DEVICES
from benchmarks.static_analysis.kernel_bounds import (
    LAYER_VARIANTS,
    PRECISIONS,
    VARIANTS,
    Step,
    forward_kernels,
    layer_bound,
    layer_kernels,
    trace,
    weight_bytes,
)
from benchmarks.unets import CONFIGS, LayerShape, layers

OUTPUT = RESULTS / "roofline.json"


def by_kind(costs: Iterable[tuple[str, float]]) -> dict[str, float]:
    """The sum of the costs of each kind, from (kind, cost) pairs."""
    totals: dict[str, float] = {}
    for kind, cost in costs:
        totals[kind] = totals.get(kind, 0) + cost
    return totals


def operations(steps: list[Step]) -> dict[str, float]:
    """Multiplications and additions of one forward pass, by kind of layer."""

    def kind(step: Step) -> str:
        if step.shape is None or step.shape.kind == "linear":
            return step.shape.kind if step.shape else step.kind
        return "conv2d {}x{}".format(*step.shape.kernel_size)

    return by_kind((kind(step), step.operations) for step in steps if step.operations)


def layer_row(shape: LayerShape) -> dict[str, Any]:
    """Bytes and bounds of a single layer of one distinct shape."""
    kernels = {variant: layer_kernels(shape, *choice) for variant, choice in LAYER_VARIANTS.items()}
    return {
        "layer": shape.label,
        "count": len(shape.names),
        "operations": shape.operations,
        "weight_bytes": {name: weight_bytes(shape, PRECISIONS[name]) for name in ("fp16", "w4a8")},
        "activation_bytes": {variant: sum(k.activation_bytes for k in made) for variant, made in kernels.items()},
        "microseconds": {
            name: {v: 1e6 * layer_bound(shape, device, *choice) for v, choice in LAYER_VARIANTS.items()}
            for name, device in DEVICES.items()
        },
    }


def unet_report(name: str, batch: int) -> dict[str, Any]:
    """Operations, bytes and bounds of one UNet's forward pass by kind of kernel, and its distinct layers."""
    steps = trace(name, batch)
    kernels = {variant: forward_kernels(steps, *choice) for variant, choice in VARIANTS.items()}
    return {
        "operations": operations(steps),
        "weight_bytes": {variant: sum(k.weight_bytes for k in made) for variant, made in kernels.items()},
        "activation_bytes": {v: by_kind((k.kind, k.activation_bytes) for k in made) for v, made in kernels.items()},
        "milliseconds": {
            name: {v: by_kind((k.kind, 1e3 * k.seconds(device)) for k in made) for v, made in kernels.items()}
            for name, device in DEVICES.items()
        },
        "layers": [layer_row(shape) for shape in layers(name, batch)],
    }


def rounded(report: Any) -> Any:
    """The report with floating-point numbers rounded to six significant digits."""
    if isinstance(report, dict):
        return {key: rounded(value) for key, value in report.items()}
    if isinstance(report, list):
        return [rounded(value) for value in report]
    return float(f"{report:.6g}") if isinstance(report, float) else report


def table(reports: dict[str, dict[str, Any]]) -> str:
    """Milliseconds of a forward pass, and the bound on W4A8's speed-up over fp16."""
    lines = [["UNet", "device", *VARIANTS, "fp16/w4a8, both fused", "fp16 unfused/w4a8 fused"]]
    for name, report in reports.items():
        for device, variants in report["milliseconds"].items():
            times = {variant: sum(kinds.values()) for variant, kinds in variants.items()}
            ratios = [times[baseline] / times["w4a8 fused"] for baseline in ("fp16 fused", "fp16 unfused")]
            lines.append([name, device, *(f"{time:.3f}" for time in times.values()), *(f"{r:.2f}" for r in ratios)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def main() -> None:
    """Runs the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--unet", action="append", choices=CONFIGS, help="may be repeated (default: all)")
    parser.add_argument("--batch", type=int, default=2, help="batch size (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the JSON file (default: %(default)s)")
    arguments = parser.parse_args()
    reports = {name: rounded(unet_report(name, arguments.batch)) for name in arguments.unet or CONFIGS}
    print(table(reports))
    document = {
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "date": datetime.date.today().isoformat(),
        "batch": arguments.batch,
        "devices": {
            name: {ceiling: limit._asdict() for ceiling, limit in vars(device).items()}
            for name, device in DEVICES.items()
        },
        "unets": reports,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
