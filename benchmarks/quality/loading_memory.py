"""Peak host memory of quantization on loading, with random weights in the shape of a large UNet.

    python -m benchmarks.quality.loading_memory [--unet sd15] [--shard-mb 500] [--output FILE]

A floating-point checkpoint in fp16 is written shard by shard, then loaded with ``quantization_config``. The bound is
one shard, the packed model, and the fp32 copies of the largest weight that the search for its scales makes. Shards are
mapped files, whose pages the system may drop; they are in neither peak.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

import dq_runtime
from benchmarks.command_line import new_parser
from benchmarks.quality.peak_memory import above_now
from benchmarks.quality.study import write_report
from benchmarks.unets import CONFIGS
from dq_runtime.layers import quantized_layers

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


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--unet", choices=CONFIGS, default="sd15")
    parser.add_argument("--shard-mb", type=float, default=500)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_checkpoint(arguments.unet, folder, 1e6 * arguments.shard_mb)
        sizes = [file.stat().st_size / 1e6 for file in folder.glob("*.safetensors")]
        start = time.perf_counter()
        with above_now() as peak:
            unet = CONFIGS[arguments.unet][0].from_pretrained(
                folder, quantization_config=dq_runtime.DilateQuantConfig(), torch_dtype=torch.float16
            )
        seconds = time.perf_counter() - start
        layers = quantized_layers(unet).values()
        tensors = [*unet.parameters(), *unet.buffers()]
        results = {
            "checkpoint_mb": sum(sizes),
            "largest_shard_mb": max(sizes),
            "packed_model_mb": sum(tensor.nbytes for tensor in tensors) / 1e6,
            "largest_weight_fp32_mb": max(4 * layer.weight.numel() for layer in layers) / 1e6,
            "seconds": seconds,
            **{f"peak_{name}": value for name, value in peak.items()},
        }
        print(json.dumps(results, indent=1))
        options = f"--unet {arguments.unet} --shard-mb {arguments.shard_mb:g}"
        write_report("loading_memory", options, arguments.unet, results, arguments.output)


if __name__ == "__main__":
    main()
