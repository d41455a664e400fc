"""Finding and loading MODEL: a pipeline's folder, a UNet's folder, a single file, or a repository of the hub."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dq_runtime.architectures.supported import architecture_of, is_supported
from dq_runtime.cli.errors import UserError, as_user_errors
from dq_runtime.layers import is_quantized
from dq_runtime.validation import integer

PIPELINE, MODEL, FILE = "pipeline", "model", "file"  # kinds of sources
INDEX, CONFIG = "model_index.json", "config.json"
COMPONENTS = ("unet", "transformer")
MODEL_CLASSES = ("UNet2DModel", "UNet2DConditionModel")
HEADER_LIMIT = 2**28  # bytes
# The beginning of a tensor's name in a single file -> the pipeline that diffusers makes of it; in this order.
SINGLE_FILE_PIPELINES = {
    "conditioner.embedders.": "StableDiffusionXLPipeline",
    "cond_stage_model.": "StableDiffusionPipeline",
}


@dataclass(frozen=True)
class Source:
    """Where a model is.

    Attributes:
        name: as the user gave it.
        kind: "pipeline", "model" (a UNet alone) or "file".
        path: a folder of this machine or, for "file", the file.
    """

    name: str
    kind: str
    path: Path


def find(name: str) -> Source:
    """Finds a model; a repository of the hub is downloaded.

    Raises:
        UserError: if there is none, or it is of another class.
    """
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(f"{name} is no .safetensors file. Convert it, or give the pipeline's folder")
        return Source(name, FILE, path)
    if path.is_dir():
        return Source(name, _kind_of_folder(path), path)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise UserError(f"{name}: there is no such file or folder. Check the path, or give a repository as OWNER/NAME")
    from diffusers import DiffusionPipeline

    return Source(name, PIPELINE, Path(DiffusionPipeline.download(name)))


def _kind_of_folder(folder: Path) -> str:
    if (folder / INDEX).exists():
        return PIPELINE
    if not (folder / CONFIG).exists():
        raise UserError(f"{folder} holds neither {INDEX} nor {CONFIG}: give a folder that save_pretrained wrote")
    found = read_json(folder / CONFIG).get("_class_name")
    if found not in MODEL_CLASSES:
        raise UserError(f"{folder} holds a {found}; expected a pipeline, {' or '.join(MODEL_CLASSES)}")
    return MODEL


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. UserError if the file is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is no JSON ({error}): download or save it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no JSON object: download or save it again")
    return content


def read_header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file: dtype, shape and place of each tensor by name; no tensor is read."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        text = stream.read(length) if 2 <= length <= HEADER_LIMIT else b""
    try:
        header = json.loads(text)
        assert isinstance(header, dict)
    except (ValueError, AssertionError) as error:
        raise UserError(f"{file} is no safetensors file, or it is cut off: download or save it again") from error
    header.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if file.stat().st_size < 8 + length + end:
        raise UserError(f"{file} is cut off: it should have {8 + length + end} bytes. Download or save it again")
    return header


def chosen_device(name: str | None) -> torch.device:
    """The device with this name; by default a GPU if there is one."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name} is no device: give cuda, cuda:1 or cpu") from None
    if device.type not in ("cuda", "cpu"):
        raise UserError(f"--device {name}: there are kernels for cuda and cpu alone")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: torch finds {torch.cuda.device_count()} CUDA devices. Use --device cpu")
    return device


def dtype_on(device: torch.device) -> torch.dtype:
    """Half precision on GPUs, single precision on CPUs, which compute faster in it."""
    return torch.float16 if device.type == "cuda" else torch.float32


