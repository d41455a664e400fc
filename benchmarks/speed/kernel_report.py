"""The results of ``bench_kernels.py``: rows with their share of the roofline, and a summary."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

import torch

from benchmarks.speed.kernel_cases import Case
from benchmarks.speed.kernel_sides import BASELINE, CUDA, OURS, Side
from benchmarks.static_analysis.devices import DEVICES, Device
from benchmarks.static_analysis.kernel_bounds import Kernel, layer_bound


def report(case: Case, side: Side, us: float) -> dict[str, Any]:
    """A row of the results: the case, us per call, TFLOP/s and the share of the device's roofline."""
    bound = bound_us(case, side)
    layer = None if case.chain else case.shapes[0]
    return {
        "group": case.group,
        "unet": case.unet,
        "kind": case.kind,
        "implementation": case.implementation,
        "us": round(us, 3),
        "gflop": round(side.operations / 1e9, 6),
        "tflops": round(side.operations / us / 1e6, 3),
        "roofline": None if bound is None else round(bound / us, 4),
        "layers": len(layer.names) if layer else 1,
    }


def ceilings(device: str) -> Device | None:
    """The published ceilings of a GPU by its name in PyTorch; None for other variants of the model."""
    if any(word in device for word in ("PCIe", "NVL", "40GB", "Laptop", "MIG", " Ti", " D")):
        return None
    matches = (name for name in DEVICES if re.search(rf"\b{re.escape(name)}(?=[- ]|$)", device))
    return next((DEVICES[name] for name in matches), None)


def bound_us(case: Case, side: Side) -> float | None:
    """The least time of our and the fp16 implementation on this device; None if the device is unknown.

    A layer's bound is ``layer_bound``. A chain's bound is the larger of the times for its operations and its reads.
    """
    device = ceilings(torch.cuda.get_device_name()) if CUDA else None
    if device is None or case.implementation not in (OURS, BASELINE):
        return None
    ours = case.implementation == OURS
    if case.chain is None:
        return 1e6 * layer_bound(case.shapes[0], device, "w4a8" if ours else "fp16", fused=False)
    arithmetic = "int8" if ours else "fp16"
    return 1e6 * Kernel("chain", arithmetic, side.operations, 0, side.bytes).seconds(device)


def speed_ups(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The speed-up over the baseline and the FLOPs of each group with both implementations."""
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["group"], {})[row["implementation"]] = row
    return [
        {
            **{name: by_name[OURS][name] for name in ("group", "unet", "kind")},
            "speed_up": by_name[BASELINE]["us"] / by_name[OURS]["us"],
            "gflop": by_name[OURS]["gflop"] * by_name[OURS]["layers"],
        }
        for by_name in groups.values()
        if OURS in by_name and BASELINE in by_name
    ]


def geometric_mean(ratios: Iterable[tuple[float, float]]) -> float:
    """The weighted geometric mean of (ratio, weight) pairs: exp(sum w ln r / sum w)."""
    pairs = list(ratios)
    return math.exp(sum(weight * math.log(ratio) for ratio, weight in pairs) / sum(weight for _, weight in pairs))


def summary(rows: Iterable[dict[str, Any]]) -> list[str]:
    """The last lines of a run: mean speed-ups, each chain, and every row that is slower than the baseline."""
    compared = speed_ups(rows)
    lines = []
    for unet, kind in dict.fromkeys((row["unet"], row["kind"]) for row in compared if row["kind"] != "chain"):
        pairs = [(row["speed_up"], row["gflop"]) for row in compared if (row["unet"], row["kind"]) == (unet, kind)]
        mean = geometric_mean(pairs)
        lines.append(f"{unet}, {kind}: {mean:.2f}x {BASELINE} (geometric mean of {len(pairs)} by FLOPs)")
    lines += [f"{row['group']}: {row['speed_up']:.2f}x {BASELINE}" for row in compared if row["kind"] == "chain"]
    slower = sorted((row for row in compared if row["speed_up"] < 1), key=lambda row: row["speed_up"])
    lines.append(f"slower than {BASELINE}: {len(slower)} of {len(compared)}")
    lines += [f"  {row['speed_up']:.2f}x  {row['group']}" for row in slower]
    return lines
