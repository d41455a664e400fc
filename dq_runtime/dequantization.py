"""Converting a quantized model back to a stock one."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import nn

from dq_runtime.architectures.supported import without_compilation
from dq_runtime.attention import Int8AttnProcessor
from dq_runtime.convert import GRID_NAME, replace_layers
from dq_runtime.fused import unfuse
from dq_runtime.graphs import disable_cuda_graphs
from dq_runtime.layers import QuantizedLayer, constructor_arguments, is_quantized, quantized_layers
from dq_runtime.rollback import unchanged_on_error
from dq_runtime.validation import instance


@torch.no_grad()
def dequantize(model: Any) -> Any:
    """Converts a quantized model back to a stock one with the rounded weights, in place.

    Raises:
        ValueError: if the model is not quantized.
        TypeError: if it is no model.
    """
    instance("model", model, nn.Module)
    given, model = model, without_compilation(model)
    if not is_quantized(model):
        raise ValueError("The model is not quantized")
    with unchanged_on_error(model):
        _dequantize(model)
    return given


def _dequantize(model: Any) -> None:
    disable_cuda_graphs(model)
    unfuse(model)
    dtype = model.dtype
    replace_layers(model, {layer: _dequantized_layer(layer, dtype) for layer in quantized_layers(model).values()})
    for module in model.modules():
        if isinstance(module, Attention) and type(module.processor) is Int8AttnProcessor:
            module.set_processor(AttnProcessor2_0())
    model.requires_grad_(True)
    if hasattr(model, GRID_NAME):
        for hook in model.timestep_grid.hooks:
            hook.remove()
        del model.timestep_grid
    if getattr(model, "hf_quantizer", None) is not None:
        del model.hf_quantizer
    model._internal_dict = FrozenDict({k: v for k, v in model.config.items() if k != "quantization_config"})


def _dequantized_layer(layer: QuantizedLayer, dtype: torch.dtype) -> nn.Module:
    weight = layer.dequantized_weight().movedim(-1, 1).contiguous()
    module = layer.stock(**constructor_arguments(layer), device="meta")
    state = {"weight": weight.to(dtype)}
    if layer.bias is not None:
        state["bias"] = layer.bias.to(dtype)
    module.load_state_dict(state, assign=True)
    return module.train(layer.training)
