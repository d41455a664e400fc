"""Replacing the layers of a stock diffusers model by quantized ones, in place."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.downsampling import FirDownsample2D
from diffusers.models.upsampling import FirUpsample2D
from torch import nn

from dq_kernels import ops
from dq_runtime.architectures.supported import architecture_of
from dq_runtime.attention import Int8AttnProcessor, reason_against_int8
from dq_runtime.config import NOT_CONVERTED, SHORTCUTS, DilateQuantConfig, is_part
from dq_runtime.layers import QuantConv2d, QuantizedLayer, QuantLinear, is_quantized, quantized_layers
from dq_runtime.timesteps import TimestepGrid

logger = logging.getLogger("dq_runtime")

GRID_NAME = "timestep_grid"

# Methods of diffusers' models that would change the packed weights -> the remedy in the error.
REFUSED = {
    "fuse_lora": "Packed INT4 weights cannot be merged with an adapter: leave it loaded, or merge and unload it "
    "before the floating-point UNet is calibrated",
    "fuse_qkv_projections": "Packed INT4 weights are joined by dq_runtime.fuse(unet), which makes q, k and v one GEMM",
}


@dataclass(frozen=True)
class ConversionPlan:
    """The layers of a model to quantize, the attentions to run in int8, and the reasons for all others."""

    layers: dict[str, nn.Linear | nn.Conv2d]
    attentions: dict[str, Attention]
    kept: dict[str, str]  # layer name -> reason
    kept_attentions: dict[str, str]  # name of an attention that the config selects -> reason
    unmatched: list[str]  # entries of the config that match nothing: "modules_to_not_convert: 'conv_inn'"

    def log(self) -> None:
        """Logs the layers and attentions that stay in floating point, with reasons, and each unmatched entry."""
        for entry in self.unmatched:
            logger.warning("%s matches nothing in this UNet", entry)
        if self.kept:
            level = logging.WARNING if set(self.kept.values()) - {REQUESTED, IN_FP32} else logging.INFO
            logger.log(level, "Kept in floating point: %s", _by_reason(self.kept))
        if self.kept_attentions:
            logger.warning("Attention stays in floating point: %s", _by_reason(self.kept_attentions))


def _by_reason(kept: Mapping[str, str]) -> str:
    names: dict[str, list[str]] = {}
    for name, reason in kept.items():
        names.setdefault(reason, []).append(name)
    return "; ".join(f"{', '.join(those)} ({reason})" for reason, those in names.items())


REQUESTED = "in modules_to_not_convert"
IN_FP32 = "in the model's _keep_in_fp32_modules"


def plan_conversion(unet: nn.Module, config: DilateQuantConfig) -> ConversionPlan:
    """Selects the linears and convolutions of a floating-point model that can and should be quantized.

    Layers outside of the architecture's entry, such as an autoencoder's encoder, are left out: they have no timestep.

    Raises:
        TypeError: if the model's class is not supported.
        ValueError: if the model is already quantized, has an adapter, or has no layer to quantize.
    """
    entry_name = architecture_of(unet).entry_name
    if is_quantized(unet):
        raise ValueError("The UNet is quantized already; call unet.dequantize() first, or load the original weights")
    if getattr(unet, "_hf_peft_config_loaded", False) or any(hasattr(m, "base_layer") for m in unet.modules()):
        raise ValueError(
            "The UNet has an adapter, whose matrices would be quantized as separate layers: call "
            "fuse_lora() and unload_lora_weights() first, or load the adapter after quantization"
        )
    if any(".processor." in name for name, _ in unet.named_modules()):
        raise ValueError(
            "The UNet has an IP-Adapter, whose layers a checkpoint of the UNet cannot store: call "
            "unload_ip_adapter() first, or load it after quantization"
        )
    layers: dict[str, nn.Linear | nn.Conv2d] = {}
    kept: dict[str, str] = {}
    in_fp32: Any = getattr(unet, "_keep_in_fp32_modules", None) or ()
    in_fp32 = (in_fp32,) if isinstance(in_fp32, str) else in_fp32
    fir_prefixes = tuple(
        f"{name}." for name, module in unet.named_modules() if isinstance(module, (FirDownsample2D, FirUpsample2D))
    )
    for name, module in unet.named_modules():  # a layer registered under two names appears once
        if not f"{name}.".startswith(f"{entry_name}." if entry_name else ""):
            continue
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.Conv1d, nn.Conv3d)):
            reason = _reason_to_keep(name, module, config, fir_prefixes)
            if reason is None and any(is_part(entry, name) for entry in in_fp32):
                reason = IN_FP32
            if reason is not None:
                kept[name] = reason
            elif isinstance(module, (nn.Linear, nn.Conv2d)):
                layers[name] = module
    if not layers:
        reasons = ", ".join(sorted(set(kept.values()))) or "the UNet has no linear and no convolution"
        raise ValueError(f"No layer is left to quantize ({reasons}); shorten modules_to_not_convert if it is the cause")
    attentions: dict[str, Attention] = {}
    kept_attentions: dict[str, str] = {}
    for name, module in unet.named_modules():
        if isinstance(module, Attention) and any(is_part(entry, name) for entry in config.int8_attention or ()):
            reason = _reason_against_int8(module)
            if reason is None:
                attentions[name] = module
            else:
                kept_attentions[name] = reason
    own_bits = None if config.layer_activation_bits == SHORTCUTS else config.layer_activation_bits
    unmatched = [
        f"{place}: {entry!r}"
        for place, entries, names in (
            ("modules_to_not_convert", config.modules_to_not_convert, kept),
            ("layer_activation_bits", own_bits, layers),
            ("int8_attention", config.int8_attention, attentions | kept_attentions),
        )
        for entry in entries or ()
        if not any(is_part(entry, name) for name in names)
    ]
    return ConversionPlan(layers, attentions, kept, kept_attentions, unmatched)


def for_model(config: DilateQuantConfig, model: nn.Module) -> DilateQuantConfig:
    """The config with the default of the model's architecture for the layers that stay in floating point."""
    if config.modules_to_not_convert != list(NOT_CONVERTED):
        return config
    return replace(config, modules_to_not_convert=list(architecture_of(model).modules_to_not_convert))


