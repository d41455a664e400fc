"""Fusing a quantized UNet: the same modules and weights, fewer passes over memory.

Modules stay where they are and keep their tensors, so checkpoints, adapters and ``dequantize`` do not notice. Linears
that read one tensor (q, k and v; all time projections; all cross-attention keys and values) run as one GEMM.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import CrossAttnUpBlock2D, UpBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from dq_runtime.forward_state import ForwardState, LinearGroup, same_quantizer
from dq_runtime.fused_blocks import (
    FusedBasicTransformerBlock,
    FusedCrossAttnUpBlock2D,
    FusedDownsample2D,
    FusedResnetBlock2D,
    FusedTransformer2DModel,
    FusedUpBlock2D,
    FusedUpsample2D,
)
from dq_runtime.layers import is_quantized, quantized_layers

# In this order: whether an up block can be fused depends on its resnets.
FUSED = {
    ResnetBlock2D: FusedResnetBlock2D,
    BasicTransformerBlock: FusedBasicTransformerBlock,
    Transformer2DModel: FusedTransformer2DModel,
    Upsample2D: FusedUpsample2D,
    Downsample2D: FusedDownsample2D,
    UpBlock2D: FusedUpBlock2D,
    CrossAttnUpBlock2D: FusedCrossAttnUpBlock2D,
}


def is_fused(unet: nn.Module) -> bool:
    """Whether a UNet has fused blocks."""
    return any(type(module) in FUSED.values() for module in unet.modules())


def fuse(unet: Any) -> dict[str, str]:
    """Fuses what can be fused in a quantized UNet, in place.

    Returns:
        The fused blocks: name -> class.

    Raises:
        ValueError: if the UNet is not quantized, or fused already.
    """
    if not is_quantized(unet):
        raise ValueError("The UNet is not quantized: calibrate it, or load a quantized one, before fuse()")
    if is_fused(unet):
        raise ValueError("The UNet is fused already")
    state = ForwardState(_shared_inputs(unet))
    fused = {}
    for stock, fast in FUSED.items():
        for name, module in unet.named_modules():
            if type(module) is stock and fast.can_fuse(module):
                module.__class__ = fast
                module.state = state
                if isinstance(module, FusedBasicTransformerBlock):
                    attention: Any = module.attn1
                    module.self_attention = LinearGroup([attention.to_q, attention.to_k, attention.to_v])
                fused[name] = stock.__name__
    groups = [*state.groups.values(), *(m.self_attention for m in unet.modules() if hasattr(m, "self_attention"))]
    state.hooks = [
        unet.register_forward_pre_hook(state.begin, with_kwargs=True),
        unet.register_forward_hook(state.forget),
        *(
            layer.register_load_state_dict_post_hook(group.count_new_weights)
            for group in groups
            for layer in group.layers
        ),
    ]
    return fused


def unfuse(unet: Any) -> None:
    """Gives the blocks of a UNet diffusers' own forwards back, in place."""
    stock_class = {fast: stock for stock, fast in FUSED.items()}
    for module in unet.modules():
        if type(module) in stock_class:
            module.__class__ = stock_class[type(module)]
            for hook in module.__dict__.pop("state").hooks:
                hook.remove()
            module.__dict__.pop("self_attention", None)
    for layer in quantized_layers(unet).values():
        layer.__dict__.pop("after_move", None)


def _shared_inputs(unet: nn.Module) -> dict[str, LinearGroup]:
    """The linears of a whole UNet that read one tensor: time projections, cross-attention keys and values."""
    shared = {}
    projections = [block.time_emb_proj for block in unet.modules() if type(block) is ResnetBlock2D]
    if projections and same_quantizer(projections):
        shared["time_emb_proj"] = LinearGroup(projections, F.silu)
    blocks: list[Any] = [block for block in unet.modules() if type(block) is BasicTransformerBlock]
    cross = [block.attn2 for block in blocks if block.attn2 is not None]
    of_encoder = [layer for attention in cross for layer in (attention.to_k, attention.to_v)]
    if of_encoder and same_quantizer(of_encoder):
        shared["encoder_hidden_states"] = LinearGroup(of_encoder)
    return shared
