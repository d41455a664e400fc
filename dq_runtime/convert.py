"""Turning a stock diffusers UNet's layers into quantized ones, in place, and back."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.downsampling import FirDownsample2D
from diffusers.models.upsampling import FirUpsample2D
from torch import nn

from dq_runtime.config import DilateQuantConfig
from dq_runtime.layers import QuantConv2d, QuantizedLayer, QuantLinear, conv2d_arguments
from dq_runtime.timesteps import TimestepGrid

logger = logging.getLogger("dq_runtime")

GRID_NAME = "timestep_grid"


@dataclass(frozen=True)
class ConversionPlan:
    """Which layers of a UNet are to be quantized, and why the other linears and convolutions are not."""

    layers: dict[str, nn.Linear | nn.Conv2d]
    kept: dict[str, str]  # layer name -> reason

    def log(self) -> None:
        """Writes one line that lists what stays in floating point and why."""
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.kept.items():
            by_reason.setdefault(reason, []).append(name)
        if by_reason:
            text = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in by_reason.items())
            unexpected = set(by_reason) - {REQUESTED}
            logger.log(logging.WARNING if unexpected else logging.INFO, "Kept in floating point: %s", text)


REQUESTED = "in modules_to_not_convert"


def plan_conversion(unet: nn.Module, config: DilateQuantConfig) -> ConversionPlan:
    """Decides for every linear and convolution of a floating-point UNet whether it can and should be quantized.

    Raises:
        ValueError: if the UNet is quantized already, or nothing is left to quantize.
    """
    if is_quantized(unet):
        raise ValueError("The UNet is quantized already; call unet.dequantize() first, or load the original weights")
    layers: dict[str, nn.Linear | nn.Conv2d] = {}
    kept: dict[str, str] = {}
    fir_prefixes = tuple(
        f"{name}." for name, module in unet.named_modules() if isinstance(module, (FirDownsample2D, FirUpsample2D))
    )
    for name, module in unet.named_modules():  # a layer registered under two names comes once
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.Conv1d, nn.Conv3d)):
            reason = _reason_to_keep(name, module, config, fir_prefixes)
            if reason is not None:
                kept[name] = reason
            elif isinstance(module, (nn.Linear, nn.Conv2d)):
                layers[name] = module
    if not layers:
        raise ValueError("No layer is left to quantize: every linear and convolution is in modules_to_not_convert")
    return ConversionPlan(layers, kept)


def _reason_to_keep(
    name: str, module: nn.Module, config: DilateQuantConfig, fir_prefixes: tuple[str, ...]
) -> str | None:
    if any(f".{entry}." in f".{name}." for entry in config.modules_to_not_convert):
        return REQUESTED
    if type(module) not in (nn.Linear, nn.Conv2d):
        return f"no INT4 kernel for {type(module).__name__}"
    if name.startswith(fir_prefixes):
        return "a FIR resampler reads its weight directly"
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        return "groups > 1"
    if isinstance(module, nn.Conv2d) and (module.padding_mode != "zeros" or isinstance(module.padding, str)):
        return f"padding {module.padding!r}, mode {module.padding_mode!r}"
    return None


def is_quantized(unet: nn.Module) -> bool:
    """Whether a UNet holds quantized layers."""
    return any(isinstance(module, QuantizedLayer) for module in unet.modules())


def quantized_layers(unet: nn.Module) -> dict[str, QuantizedLayer]:
    """The quantized layers of a UNet, by name."""
    return {name: module for name, module in unet.named_modules() if isinstance(module, QuantizedLayer)}


def insert_empty_layers(unet: Any, config: DilateQuantConfig) -> dict[str, QuantizedLayer]:
    """Replaces every layer to be quantized by an empty one on the meta device, and makes the UNet map its timestep.

    Args:
        unet: a floating-point UNet, changed in place.
        config: with ``timesteps``.

    Returns:
        the new layers by name; all their tensors are still to be filled.
    """
    if config.timesteps is None:
        raise ValueError(
            "The quantization config has no timesteps, so there are no activation scales to select from: "
            "calibrate the UNet with dq_runtime.calibrate"
        )
    plan = plan_conversion(unet, config)
    plan.log()
    grid = TimestepGrid(config.timesteps)
    empty: dict[int, QuantizedLayer] = {}
    for name, module in plan.layers.items():
        new_layer = QuantLinear.like if isinstance(module, nn.Linear) else QuantConv2d.like
        empty[id(module)] = new_layer(module, name, config.activation_bits, grid)  # type: ignore[arg-type]
    for parent in list(unet.modules()):
        for child_name, child in list(parent._modules.items()):
            if id(child) in empty:
                parent._modules[child_name] = empty[id(child)]
    unet.add_module(GRID_NAME, grid)
    grid.hook = unet.register_forward_pre_hook(grid.before_forward, with_kwargs=True)
    return {name: empty[id(module)] for name, module in plan.layers.items()}


def convert(unet: Any, config: DilateQuantConfig, tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> Any:
    """Quantizes a UNet in place from finished tensors.

    Args:
        unet: a stock floating-point UNet.
        config: with ``timesteps``.
        tensors: for every layer that the config quantizes, its state dict (see ``QuantizedLayer``).

    Returns:
        the same UNet, which ``save_pretrained`` now writes in packed form.
    """
    from dq_runtime.diffusers_quantizer import DilateQuantizer

    training = unet.training
    for name, layer in insert_empty_layers(unet, config).items():
        layer.load_state_dict(tensors[name], assign=True)
        layer.check_tensors()
    unet.train(training)
    unet.timestep_grid.to(next(unet.parameters()).device)
    unet.hf_quantizer = DilateQuantizer(config, pre_quantized=True)
    unet.register_to_config(quantization_config=config)
    return unet


@torch.no_grad()
def dequantize(unet: Any) -> Any:
    """Turns a quantized UNet back, in place, into a stock one, whose weights are the rounded ones.

    Raises:
        ValueError: if the UNet is not quantized.
    """
    if not is_quantized(unet):
        raise ValueError("The UNet is not quantized")
    restored: dict[int, nn.Module] = {}
    for parent in list(unet.modules()):
        for child_name, child in list(parent._modules.items()):
            if isinstance(child, QuantizedLayer):
                if id(child) not in restored:
                    restored[id(child)] = _dequantized_layer(child, unet.dtype)
                parent._modules[child_name] = restored[id(child)]
    unet.timestep_grid.hook.remove()
    del unet.timestep_grid
    unet._internal_dict = FrozenDict({k: v for k, v in unet.config.items() if k != "quantization_config"})
    return unet


def _dequantized_layer(layer: QuantizedLayer, dtype: torch.dtype) -> nn.Module:
    weight = layer.dequantized_weight()
    module: nn.Linear | nn.Conv2d
    if isinstance(layer, QuantConv2d):
        weight = weight.permute(0, 3, 1, 2).contiguous()
        module = nn.Conv2d(**conv2d_arguments(layer), device="meta")
    else:
        module = nn.Linear(weight.shape[1], weight.shape[0], layer.bias is not None, device="meta")
    state = {"weight": weight.to(dtype)}
    if layer.bias is not None:
        state["bias"] = layer.bias.to(dtype)
    module.load_state_dict(state, assign=True)
    return module.train(layer.training)