def load_pipeline(source: Source, device: torch.device) -> Any:
    """The pipeline of a folder or a single file, without progress bars.

    Raises:
        UserError: if it is a model alone, or diffusers cannot load it.
    """
    import diffusers

    if source.kind == MODEL:
        raise UserError(
            f"{source.name} is a UNet alone, which has no prompts and no decoder: give its pipeline's folder"
        )
    if source.kind == FILE:
        load = getattr(diffusers, _pipeline_of_file(source.path)).from_single_file
    else:
        load = diffusers.DiffusionPipeline.from_pretrained
    with as_user_errors(OSError, ValueError, TypeError, AttributeError, subject=source.name):
        pipeline = load(str(source.path), torch_dtype=dtype_on(device), **_variant(source.path))
    pipeline.set_progress_bar_config(disable=True)
    if getattr(pipeline, "safety_checker", None) is not None:
        pipeline.safety_checker = None  # it would blacken images; the files on the disk keep it
    return pipeline.to(device)


def _pipeline_of_file(file: Path) -> str:
    names = list(read_header(file))
    for prefix, pipeline in SINGLE_FILE_PIPELINES.items():
        if any(name.startswith(prefix) for name in names):
            return pipeline
    raise UserError(
        f"{file} is no whole checkpoint of Stable Diffusion 1, 2 or XL (no text encoder in it). Give the folder of a "
        "pipeline; a LoRA is given with --lora"
    )


def load_model(source: Source, device: torch.device) -> Any:
    """The UNet of a folder with a UNet alone."""
    import diffusers

    model_class = getattr(diffusers, read_json(source.path / CONFIG)["_class_name"])
    with as_user_errors(OSError, ValueError, TypeError, subject=source.name):
        model = model_class.from_pretrained(source.path, torch_dtype=dtype_on(device), **_variant(source.path))
    return model.to(device).eval()


def _variant(folder: Path) -> dict[str, str]:
    """The loader's argument for a folder whose weights are all of the variant fp16."""
    files = list(folder.rglob("*.safetensors"))
    return {"variant": "fp16"} if files and all(".fp16." in file.name for file in files) else {}


def component_of(pipeline: Any) -> tuple[str, Any]:
    """Name and model of the component that is quantized: the UNet or the transformer."""
    for name in COMPONENTS:
        model = getattr(pipeline, name, None)
        if is_supported(model):
            return name, model
    raise UserError(
        f"{type(pipeline).__name__} has no UNet and no transformer that dq_runtime can quantize: SD 1.x, 2.x, SDXL, "
        "latent diffusion, DDPM and Flux are supported"
    )


def load_any(source: Source, device: torch.device) -> tuple[Any | None, str, Any]:
    """The pipeline (None for a UNet alone), and name and model of the component that is quantized."""
    if source.kind == MODEL:
        return None, "unet", load_model(source, device)
    pipeline = load_pipeline(source, device)
    return pipeline, *component_of(pipeline)


def load_lora(pipeline: Any, file: Path) -> None:
    """Loads a LoRA file into a pipeline."""
    if not file.is_file():
        raise UserError(f"--lora {file}: there is no such file")
    read_header(file)
    with as_user_errors(ValueError, AttributeError, KeyError, RuntimeError, subject=f"--lora {file}"):
        pipeline.load_lora_weights(file.parent, weight_name=file.name)


def make_fast(model: Any, device: torch.device) -> None:
    """Fuses a quantized model and, on a GPU, replays it as CUDA graphs."""
    import dq_runtime

    if is_quantized(model):
        dq_runtime.fuse(model)
        if device.type == "cuda":
            dq_runtime.enable_cuda_graphs(model)


def at_least(option: str, value: int, least: int) -> int:
    """The value of an option. UserError if it is smaller."""
    with as_user_errors(ValueError):
        return integer(option, value, least)


def not_converted_by_default(model: Any) -> list[str]:
    """The layers of a model's architecture that stay in floating point by default."""
    return list(architecture_of(model).modules_to_not_convert)


def read_prompts(file: Path) -> list[str]:
    """The lines of a file that are not empty. UserError if there are none."""
    if not file.is_file():
        raise UserError(f"--prompts {file}: there is no such file")
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError:
        raise UserError(f"--prompts {file} is no text in UTF-8: save it as one, with a prompt in each line") from None
    prompts = [line for line in lines if line]
    if not prompts:
        raise UserError(f"--prompts {file} is empty: write a prompt in each line")
    return prompts
