"""The finished blocks of an interrupted distillation, on disk."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._pytree import tree_leaves

from dq_runtime.calibration.collect import RecordedCall
from dq_runtime.calibration.simulated import SimulatedLayer, set_states, states_of

logger = logging.getLogger("dq_runtime")


class FinishedBlocks:
    """The finished blocks of an interrupted calibration, one file per block.

    Args:
        fingerprint: digest of everything that determines the result.

    Raises:
        ValueError: if the folder holds the blocks of another calibration.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder
        record = folder / "calibration.json"
        if record.exists():
            try:
                found = json.loads(record.read_text())["fingerprint"]
            except (ValueError, KeyError, TypeError):
                found = "unreadable"
            if found != fingerprint:
                raise ValueError(
                    f"{folder} holds the blocks of another calibration (other weights, data or settings). To "
                    "resume it, load the saved calibration set. Otherwise delete it or give Distillation another folder"
                )
        else:
            record.write_text(json.dumps({"fingerprint": fingerprint}) + "\n")

    def save(self, name: str, layers: Mapping[str, SimulatedLayer]) -> None:
        """Writes a block's file atomically."""
        tensors = {
            f"{layer}.{key}": tensor.cpu().contiguous()
            for layer, state in states_of(layers).items()
            for key, tensor in state.items()
        }
        partial = self._file(name).with_suffix(".partial")
        save_file(tensors, partial)
        partial.replace(self._file(name))

    def restore(self, name: str, layers: Mapping[str, SimulatedLayer]) -> bool:
        """Loads a block's file into its layers. Returns False if there is no file, or it cannot be read."""
        if not self._file(name).exists():
            return False
        try:
            tensors = load_file(self._file(name))
            state = {n: {key: tensors[f"{n}.{key}"] for key in s} for n, s in states_of(layers).items()}
        except (SafetensorError, KeyError, OSError) as error:
            logger.warning("%s cannot be read (%s): %s is distilled again", self._file(name), error, name)
            return False
        set_states(layers, state)
        logger.info("%s: taken from %s", name, self.folder)
        return True

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def fingerprint(unet: nn.Module, batches: Iterable[RecordedCall], settings: Mapping[str, Any]) -> str:
    """A SHA-256 of the floating-point weights, the training data and the settings, which JSON can hold."""
    digest = hashlib.sha256(json.dumps(settings, default=str, sort_keys=True).encode())
    for name, parameter in sorted(unet.named_parameters()):
        digest.update(name.encode())
        digest.update(_bytes(parameter))
    for batch in batches:
        for leaf in tree_leaves((batch.sample, batch.timestep, batch.arguments)):
            digest.update(_bytes(leaf) if isinstance(leaf, torch.Tensor) else repr(leaf).encode())
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
