"""The folder of a distillation: its finished blocks, from which an interrupted calibration resumes, and its lock."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from dq_runtime.calibration import ranks
from dq_runtime.calibration.collect import RecordedCall
from dq_runtime.calibration.simulated import SimulatedLayer, set_states, states_of
from dq_runtime.calibration.tree_files import read_tree, write_tree
from dq_runtime.files import OWNER_ONLY, lock, replacing

logger = logging.getLogger("dq_runtime")

ACTIVATIONS, RECORD = "activations", "calibration.json"
LOCK, TEMPORARY_LOCK = "calibration.lock", "temporary.lock"  # of the user's and of temporary folders
TEMPORARY = "dq_runtime_"  # prefix of temporary folders


class FinishedBlocks:
    """The finished blocks of an interrupted calibration, one file per block. The first rank alone has the files.

    Args:
        fingerprint: digest of everything that determines the result. Each block's file holds it.

    Raises:
        ValueError: if the folder holds the blocks of another calibration.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder, self.fingerprint = folder, fingerprint
        record = folder / RECORD
        if not ranks.is_first():
            return
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
            with replacing(record) as stream:
                stream.write(json.dumps({"fingerprint": fingerprint}).encode() + b"\n")

    def save(self, name: str, layers: Mapping[str, SimulatedLayer]) -> None:
        """Writes a block's file atomically, with checksums."""
        if not ranks.is_first():
            return
        with replacing(self._file(name)) as stream:
            write_tree(stream, {"block": name, "fingerprint": self.fingerprint, "layers": states_of(layers)})

    def restore(self, name: str, layers: Mapping[str, SimulatedLayer]) -> bool:
        """Loads a block's file into its layers. Returns False if there is no file, or it cannot be read."""
        if not ranks.from_first(ranks.is_first() and self._restore(name, layers)):
            return False
        if ranks.count() > 1:
            set_states(layers, ranks.from_first(states_of(layers)))
        return True

    def _restore(self, name: str, layers: Mapping[str, SimulatedLayer]) -> bool:
        if not self._file(name).exists():
            return False
        try:
            content = read_tree(self._file(name))
            if (content["block"], content["fingerprint"]) != (name, self.fingerprint):
                raise ValueError("it holds another block")
            set_states(layers, content["layers"])
        except (LookupError, OSError, TypeError, ValueError) as error:
            logger.warning("%s cannot be read (%s): %s is distilled again", self._file(name), error, name)
            return False
        logger.info("%s: taken from %s", name, self.folder)
        return True

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


@contextmanager
def work_folder(folder: Path | None) -> Iterator[tuple[Path, str]]:
    """The folder of a distillation, locked inside the ``with`` block, and a prefix for its files of activations.

    What a killed process left is removed: activations in the given folder, by the prefix that its lock file holds, or
    temporary folders. The first rank holds the lock of the given folder; the other ranks have prefixes that start with
    its own, and may be on other machines. Each rank has a temporary folder of its own.

    Args:
        folder: created if it does not exist; None for a temporary folder.

    Raises:
        ValueError: if another process calibrates in the folder.
    """
    if folder is not None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if ranks.is_first():
            with _locked(folder, LOCK) as prefix:
                ranks.from_first(prefix)
                yield folder, prefix
        else:
            yield folder, f"{ranks.from_first('')}{ranks.number()}."
        return
    for left in Path(tempfile.gettempdir()).glob(f"{TEMPORARY}*"):
        with suppress(OSError, ValueError):
            if left.lstat().st_uid == os.getuid() and not left.is_symlink() and (left / TEMPORARY_LOCK).exists():
                with _locked(left, TEMPORARY_LOCK):
                    shutil.rmtree(left)
    with ExitStack() as stack:
        own_prefix = None
        while own_prefix is None:  # else another process has just taken the new folder for one that was left
            made = tempfile.TemporaryDirectory(prefix=TEMPORARY, ignore_cleanup_errors=True)
            temporary = Path(stack.enter_context(made))
            with suppress(FileNotFoundError, ValueError):
                own_prefix = stack.enter_context(_locked(temporary, TEMPORARY_LOCK))
        yield temporary, own_prefix


@contextmanager
def _locked(folder: Path, name: str) -> Iterator[str]:
    """Holds a folder's lock file, and removes it at the end; gives the new prefix that it holds."""
    file = folder / name
    descriptor = _lock_file(file)
    try:
        left = os.read(descriptor, 100).decode(errors="replace")
        if re.fullmatch(r"[0-9a-f]{16}\.", left):
            for activations in (folder / ACTIVATIONS).glob(f"{left}*.safetensors"):
                activations.unlink()
        prefix = f"{secrets.token_hex(8)}."
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, prefix.encode(), 0)
        os.fsync(descriptor)
        try:
            yield prefix
        finally:
            file.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _lock_file(file: Path) -> int:
    """The descriptor of a lock file that this process holds."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, OWNER_ONLY)
        if not lock(descriptor, wait=False):
            os.close(descriptor)
            raise ValueError(
                f"Another process calibrates in {file.parent}. Wait for its end, or give Distillation another folder"
            )
        if os.fstat(descriptor).st_nlink:  # else its holder has just removed it
            return descriptor
        os.close(descriptor)


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


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
