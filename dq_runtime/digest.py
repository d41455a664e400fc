"""The digest of a checkpoint: a checksum of every tensor and of the quantization config.

Saving adds it to the tensors, as ``checkpoint_digest`` of the first quantized layer; loading compares it with the
tensors as they are stored, and removes it. It is made from the model's own tensors, so files may be renamed, merged and
sharded. A checkpoint without one, from an older version, is loaded with a warning.
"""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dq_runtime.config import DilateQuantConfig
from dq_runtime.layers import QuantizedLayer, quantized_layers

NAME = "checkpoint_digest"


def checksum(name: str, tensor: torch.Tensor) -> int:
    """CRC-32 of a tensor's name, dtype, shape and bytes."""
    start = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy().data, start) if flat.numel() else start


def digest(checksums: Mapping[str, int], config: DilateQuantConfig) -> torch.Tensor:
    """The checksums in the order of the tensors' names, and then that of the config: [tensors + 1] int64."""
    text = json.dumps(config.to_diff_dict(), sort_keys=True)
    return torch.tensor([*(checksums[name] for name in sorted(checksums)), zlib.crc32(text.encode())])


def with_digest(state_dict: Mapping[str, torch.Tensor], config: DilateQuantConfig) -> dict[str, torch.Tensor]:
    """The tensors of a quantized model, and their digest."""
    layers = [name.removesuffix(".weight_dilation") for name in state_dict if name.endswith(".weight_dilation")]
    if not layers:
        return dict(state_dict)
    table = digest({name: checksum(name, tensor) for name, tensor in state_dict.items()}, config)
    return {**state_dict, f"{min(layers)}.{NAME}": table}


def expect(model: nn.Module) -> None:
    """Makes room for the digest in a model whose quantized layers are empty, so that a loader fills it."""
    tensors, holder = len(model.state_dict()), _holder(model)
    if holder is not None:
        holder.register_buffer(NAME, torch.empty(tensors + 1, dtype=torch.int64, device="meta"))


def verify(model: nn.Module, checksums: Mapping[str, int], config: DilateQuantConfig) -> None:
    """Compares the loaded digest with the tensors that were read, and removes it from the model.

    Nothing is compared if the checkpoint has no digest, or the digest was offloaded to disk unread.

    Args:
        checksums: of the tensors as they are stored; tensors that were offloaded to disk unread may be missing.

    Raises:
        ValueError: if a tensor or the config is not that of the save which wrote the digest.
    """
    holder = _holder(model)
    if holder is None:
        return
    loaded = holder._buffers.pop(NAME, None)
    if loaded is None or loaded.is_meta:
        return
    names = sorted(model.state_dict())
    if len(loaded) != len(names) + 1:
        raise ValueError(
            f"The checkpoint was saved with {len(loaded) - 1} tensors, this model has {len(names)}: config.json is "
            "from another save. Download or save all files again"
        )
    expected = dict(zip(names, loaded[:-1].tolist(), strict=True))
    differing = [name for name in names if name in checksums and checksums[name] != expected[name]]
    if differing:
        listed = ", ".join(differing[:5]) + (f" and {len(differing) - 5} more" if len(differing) > 5 else "")
        raise ValueError(
            f"{len(differing)} of {len(names)} tensors are not those that were saved with this checkpoint: {listed}. "
            "The file that holds them is corrupt or from another save: download or save all files again"
        )
    if int(loaded[-1]) != int(digest({}, config)[0]):
        raise ValueError(
            "The quantization_config in config.json is not the one that was saved with these tensors. It was edited or "
            "is from another save: download or save all files again"
        )


def expect_none(model: nn.Module) -> None:
    """Takes back ``expect`` for a checkpoint without a digest, and warns that damage may go unnoticed."""
    holder = _holder(model)
    if holder is not None:
        holder._buffers.pop(NAME, None)
    warnings.warn(
        "This checkpoint was written by an older version and has no digest, so damage can go unnoticed. Call "
        "save_pretrained to add one",
        stacklevel=2,
    )


def _holder(model: Any) -> QuantizedLayer | None:
    """The first quantized layer, which is in every device map, unlike the model itself; None if there is none."""
    layers = quantized_layers(model)
    return layers[min(layers)] if layers else None
