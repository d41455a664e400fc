"""Trees of tensors, numbers and strings in a file of the safetensors format, with a checksum of everything.

The structure is JSON in the file's metadata. A tensor in several places of a tree is stored once. Tensors keep their
memory layout, because the rounding of results computed from them depends on it.
"""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from dq_runtime.digest import checksum
from dq_runtime.files import write_tensors

PLAIN = (bool, int, float, str, type(None))
STRUCTURE, CHECKSUM = "structure", "checksum"  # keys of the metadata


def write_tree(stream: BinaryIO, tree: Any) -> None:
    """Writes a tree of dicts, lists, tuples, CPU tensors, numbers, strings and None.

    Raises:
        ValueError: if it holds anything else; the error names the place.
    """
    tensors: dict[str, torch.Tensor] = {}
    keys: dict[tuple[Any, ...], str] = {}
    encoded = _encoded(tree, "", tensors, keys)
    checksums = {key: checksum(key, tensor) for key, tensor in tensors.items()}
    structure = json.dumps({"tree": encoded, "checksums": checksums})
    write_tensors(stream, tensors, {STRUCTURE: structure, CHECKSUM: str(zlib.crc32(structure.encode()))})


def read_tree(file: Path) -> Any:
    """Reads a file of ``write_tree`` and compares all checksums. The tensors stay in the file and are read on use.

    Raises:
        ValueError: if the file is damaged or of another kind.
        OSError: if it cannot be opened.
    """
    try:
        with safe_open(file, "pt") as content:
            metadata, tensors = content.metadata(), {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118
        structure = metadata[STRUCTURE]
        if int(metadata[CHECKSUM]) != zlib.crc32(structure.encode()):
            raise ValueError("the checksum of its structure differs")
        content = json.loads(structure)
        if {key: checksum(key, tensor) for key, tensor in tensors.items()} != content["checksums"]:
            raise ValueError("the checksum of a tensor differs")
        return _decoded(content["tree"], tensors)
    except (SafetensorError, LookupError, TypeError, AttributeError, RuntimeError, RecursionError) as error:
        raise ValueError(str(error)) from error


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's elements in the order of its memory, [n] on the CPU, without a copy where it has no gaps."""
    tensor = tensor.detach().cpu()
    if tensor.stride() != torch.empty_like(tensor, device="meta").stride():
        tensor = torch.empty_like(tensor).copy_(tensor)
    return tensor.as_strided((tensor.numel(),), (1,))


def _encoded(tree: Any, place: str, tensors: dict[str, torch.Tensor], keys: dict[tuple[Any, ...], str]) -> Any:
    """A tree as JSON; its tensors are added to ``tensors``, and their identities to ``keys``."""
    if isinstance(tree, torch.Tensor):
        identity = tree.data_ptr(), tree.dtype, tree.shape, tree.stride(), id(tree) if not tree.numel() else None
        key = keys.setdefault(identity, str(len(keys)))
        if key not in tensors:
            tensors[key] = flat(tree)
        return {"tensor": [key, list(tree.shape), list(torch.empty_like(tree, device="meta").stride())]}
    if isinstance(tree, dict):
        for name in tree:
            if not isinstance(name, (str, int)):
                raise ValueError(f"{place} has a key that is a {type(name).__name__}, which cannot be saved")
        return {"dict": [[name, _encoded(tree[name], f"{place}[{name!r}]", tensors, keys)] for name in tree]}
    if type(tree) in (list, tuple):
        items = [_encoded(item, f"{place}[{i}]", tensors, keys) for i, item in enumerate(tree)]
        return {type(tree).__name__: items}
    if not isinstance(tree, PLAIN):
        raise ValueError(f"{place} is a {type(tree).__name__}, which cannot be saved")
    return tree


def _decoded(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "tensor":
        key, shape, stride = content
        if math.prod(shape) != tensors[key].numel():
            raise ValueError(f"tensor {key} has another number of elements than its shape")
        return tensors[key].as_strided(shape, stride)
    if kind == "dict":
        return {name: _decoded(item, tensors) for name, item in content}
    items = [_decoded(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items
