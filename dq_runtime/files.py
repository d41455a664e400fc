"""Files that are written whole or not at all, and locks.

A file is written beside its place under a name of its own, opened exclusively and readable by its owner alone, and then
renamed. The writer holds a lock on it, so what a killed process left is known by its free lock: the next writer of the
same file removes it. On file systems without locks, and on Windows, it stays.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import torch

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

CAN_LOCK = fcntl is not None
NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
OWNER_ONLY = 0o600
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@contextmanager
def replacing(file: Path) -> Iterator[BinaryIO]:
    """Opens a new file that replaces ``file`` at the end of the ``with`` block; an error leaves the old one.

    A link at ``file`` is replaced, not followed.
    """
    for left in left_behind(file):
        with suppress(OSError):
            left.unlink()
    with _locked_new_file(file) as stream:
        partial = Path(stream.name)
        try:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
            if not CAN_LOCK:
                stream.close()  # Windows renames no open file
            partial.replace(file)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    sync_folder(file.parent)


def _locked_new_file(file: Path) -> BinaryIO:
    """A new file beside another one, locked."""
    while True:
        stream = new_file(temporary_name(file))
        lock(stream.fileno())
        if os.fstat(stream.fileno()).st_nlink:  # else another process took it for one that was left behind
            return stream
        stream.close()


def new_file(file: Path) -> BinaryIO:
    """Opens a file that does not exist yet, for its owner alone."""
    return open(file, "xb", opener=_private)


def temporary_name(path: Path) -> Path:
    """A name beside a file or folder that nothing has."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")


def left_behind(path: Path) -> Iterator[Path]:
    """What killed processes left under temporary names of a file or folder: nobody holds its lock."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{16}}\.partial")
    for candidate in path.parent.iterdir() if CAN_LOCK and path.parent.is_dir() else ():
        if pattern.fullmatch(candidate.name):
            with suppress(OSError), opened(candidate) as descriptor:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield candidate


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """The descriptor of an existing file or folder; a link raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | NO_LINK)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def lock(descriptor: int, wait: bool = True) -> bool:
    """Locks an open file or folder until it is closed. Returns False if another process holds the lock.

    It returns True on file systems without locks, and on Windows.
    """
    if not CAN_LOCK:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def sync_folder(folder: Path) -> None:
    """Writes a folder's entries to the disk; Windows does so by itself."""
    if not CAN_LOCK:
        return
    with opened(folder) as descriptor:
        os.fsync(descriptor)


def write_tensors(stream: BinaryIO, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Writes contiguous CPU tensors in the safetensors format, one after the other and without a copy of all.

    Raises:
        ValueError: if the format has no such dtype.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    names, end = sorted(tensors, key=lambda name: -tensors[name].element_size()), 0  # aligned for their dtypes
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name}: tensors of {tensor.dtype} cannot be saved")
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        if tensors[name].numel():
            stream.write(tensors[name].detach().reshape(-1).view(torch.uint8).numpy().data)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | NO_LINK, OWNER_ONLY)
