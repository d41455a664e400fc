"""The digest of a checkpoint: a checksum of every tensor, of the quantization config and of each field of config.json.

Saving adds it to the tensors, as ``checkpoint_digest`` of the first quantized layer; loading compares it with the
tensors as they are stored, and removes it. It is made from the model's own tensors, so files may be renamed, merged and
sharded. A checkpoint without one, from an older version, is loaded with a warning; so is one whose digest lacks the
fields.
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
REMEDY = "Download or save all files again"


def checksum(name: str, tensor: torch.Tensor) -> int:
    """CRC-32 of a tensor's name, dtype, shape and bytes."""
    start = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy().data, start) if flat.numel() else start


def fields_to_check(model_config: Mapping[str, Any], loaded: bool = False) -> dict[str, int]:
    """CRC-32 of each field of a model's config that its file holds, by name. The quantization config has its own.

    Args:
        loaded: if True, fields that the file lacked, for which diffusers took its defaults, are left out.
    """
    absent = model_config.get("_use_default_values", ()) if loaded else ()
    return {
        name: _crc_of_json({name: value})
        for name, value in model_config.items()
        if not name.startswith("_") and name != "quantization_config" and name not in absent
    }


def _crc_of_json(value: Any) -> int:
    text = json.dumps(value, sort_keys=True, default=lambda v: v.tolist() if hasattr(v, "tolist") else str(v))
    return zlib.crc32(text.encode())


def digest(checksums: Mapping[str, int], config: DilateQuantConfig, fields: Mapping[str, int]) -> torch.Tensor:
    """The checksums of tensors, sorted by name, of the config, and of fields: [tensors + 1 + fields] int64."""
    of_tensors, of_fields = ([table[name] for name in sorted(table)] for table in (checksums, fields))
    return torch.tensor([*of_tensors, _crc_of_json(config.to_diff_dict()), *of_fields])


def with_digest(
    state_dict: Mapping[str, torch.Tensor], config: DilateQuantConfig, model_config: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """The tensors of a quantized model, and their digest."""
    layers = [name.removesuffix(".weight_dilation") for name in state_dict if name.endswith(".weight_dilation")]
    if not layers:
        return dict(state_dict)
    checksums = {name: checksum(name, tensor) for name, tensor in state_dict.items()}
    table = digest(checksums, config, fields_to_check(model_config))
    return {**state_dict, f"{min(layers)}.{NAME}": table}


def expect(model: nn.Module) -> None:
    """Makes room for the digest, of any length, in a model with empty quantized layers, so that a loader fills it."""
    holder = _holder(model)
    if holder is not None:
        holder.register_buffer(NAME, torch.empty(0, dtype=torch.int64, device="meta"))


def verify(model: Any, checksums: Mapping[str, int], config: DilateQuantConfig) -> bool:
    """Compares the loaded digest with the tensors that were read, and removes it from the model.

    Nothing is compared if the checkpoint has no digest, or the digest was offloaded to disk unread.

    Args:
        checksums: of the tensors as they are stored; tensors that were offloaded to disk unread may be missing.

    Returns:
        True if all tensors were compared.

    Raises:
        ValueError: if a tensor or the config is not that of the save which wrote the digest.
    """
    holder = _holder(model)
    if holder is None:
        return False
    loaded = holder._buffers.pop(NAME, None)
    if loaded is None or loaded.is_meta:
        return False
    names, fields = sorted(model.state_dict()), fields_to_check(model.config, loaded=True)
    if len(loaded) == len(names) + 1:  # of an older version
        warn_without_digest("has no digest of config.json")
        fields = {}
    if len(loaded) != len(names) + 1 + len(fields):
        raise ValueError(
            f"The checkpoint was saved with {len(loaded) - 1} tensors and fields of config.json, this one has "
            f"{len(names) + len(fields)}: config.json was edited or is from another save. {REMEDY}"
        )
    expected = dict(zip(names, loaded[: len(names)].tolist(), strict=True))
    differing = [name for name in names if name in checksums and checksums[name] != expected[name]]
    if differing:
        listed = ", ".join(differing[:5]) + (f" and {len(differing) - 5} more" if len(differing) > 5 else "")
        raise ValueError(
            f"{len(differing)} of {len(names)} tensors are not those that were saved with this checkpoint: {listed}. "
            f"The file that holds them is corrupt or from another save. {REMEDY}"
        )
    found = digest({}, config, fields).tolist()
    saved = loaded[len(names) :].tolist()
    for name, value, now in zip(["quantization_config", *sorted(fields)], saved, found, strict=True):
        if value != now:
            raise ValueError(
                f"The {name} in config.json is not the one that was saved with these tensors. It was edited, is from "
                f"another save, or was given to from_pretrained. {REMEDY}"
            )
    return checksums.keys() >= expected.keys()


def warn_without_digest(lack: str = "has no digest") -> None:
    """Warns that damage in a checkpoint may go unnoticed."""
    warnings.warn(
        f"This checkpoint was written by an older version and {lack}, so damage can go unnoticed. Call "
        "save_pretrained to add one",
        stacklevel=2,
    )


def _holder(model: Any) -> QuantizedLayer | None:
    """The first quantized layer, which is in every device map, unlike the model itself; None if there is none."""
    layers = quantized_layers(model)
    return layers[min(layers)] if layers else None
