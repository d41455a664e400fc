"""What an interrupted distillation has finished, on disk."""

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
    """What an interrupted calibration has finished: a file for each block.

    Args:
        fingerprint: of all that decides about the result.

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
                    f"{folder} holds the blocks of another calibration (other weights, data or settings). Load the "
                    "calibration set that was saved with it to go on; or delete it, or give Distillation another folder"
                )
        else:
            record.write_text(json.dumps({"fingerprint": fingerprint}) + "\n")

    def save(self, name: str, layers: Mapping[str, SimulatedLayer]) -> None:
        """Writes a block, whole or not at all."""
        tensors = {
            f"{layer}.{key}": tensor.cpu().contiguous()
            for layer, state in states_of(layers).items()
            for key, tensor in state.items()
        }
        partial = self._file(name).with_suffix(".partial")
        save_file(tensors, partial)
        partial.replace(self._file(name))

    def restore(self, name: str, layers: Mapping[str, SimulatedLayer]) -> bool:
        """Gives a block's layers what was written; False if there is nothing, or nothing that can be read."""
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
    """Of the floating-point weights, the training data and the settings, which JSON can hold."""
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
