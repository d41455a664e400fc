"""Fusing a quantized model: the same modules and weights, fewer passes over memory.

Modules keep their names and tensors, so checkpoints, adapters and ``dequantize`` work as before. Linears that read one
tensor (q, k and v; all time projections; all cross-attention keys and values) run as one GEMM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import Timesteps
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import CrossAttnUpBlock2D, UpBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from dq_runtime.architectures.supported import architecture_of, without_compilation
from dq_runtime.forward_state import ForwardState, LinearGroup, same_quantizer
from dq_runtime.fused_blocks import (
    FusedCrossAttnUpBlock2D,
    FusedDownsample2D,
    FusedResnetBlock2D,
    FusedTimesteps,
    FusedUpBlock2D,
    FusedUpsample2D,
)
from dq_runtime.fused_transformers import FusedBasicTransformerBlock, FusedTransformer2DModel
from dq_runtime.layers import is_quantized, quantized_layers
from dq_runtime.rollback import unchanged_on_error
from dq_runtime.validation import instance

# In this order: an up block can be fused only if its resnets are, and timesteps beside other blocks only.
FUSED = {
    ResnetBlock2D: FusedResnetBlock2D,
    BasicTransformerBlock: FusedBasicTransformerBlock,
    Transformer2DModel: FusedTransformer2DModel,
    Upsample2D: FusedUpsample2D,
    Downsample2D: FusedDownsample2D,
    UpBlock2D: FusedUpBlock2D,
    CrossAttnUpBlock2D: FusedCrossAttnUpBlock2D,
    Timesteps: FusedTimesteps,
}

# diffusers finds blocks by the names of their classes (regional compilation, device maps), and by the classes (layer
# skip, caches).
for _stock, _fast in FUSED.items():
    _fast.__name__ = _stock.__name__
TransformerBlockRegistry.register(
    FusedBasicTransformerBlock, replace(TransformerBlockRegistry.get(BasicTransformerBlock))
)


def is_fused(model: nn.Module) -> bool:
    """True if a model has fused blocks."""
    return any(type(module) in FUSED.values() for module in model.modules())


def fuse(model: Any) -> dict[str, str]:
    """Fuses all blocks of a quantized model that have a fused forward, in place.

    Returns:
        The fused blocks: name -> class. It is empty, and the model unchanged, if no block can be fused.

    Raises:
        ValueError: if the model is not quantized, or is already fused.
    """
    instance("model", model, nn.Module)
    model = without_compilation(model)
    if not is_quantized(model):
        raise ValueError("The model is not quantized: calibrate it, or load a quantized one, before fuse()")
    if is_fused(model):
        raise ValueError("The model is fused already")
    with unchanged_on_error(model):
        return _fuse(model)


def _fuse(model: Any) -> dict[str, str]:
    architecture = architecture_of(model)
    places = {child: (parent, name) for parent in model.modules() for name, child in parent._modules.items()}
    state = ForwardState(
        {
            name: LinearGroup([places[linear] for linear in linears], activation, _modules_around(model, linears))
            for name, (linears, activation) in architecture.linears_by_input(model).items()
            if linears and same_quantizer(linears)
        }
    )
    fused: dict[str, str] = {}
    for stock, fast in FUSED.items():
        if stock is Timesteps and not fused:
            break
        for name, module in model.named_modules():
            if type(module) is stock and _can_fuse(module, fast):
                module.__class__ = fast
                module.state = state
                if isinstance(module, FusedBasicTransformerBlock):
                    attention: Any = module.attn1
                    module.self_attention = LinearGroup([(attention, name) for name in ("to_q", "to_k", "to_v")])
                if isinstance(module, FusedTimesteps):
                    module.waves = module.waves_on(model.device)
                fused[name] = stock.__name__
    if not fused:
        _unfuse(model)
        return fused
    entry = architecture.entry(model)
    groups = [*state.groups.values(), *(m.self_attention for m in model.modules() if hasattr(m, "self_attention"))]
    state.hooks = [
        entry.register_forward_pre_hook(state.begin, with_kwargs=True),
        entry.register_forward_hook(state.forget, always_call=True),
        *(
            layer.register_load_state_dict_post_hook(group.count_new_weights)
            for group in groups
            for layer in group.layers
        ),
    ]
    return fused


def _can_fuse(module: Any, fast: Any) -> bool:
    """True if a fused class supports a module, and one int8 tensor serves q, k and v of a self-attention."""
    if not fast.can_fuse(module):
        return False
    if fast is not FusedBasicTransformerBlock:
        return True
    return same_quantizer([module.attn1.to_q, module.attn1.to_k, module.attn1.to_v])


def _modules_around(model: nn.Module, layers: Sequence[nn.Module]) -> list[nn.Module]:
    """The modules of a model, without the model itself, that contain one of the layers."""
    return [
        module
        for module in model.modules()
        if module is not model and not set(layers).isdisjoint(list(module.modules())[1:])
    ]


def unfuse(model: Any) -> None:
    """Restores diffusers' own forwards in all blocks of a model, in place."""
    instance("model", model, nn.Module)
    with unchanged_on_error(model):
        _unfuse(model)


def _unfuse(model: Any) -> None:
    stock_class = {fast: stock for stock, fast in FUSED.items()}
    for module in model.modules():
        if type(module) in stock_class:
            module.__class__ = stock_class[type(module)]
            for hook in module.__dict__.pop("state").hooks:
                hook.remove()
            for name in ("self_attention", "waves"):
                module.__dict__.pop(name, None)
    for layer in quantized_layers(model).values():
        layer.__dict__.pop("after_move", None)
