"""``dq-runtime inspect``: what a packed checkpoint holds, from its config and its headers; no tensor is read."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import torch

from dq_runtime.cli.errors import UserError, as_user_errors
from dq_runtime.cli.models import COMPONENTS, CONFIG, INDEX, read_header, read_json
from dq_runtime.config import DilateQuantConfig
from dq_runtime.convert import ConversionPlan, plan_conversion
from dq_runtime.diffusers_quantizer import present_names

PACKED = ".packed_weight"
TABLES = (".weight_scale", ".weight_sum", ".weight_dilation", ".act_scale", ".act_zero_point")


def inspect_checkpoint(name: str) -> dict[str, Any]:
    """The report on a packed model's folder, or on that of its pipeline.

    Raises:
        UserError: if there is none, it is not packed, or a file is cut off.
    """
    folder = _folder_of(name)
    config = read_json(folder / CONFIG)
    if config.get("quantization_config", {}).get("quant_method") != "dilatequant":
        raise UserError(f"{folder} is in floating point: `dq-runtime quantize` makes a packed checkpoint of it")
    with as_user_errors(ValueError, TypeError):
        quantization = DilateQuantConfig.from_dict(config["quantization_config"])
        plan = _plan(config, quantization)
    headers: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        header = read_header(file)
        headers |= dict(zip(present_names(header), header.values(), strict=True))
    tensors = {entry: header["data_offsets"][1] - header["data_offsets"][0] for entry, header in headers.items()}
    packed = {entry.removesuffix(PACKED): headers[entry] for entry in headers if entry.endswith(PACKED)}
    return {
        "folder": str(folder),
        "model": config.get("_class_name"),
        "layers": {
            layer: {
                "shape": _stock_shape(headers, layer),
                "weight_bits": quantization.weight_bits,
                "activation_bits": quantization.activation_bits_of(layer),
                "bytes": sum(count for entry, count in tensors.items() if entry.rpartition(".")[0] == layer),
            }
            for layer in packed
        },
        "timesteps": quantization.timesteps,
        "floating_point": plan.kept,
        "missing": sorted(plan.layers.keys() - packed.keys()),
        "bytes": {
            "packed weights": sum(count for entry, count in tensors.items() if entry.endswith(PACKED)),
            "tables": sum(count for entry, count in tensors.items() if entry.endswith(TABLES)),
            "floating point": sum(
                count
                for entry, count in tensors.items()
                if not entry.endswith((PACKED, *TABLES)) and headers[entry]["dtype"][0] in "FB"
            ),
            "all": sum(tensors.values()),
            "same layers in fp16": sum(2 * prod(_stock_shape(headers, layer)) for layer in packed),
        },
    }


def _folder_of(name: str) -> Path:
    folder = Path(name).expanduser()
    if folder.is_file():
        folder = folder.parent
    if not folder.is_dir():
        raise UserError(f"{name}: there is no such folder. Give the folder of a packed UNet, or of its pipeline")
    if (folder / INDEX).exists():
        held = [component for component in COMPONENTS if (folder / component / CONFIG).exists()]
        if not held:
            raise UserError(f"{folder} is a pipeline without a UNet and without a transformer")
        folder = folder / held[0]
    if not (folder / CONFIG).exists():
        raise UserError(f"{folder} holds no {CONFIG}: give the folder of a packed UNet, or of its pipeline")
    return folder


def _plan(config: dict[str, Any], quantization: DilateQuantConfig) -> ConversionPlan:
    """What the config says about each layer of the model, which is built without memory."""
    import diffusers

    model_class = getattr(diffusers, str(config.get("_class_name")), None)
    if model_class is None:
        raise UserError(f"{CONFIG} names the class {config.get('_class_name')}, which this diffusers does not have")
    stock = {name: value for name, value in config.items() if name != "quantization_config"}
    with torch.device("meta"):
        return plan_conversion(model_class.from_config(stock), quantization)


def _stock_shape(headers: dict[str, Any], layer: str) -> list[int]:
    """The shape of the floating-point layer's weight: [N, K] or [N, K, KH, KW]."""
    out_channels, *taps, _ = headers[f"{layer}{PACKED}"]["shape"]
    return [out_channels, *headers[f"{layer}.weight_dilation"]["shape"], *taps]
