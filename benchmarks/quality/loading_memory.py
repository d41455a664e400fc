"""Peak host memory of quantization on loading, with random weights in the shape of a large UNet.

    python -m benchmarks.quality.loading_memory [--unet sd15] [--shard-mb 1000 4000] [--candidates 64]

A floating-point checkpoint in fp16 is written in shards of each size, the last of which holds it whole, then loaded
with ``quantization_config`` in a process of its own. The bound is the memory of the process before (Python, torch,
diffusers), the largest shard and the packed model. The peak is all resident memory, the pages of mapped shards
included, which the system may drop. Fewer candidates of the weights' scales take less time and the same memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file

import dq_runtime
from benchmarks import process_memory
from benchmarks.command_line import new_parser
from benchmarks.quality.peak_memory import above_now
from benchmarks.quality.study import write_report
from benchmarks.result_files import ROOT
from benchmarks.unets import CONFIGS
from dq_runtime import on_loading
from dq_runtime.layers import quantized_layers
from dq_runtime.weights import CANDIDATES, quantize_dilated

NAME = "diffusion_pytorch_model"


def shards(state_dict: dict[str, torch.Tensor], most_bytes: float) -> Iterator[dict[str, torch.Tensor]]:
    """Random fp16 tensors of the given names and shapes, in shards of at most ``most_bytes``."""
    shard: dict[str, torch.Tensor] = {}
    for name, empty in state_dict.items():
        fan_in = max(empty[0].numel(), 1) if empty.ndim > 1 else 1
        tensor = torch.randn(empty.shape, dtype=torch.float32).mul_(fan_in**-0.5).half()
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > most_bytes:
            yield shard
            shard = {}
        shard[name] = tensor
    yield shard


def write_checkpoint(name: str, folder: Path, most_bytes: float) -> None:
    """Writes the config and the shards of a random UNet; at most one shard is in memory."""
    model_class, config = CONFIGS[name]
    with torch.device("meta"):
        unet = model_class(**config)
    unet.save_config(folder)
    files: dict[str, list[str]] = {}
    for i, shard in enumerate(shards(unet.state_dict(), most_bytes)):
        files[f"{NAME}-{i}.safetensors"] = list(shard)
        save_file(shard, folder / f"{NAME}-{i}.safetensors", metadata={"format": "pt"})
    weight_map = {tensor: file for file, tensors in files.items() for tensor in tensors}
    (folder / f"{NAME}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def measure(name: str, folder: Path, candidates: int) -> dict[str, Any]:
    """Loads a checkpoint and measures the process."""
    torch.set_num_threads(1)
    few = partial(quantize_dilated, candidates=candidates)
    sizes = [file.stat().st_size / 1e6 for file in folder.glob("*.safetensors")]
    before, start = process_memory.reset_peak() / 1e6, time.perf_counter()
    with mock.patch.object(on_loading, "quantize_dilated", few), above_now() as peak:
        unet = CONFIGS[name][0].from_pretrained(
            folder, quantization_config=dq_runtime.DilateQuantConfig(), torch_dtype=torch.float16
        )
    seconds = time.perf_counter() - start
    packed = sum(tensor.nbytes for tensor in [*unet.parameters(), *unet.buffers()]) / 1e6
    return {
        "shards": len(sizes),
        "checkpoint_mb": sum(sizes),
        "largest_shard_mb": max(sizes),
        "packed_model_mb": packed,
        "largest_weight_fp32_mb": max(4 * layer.weight.numel() for layer in quantized_layers(unet).values()) / 1e6,
        "resident_before_mb": before,
        "peak_resident_mb": process_memory.peak() / 1e6,
        "bound_mb": before + max(sizes) + packed,
        "peak_without_mapped_files_mb": peak["resident_mb"],  # above the level before
        "seconds": seconds,
    }


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--unet", choices=CONFIGS, default="sd15")
    parser.add_argument("--shard-mb", type=float, nargs="+", default=[1000, 4000])
    parser.add_argument("--candidates", type=int, default=CANDIDATES)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # the folder of a measurement's process
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.unet, arguments.measure, arguments.candidates)))
        return
    command = [sys.executable, "-m", "benchmarks.quality.loading_memory", "--unet", arguments.unet]
    command += ["--candidates", str(arguments.candidates), "--measure"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    rows = []
    for most in arguments.shard_mb:
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(arguments.unet, Path(folder), 1e6 * most)
            done = subprocess.run(
                [*command, folder], stdout=subprocess.PIPE, text=True, env=environ, cwd=ROOT, check=True
            )
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps(rows[-1], indent=1), flush=True)
    options = f"--unet {arguments.unet} --shard-mb {' '.join(f'{most:g}' for most in arguments.shard_mb)}"
    options += f" --candidates {arguments.candidates}"
    write_report("loading_memory", options, arguments.unet, {"rows": rows}, arguments.output, threads=1)


if __name__ == "__main__":
    main()