def _reason_to_keep(
    name: str, module: nn.Module, config: DilateQuantConfig, fir_prefixes: tuple[str, ...]
) -> str | None:
    if any(is_part(entry, name) for entry in config.modules_to_not_convert or ()):
        return REQUESTED
    if type(module) not in (nn.Linear, nn.Conv2d):
        return f"no INT4 kernel for {type(module).__name__}"
    if name.startswith(fir_prefixes):
        return "a FIR resampler reads its weight directly"
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        return "groups > 1"
    if isinstance(module, nn.Conv2d) and isinstance(module.padding, str):
        return f"padding {module.padding!r}"
    weight: Any = module.weight
    in_channels, taps = weight.shape[1], weight[0, 0].numel()
    if (in_channels + in_channels % 2) * taps > ops.MAX_REDUCTION:
        return f"sums of more than {ops.MAX_REDUCTION} products may exceed int32"
    return None


def _reason_against_int8(attention: Attention) -> str | None:
    if type(attention.processor) not in (AttnProcessor2_0, Int8AttnProcessor):
        return type(attention.processor).__name__
    return reason_against_int8(attention)


def insert_empty_layers(unet: Any, config: DilateQuantConfig) -> None:
    """Replaces every layer to be quantized by an empty one on the meta device, in place; a loader fills them."""
    plan = plan_conversion(unet, config)
    layers, grid = _empty_layers(plan, config)
    _swap_in(unet, plan, layers, grid)


