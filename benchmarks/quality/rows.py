"""The rows of the comparison: their names, and the measurement of one row."""

from __future__ import annotations

import importlib.metadata
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dq_runtime
from benchmarks.peers import unets
from benchmarks.quality import peak_memory
from benchmarks.quality.methods import ACTIVATION_BITS, METHODS, ONLY_AT, QUICK
from benchmarks.quality.subjects import SUBJECTS
from dq_runtime.evaluation.metrics import pooled_psnr, psnr, ssim

FP32 = "fp32"


def row_names(quick: bool) -> list[str]:
    """fp32, every method at each number of activation bits, and the other libraries."""
    methods = [
        (name, bits)
        for bits in ACTIVATION_BITS
        for name in (QUICK if quick else METHODS)
        if ONLY_AT.get(name, bits) == bits
    ]
    ours = [f"{name}, W4A{bits}" for name, bits in methods]
    return [FP32, *ours, *([] if quick else unets.PEERS)]


def rows_to_measure(quick: bool) -> list[str]:
    """All rows, except the libraries that are not installed."""
    peers = unets.PEERS
    return [name for name in row_names(quick) if name not in peers or not unets.missing(peers[name])]


def quantized(name: str, unet: Any, calibration_set: Any, seed: int) -> tuple[Any, int, int]:
    """The row's UNet, its weight bits and its activation bits."""
    if name == FP32:
        return unet, 32, 32
    if name in unets.PEERS:
        peer = unets.PEERS[name]
        return peer.quantize(unet, calibration_set), peer.weight_bits, peer.activation_bits
    method, bits = name.rsplit(", W4A", 1)
    return METHODS[method](unet, calibration_set, int(bits), seed), 4, int(bits)


def measure(task_name: str, name: str, seed: int, images: int, folder: Path) -> dict[str, Any]:
    """Quantizes and samples. A seed's fp32 row has to be measured first: it makes the data of the other rows."""
    subject = SUBJECTS[task_name]
    unet = subject.unet()
    calibration_file = folder / f"calibration_{seed}.pt"
    if name == FP32:
        subject.collect(unet, images, seed).save(calibration_file)
    calibration_set = dq_runtime.CalibrationSet.load(calibration_file)
    start = time.perf_counter()
    with peak_memory.above_now() as peak:
        model, weight_bits, activation_bits = quantized(name, unet, calibration_set, seed)
    seconds = time.perf_counter() - start
    drawn = subject.draw(model, images, seed)
    reference_file = folder / f"fp32_{seed}.pt"
    if name == FP32:
        partial = reference_file.with_suffix(".partial")
        torch.save(drawn, partial)
        partial.replace(reference_file)
    reference = torch.load(reference_file)
    distances = [subject.frechet(batch, seed) for batch in (drawn, reference)]
    psnr_of_sets = [float(values.mean()) for values in np.split(psnr(drawn, reference), subject.sets)]
    peer = unets.PEERS.get(name)
    return {
        "library": None if peer is None else f"{peer.package} {importlib.metadata.version(peer.package)}",
        "weight_bits": weight_bits,
        "activation_bits": activation_bits,
        "label_accuracy": subject.accuracy(drawn, seed),
        "psnr_db": None if name == FP32 else psnr_of_sets[0],
        "guided_psnr_db": None if name == FP32 or subject.sets == 1 else psnr_of_sets[1],
        "pooled_psnr_db": None if name == FP32 else pooled_psnr(drawn, reference),
        "ssim": None if name == FP32 else ssim(drawn, reference),
        "frechet": distances[0],
        "frechet_increase": distances[0] - distances[1],
        "unet_mb": unets.size_mb(model),
        "quantized_weight_share": None if name == FP32 else unets.coverage(model, unet).weight_share,
        "calibration_seconds": None if name == FP32 else seconds,
        "calibration_peak_mb": None if name == FP32 else peak["allocated_mb"],
    }
