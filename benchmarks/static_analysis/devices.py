"""Ceilings of GPUs: tensor arithmetic and memory traffic, from data sheets and as measured."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.result_files import RESULTS


class Ceiling(NamedTuple):
    """The peak rate of a device per second, and the source of the figure."""

    per_second: float
    source: str


@dataclass(frozen=True)
class Device:
    """Dense tensor arithmetic (a multiplication and an addition are two operations) and memory traffic in bytes."""

    fp16: Ceiling
    int8: Ceiling
    memory: Ceiling


def _measured(file: str) -> Device:
    """The results of ``benchmarks.speed.ceilings``; the int8 ceiling is the faster of cuBLASLt's product and ours."""
    path = RESULTS / file
    found = json.loads(path.read_text(encoding="utf-8"))
    source = f"{path.name}: {found['device']}, torch {found['versions']['torch']}, {found['date']}"
    int8, by = max((found["int8_tops"], "cuBLASLt"), (found["int4_tops"], "our INT4 GEMM"))
    return Device(
        Ceiling(found["fp16_tflops"] * 1e12, source),
        Ceiling(int8 * 1e12, f"{source}; {by}"),
        Ceiling(found["copy_tbps"] * 1e12, f"{source}; reads and writes counted"),
    )


GA102 = "NVIDIA Ampere GA102 whitepaper v2, appendix A, GeForce RTX 3090"
AD102 = "NVIDIA Ada GPU architecture whitepaper, appendix A, GeForce RTX 4090"
A100 = "NVIDIA A100 datasheet, SXM 80 GB, without sparsity"
H100 = "NVIDIA H100 datasheet, SXM 80 GB, half of what it states with sparsity"
H200 = "NVIDIA H200 datasheet, SXM, half of what it states with sparsity"
FP32_ACCUMULATION = "FP16 with FP32 accumulation, as PyTorch computes; twice that with FP16 accumulation"

DEVICES = {
    "RTX 3090": Device(
        Ceiling(71e12, f"{GA102}: {FP32_ACCUMULATION}"), Ceiling(284e12, GA102), Ceiling(0.936e12, GA102)
    ),
    "RTX 4090": Device(
        Ceiling(165.2e12, f"{AD102}: {FP32_ACCUMULATION}"), Ceiling(660.6e12, AD102), Ceiling(1.008e12, AD102)
    ),
    "A100": Device(Ceiling(312e12, A100), Ceiling(624e12, A100), Ceiling(2.039e12, A100)),
    "H100": Device(Ceiling(989.5e12, H100), Ceiling(1979e12, H100), Ceiling(3.35e12, H100)),
    "H100 (measured)": _measured("ceilings_nvidia_h100_80gb_hbm3.json"),
    "H200": Device(Ceiling(989.5e12, H200), Ceiling(1979e12, H200), Ceiling(4.8e12, H200)),
}