def convert(unet: Any, config: DilateQuantConfig, tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """Quantizes a UNet in place with given tensors; leaves it unchanged if they do not fit.

    Args:
        unet: a stock floating-point UNet.
        config: without ``timesteps``, activation scales are computed at run time.
        tensors: layer name -> state dict (see ``QuantizedLayer``), for every layer that the config quantizes.
    """
    plan = plan_conversion(unet, config)
    layers, grid = _empty_layers(plan, config)
    for name, layer in layers.items():
        layer.load_state_dict(tensors[name], assign=True)
        layer.check_tensors()
        layer.train(plan.layers[name].training)
    _swap_in(unet, plan, layers, None if grid is None else grid.to(unet.device))


def _empty_layers(
    plan: ConversionPlan, config: DilateQuantConfig
) -> tuple[dict[str, QuantizedLayer], TimestepGrid | None]:
    grid = None if config.timesteps is None else TimestepGrid(config.timesteps)
    return {name: empty_layer(module, name, config, grid) for name, module in plan.layers.items()}, grid


def empty_layer(
    layer: nn.Linear | nn.Conv2d, name: str, config: DilateQuantConfig, grid: TimestepGrid | None
) -> QuantizedLayer:
    """An empty quantized layer for a stock one of this name."""
    kind = QuantLinear if isinstance(layer, nn.Linear) else QuantConv2d
    return kind.like(layer, name, config.activation_bits_of(name), grid)


def _swap_in(unet: Any, plan: ConversionPlan, layers: Mapping[str, QuantizedLayer], grid: TimestepGrid | None) -> None:
    """Replaces the layers, and registers the hooks that map the UNet's timestep."""
    plan.log()
    replace_layers(unet, {plan.layers[name]: layer for name, layer in layers.items()})
    finish_conversion(unet, plan, grid)


def finish_conversion(unet: Any, plan: ConversionPlan, grid: TimestepGrid | None) -> None:
    """Registers the hooks that map the model's timestep, if its scales depend on it; sets processors and methods."""
    attention: Any  # diffusers annotates processors with its own classes only
    for attention in plan.attentions.values():
        attention.set_processor(Int8AttnProcessor())
    unet.requires_grad_(False)  # packed weights have no gradients
    if grid is not None:
        follow_timesteps(unet, grid)
    _adapt_methods(type(unet))


def follow_timesteps(unet: Any, grid: TimestepGrid) -> None:
    """Registers the hooks that map a model's timestep to the rows of its tables."""
    unet.add_module(GRID_NAME, grid.train(unet.training))
    grid.attach(unet)


def _adapt_methods(model_class: Any) -> None:
    """Gives a class of models methods that differ for quantized ones; for others they are the class's own.

    Methods of the instance would hold it, and its memory, until the garbage collector runs.
    """
    for name in ("num_parameters", *REFUSED):
        own = getattr(model_class, name, None)
        if own is not None and not hasattr(own, "for_stock_models"):
            setattr(model_class, name, _counting(own) if name == "num_parameters" else _refusing(own))


def _counting(own: Any) -> Any:
    """``ModelMixin.num_parameters``, in which a packed weight counts as the stock layer's."""

    @wraps(own)
    def num_parameters(self: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        stored = own(self, only_trainable, exclude_embeddings)
        layers = () if only_trainable else quantized_layers(self).values()
        return stored + sum(layer.weight.numel() - layer.packed_weight.numel() for layer in layers)

    num_parameters.for_stock_models = own  # type: ignore[attr-defined]
    return num_parameters


def _refusing(own: Any) -> Any:
    """A method that would change packed weights."""

    @wraps(own)
    def refused(self: Any, *args: Any, **kwargs: Any) -> Any:
        # A pipeline's adapter may be another model's.
        has_nothing_to_fuse = own.__name__ == "fuse_lora" and not getattr(self, "peft_config", None)
        if is_quantized(self) and not has_nothing_to_fuse:
            raise ValueError(REFUSED[own.__name__])
        return own(self, *args, **kwargs)

    refused.for_stock_models = own  # type: ignore[attr-defined]
    return refused


def replace_layers(unet: nn.Module, replacement: Mapping[nn.Module, nn.Module]) -> None:
    """Replaces modules under every name that they are registered under, in place."""
    for parent in list(unet.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in replacement:
                parent._modules[name] = replacement[child]
