"""``save_pretrained`` of quantized models: a folder holds the old or the new checkpoint at any moment, never a mixture.

A checkpoint is written into a temporary folder, which then changes places with the old one in one step of the file
system. Other files of the old folder are in both, as hard links. Where folders cannot change places (a mount point, the
current folder, a folder of another owner, a file system without that step), files are renamed one by one. There
``config.json`` is removed first and comes last: an interruption in these milliseconds leaves what no loader takes for a
model.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial, wraps
from pathlib import Path
from typing import Any

from diffusers.models.modeling_utils import ModelMixin
from diffusers.quantizers.base import DiffusersQuantizer

from dq_runtime.files import CAN_LOCK, left_behind, lock, opened, sync_folder, temporary_name
from dq_runtime.layers import is_quantized
from dq_runtime.model_card import CARD, model_card
from dq_runtime.validation import path

CONFIG, STEM = "config.json", "diffusion_pytorch_model"  # diffusers' names
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux
_stock: Any = ModelMixin.save_pretrained


@wraps(_stock)
def save_pretrained(
    model: Any,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    save_function: Callable[..., Any] | None = None,
    safe_serialization: bool = True,
    variant: str | None = None,
    max_shard_size: int | str = "10GB",
    push_to_hub: bool = False,
    **kwargs: Any,
) -> None:
    """``ModelMixin.save_pretrained``, atomic for quantized models, except on Windows.

    Weights of an earlier save of the same variant are removed, in whichever format. A model card is written unless the
    folder has a README.md.

    Raises:
        OSError: if a quantized model cannot be written; its old checkpoint is as before.
    """
    save = partial(
        _stock, model, is_main_process=is_main_process, save_function=save_function,
        safe_serialization=safe_serialization, variant=variant, max_shard_size=max_shard_size, **kwargs,
    )  # fmt: skip
    if not is_quantized(model) or not CAN_LOCK or os.path.isfile(save_directory):  # diffusers logs an error for a file
        save(save_directory, push_to_hub=push_to_hub)
        return
    model.hf_quantizer.model_config = model.config  # for the digest: diffusers passes on the tensors alone
    folder = Path(os.path.realpath(path("save_directory", save_directory)))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _staging(folder) as staging:
        with _saved_tensors(model):
            save(staging)
        if is_main_process and not (folder / CARD).exists():
            (staging / CARD).write_text(model_card(model, model.hf_quantizer.quantization_config), encoding="utf-8")
        _replace(folder, staging, _names_of_weights(variant) if is_main_process else None)
    if push_to_hub:
        with tempfile.TemporaryDirectory() as temporary, _saved_tensors(model):
            save(temporary, push_to_hub=True, repo_id=kwargs.get("repo_id", folder.name))


def install() -> None:
    """Gives all models of diffusers this ``save_pretrained``: diffusers lets a quantizer change the tensors alone."""
    ModelMixin.save_pretrained = save_pretrained  # type: ignore[method-assign, assignment]


@contextmanager
def _saved_tensors(model: Any) -> Iterator[None]:
    """Makes ``state_dict()`` the tensors to save, for diffusers before 0.39, which does not ask the quantizer."""
    if hasattr(DiffusersQuantizer, "get_state_dict_and_metadata"):
        yield
        return
    model.state_dict = lambda: model.hf_quantizer.get_state_dict_and_metadata(type(model).state_dict(model))[0]
    try:
        yield
    finally:
        del model.state_dict


def _names_of_weights(variant: str | None) -> re.Pattern[str]:
    """The names of all files with weights of a variant, and of their index."""
    of_variant = "" if variant is None else re.escape(f".{variant}")
    shard = r"(-\d{5}-of-\d{5})?"
    return re.compile(rf"{STEM}({of_variant}{shard}\.(safetensors|bin)|\.(safetensors|bin)\.index{of_variant}\.json)")


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A new folder on the file system of ``folder``; those that killed processes left there are removed."""
    inside = folder / folder.name
    for left in (*left_behind(folder), *left_behind(inside)):
        shutil.rmtree(left, ignore_errors=True)
    staging, descriptor = _locked_new_folder(folder if _can_change_places(folder) else inside)
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        os.close(descriptor)


def _locked_new_folder(beside: Path) -> tuple[Path, int]:
    while True:
        staging = temporary_name(beside)
        staging.mkdir()
        with suppress(FileNotFoundError):  # another process took it for one that was left behind
            descriptor = os.open(staging, os.O_RDONLY)
            lock(descriptor)
            if staging.exists():
                return staging, descriptor
            os.close(descriptor)


def _can_change_places(folder: Path) -> bool:
    """False for a folder that should keep its place: a mount point, the current folder, another owner's."""
    if not folder.exists():
        return True
    current = Path()
    with suppress(FileNotFoundError):  # the current folder may be deleted
        current = Path.cwd()
    own = folder.stat().st_uid == os.geteuid() and os.access(folder.parent, os.W_OK)
    return own and not current.is_relative_to(folder) and not folder.is_mount()


def _replace(folder: Path, staging: Path, superseded: re.Pattern[str] | None) -> None:
    """Puts the files of ``staging`` into ``folder``, and removes the superseded ones."""
    new = [entry.name for entry in staging.iterdir()]
    for name in new:
        with opened(staging / name) as descriptor:
            os.fsync(descriptor)
    if folder.exists():
        shutil.copystat(folder, staging)
    try:
        staging.rename(folder)  # there is none, or an empty one
    except OSError:
        with _locked(folder):
            _replace_filled(folder, staging, new, superseded)
    sync_folder(folder.parent)


def _replace_filled(folder: Path, staging: Path, new: Sequence[str], superseded: re.Pattern[str] | None) -> None:
    present = [entry for entry in folder.iterdir() if entry != staging]
    old = [entry for entry in present if superseded and superseded.fullmatch(entry.name) and entry.name not in new]
    others = [entry for entry in present if entry not in old and entry.name not in new]
    try:
        if staging.parent == folder:
            raise OSError("this folder keeps its place")
        _link(others, staging)
        sync_folder(staging)
        _exchange(staging, folder)
    except OSError:
        _rename_one_by_one(folder, staging, new, old)
        return
    known = {entry.name for entry in present} | set(new)
    for entry in staging.iterdir():  # now the old folder
        if entry.name not in known:  # somebody has just added it
            with suppress(OSError):
                entry.rename(folder / entry.name)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the lock of the folder that is in this place."""
    while True:
        with opened(folder) as descriptor:
            lock(descriptor)
            if os.path.samestat(os.fstat(descriptor), folder.stat()):
                yield
                return


def _link(entries: Iterable[Path], folder: Path) -> None:
    """Adds files, and all files of folders, to a folder, as hard links."""
    for entry in entries:
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, folder / entry.name, symlinks=True, copy_function=os.link)
        else:
            os.link(entry, folder / entry.name, follow_symlinks=False)


def _exchange(a: Path, b: Path) -> None:
    """Two folders change places, atomically."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None or rename(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE):
        raise OSError(ctypes.get_errno(), "cannot exchange folders", str(a))


def _rename_one_by_one(folder: Path, staging: Path, new: Iterable[str], old: Iterable[Path]) -> None:
    """Without ``config.json`` nothing loads the folder."""
    config = [name for name in new if name == CONFIG]
    for name in config:
        (folder / name).unlink(missing_ok=True)
    sync_folder(folder)
    for entry in old:
        entry.unlink()
    for name in [name for name in new if name != CONFIG] + config:
        (staging / name).replace(folder / name)
    sync_folder(folder)
