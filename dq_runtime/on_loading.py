"""Quantization of floating-point weights while they are loaded: no data, activation scales at run time.

Each layer is quantized as soon as its weight is there, and the weight is freed. Layers that read one tensor have equal
dilations: q, k and v of a self-attention wait for one another, and layers of several blocks are not dilated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dq_runtime.architectures.supported import architecture_of
from dq_runtime.config import DilateQuantConfig
from dq_runtime.convert import empty_layer, finish_conversion, plan_conversion, replace_layers
from dq_runtime.free_memory import return_free_memory
from dq_runtime.layers import QuantizedLayer
from dq_runtime.weights import in_parts, layer_tensors, quantize_dilated, shared_weight_dilation

SELF_ATTENTION = ("to_q", "to_k", "to_v")


class WeightsOnLoading:
    """Replaces a model's layers, one group after the other, by quantized ones.

    Args:
        model: a stock model on the meta device.
        config: without timesteps. Its dilation "joint" needs data, so it means "weight" here.
    """

    def __init__(self, model: Any, config: DilateQuantConfig) -> None:
        self._model = model
        self._config = config
        self._plan = plan_conversion(model, config)
        self._names: dict[nn.Module | None, str] = {layer: name for name, layer in self._plan.layers.items()}
        self._waiting: dict[str, torch.Tensor] = {}  # weights of groups that are not complete
        shared = architecture_of(model).linears_by_input(model).values()
        self._undilated = {self._names[layer] for layers, _ in shared for layer in layers if layer in self._names}
        self._groups = {name: group for group in self._self_attentions() for name in group}

    def _self_attentions(self) -> list[list[str]]:
        groups = []
        for name, module in self._model.named_modules():
            layers = [module._modules.get(child) for child in SELF_ATTENTION]
            if all(layer in self._names for layer in layers) and not getattr(module, "is_cross_attention", False):
                groups.append([f"{name}.{child}" for child in SELF_ATTENTION])
        return groups

    def takes(self, module: nn.Module, tensor_name: str) -> bool:
        """True for the weight of a layer that is to be quantized, or was, under its other name."""
        return tensor_name == "weight" and (module in self._names or isinstance(module, QuantizedLayer))

    def add(self, module: nn.Module, weight: torch.Tensor) -> None:
        """Quantizes a layer and those that waited for it, on the weight's device.

        Raises:
            ValueError: if the weight is not finite.
        """
        if isinstance(module, QuantizedLayer):
            return
        name = self._names[module]
        if not all(bool(rows.float().isfinite().all()) for rows in in_parts(weight)):  # float8 has no isfinite
            raise ValueError(f"{name}.weight holds NaN or infinity: download the checkpoint again")
        group = self._groups.get(name, [name])
        # A tensor of a mapped file keeps all of it in memory, so those that wait are copies.
        self._waiting[name] = weight.clone() if len(group) > 1 else weight
        if all(member in self._waiting for member in group):
            self._quantize(group, [self._waiting.pop(member) for member in group])

    @torch.no_grad()
    def _quantize(self, names: Sequence[str], weights: Sequence[torch.Tensor]) -> None:
        device = weights[0].device
        dilation = torch.ones(weights[0].shape[1], dtype=torch.float32, device=device)
        if self._config.dilation != "none" and names[0] not in self._undilated:
            dilation = shared_weight_dilation(weights, self._config.max_dilation)
        for name, weight in zip(names, weights, strict=True):
            stock = self._plan.layers[name]
            values, weight_scale = quantize_dilated(weight, dilation)
            layer = empty_layer(stock, name, self._config, None)
            tensors = layer_tensors(stock, values, weight_scale, dilation, None, None, None)
            layer.load_state_dict(tensors, strict=False, assign=True)
            layer._parameters["bias"] = stock._parameters["bias"]  # loaded before or later, by its name
            replace_layers(self._model, {stock: layer.train(stock.training)})
            del self._names[stock]
        return_free_memory()

    def finish(self) -> None:
        """Completes the conversion.

        Raises:
            ValueError: if a weight was not in the checkpoint.
        """
        if self._names:
            listed = ", ".join(f"{name}.weight" for name in sorted(self._names.values())[:10])
            raise ValueError(f"The checkpoint lacks {len(self._names)} weights: {listed}. Download it again")
        self._plan.log()
        finish_conversion(self._model, self._plan, None)
