"""The folder beside OUT with what an interrupted quantization resumes from, and the finished pipeline in OUT."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dq_runtime.cli.errors import UserError
from dq_runtime.cli.models import FILE, INDEX, MODEL, Source, read_json
from dq_runtime.files import replacing

SMALL = 2**20  # bytes; larger files beside the components are other formats of the weights


class WorkFolder:
    """``OUT.work``: the settings, the recorded calls, the finished blocks, and OUT while it is written.

    Args:
        output: OUT, which must not exist yet.
        settings: everything that determines the result.

    Raises:
        UserError: if OUT exists, or the folder holds the calls of another command.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any]) -> None:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise UserError(f"{output} exists: give another folder with -o, or remove it first")
        self.output, self.folder = output, output.with_name(f"{output.name}.work")
        self.settings = json.loads(json.dumps(settings))
        self.resumes = self.calls.exists()
        found = read_json(self.record) if self.resumes else self.settings
        others = [name for name in self.settings if found.get(name) != self.settings[name]]
        if others:
            raise UserError(
                f"{self.folder} belongs to an interrupted command with another {', '.join(others)}: repeat that one "
                "to resume it, or remove the folder"
            )

    def create(self) -> None:
        """Makes the folder and writes the settings."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.record) as stream:
            stream.write(json.dumps(self.settings, indent=1).encode() + b"\n")

    def free_bytes(self) -> int:
        """The free space where the folder is or will be."""
        places = (self.folder, *self.folder.absolute().parents)
        return shutil.disk_usage(next(place for place in places if place.exists())).free

    @property
    def record(self) -> Path:
        """The file of the settings."""
        return self.folder / "settings.json"

    @property
    def calls(self) -> Path:
        """The file of the recorded calls."""
        return self.folder / "calls.safetensors"

    @property
    def blocks(self) -> Path:
        """The folder of the finished blocks."""
        return self.folder / "blocks"

    def finished_blocks(self) -> frozenset[str]:
        """The names of the blocks that an interrupted run finished."""
        files = self.blocks.glob("*.safetensors") if self.blocks.is_dir() else ()
        return frozenset(file.name.removesuffix(".safetensors") for file in files)

    def publish(self, source: Source, pipeline: Any | None, name: str, model: Any, changed: tuple[str, ...]) -> None:
        """Writes OUT, whole or not at all, and removes the work folder.

        Args:
            source: where the other components are copied from.
            pipeline: None for a model alone.
            name: of the quantized component.
            model: the quantized component.
            changed: names of other components that are saved from memory, since a LoRA was merged into them.
        """
        staging = self.folder / "output"
        shutil.rmtree(staging, ignore_errors=True)
        if source.kind == MODEL:
            model.save_pretrained(staging)
        elif source.kind == FILE:
            assert pipeline is not None
            pipeline.save_pretrained(staging)
        else:
            _copy_components(source.path, staging, {name})
            model.save_pretrained(staging / name)
            for component in changed:
                shutil.rmtree(staging / component)
                getattr(pipeline, component).save_pretrained(staging / component)
        staging.rename(self.output)
        shutil.rmtree(self.folder)


def _copy_components(folder: Path, target: Path, without: set[str]) -> None:
    """Copies a pipeline's index, components and small files (licence, model card, own code)."""
    components = read_json(folder / INDEX).keys() - without
    target.mkdir()
    for entry in folder.iterdir():
        if entry.is_dir() and entry.name in components:
            shutil.copytree(entry, target / entry.name)
        elif entry.is_file() and entry.stat().st_size < SMALL:
            shutil.copyfile(entry, target / entry.name)


def folder_size(folder: Path) -> int:
    """Bytes of all files in a folder, or of a file."""
    files = [folder] if folder.is_file() else folder.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())
