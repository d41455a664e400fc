"""LoRA adapters inside fused blocks: y += scaling * B(A(x)), from the layer's floating-point input x.

PEFT wraps a quantized layer in a module of its own, with ``base_layer``, ``lora_A`` and ``lora_B``. A fused block calls
the quantized layer itself and adds the products here: two matrix products per adapter and input. Nothing is cached. The
adapters, their scalings and their weights are read at every call, so switching and changes in place are seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as hooks

from dq_kernels import ops
from dq_runtime.layers import QuantConv2d, QuantLinear, pads_with_zeros

LORA = "peft.tuners.lora.layer"  # the module of PEFT's wrappers, which is not imported: it takes seconds
STOCK: dict[type, type[nn.Module]] = {QuantLinear: nn.Linear, QuantConv2d: nn.Conv2d}


class Adapter(NamedTuple):
    """The product of an adapter: ``down`` is its A, ``up`` its B."""

    down: Any
    up: Any
    scaling: Any  # a number, or a tensor after peft's prepare_model_for_compiled_hotswap


Adapters = dict[nn.Module, list[Adapter]]  # layer -> its active adapters; layers without any are absent


def run_as_made(modules: Iterable[nn.Module]) -> bool:
    """True if a call of each module runs the forward of its class and nothing else, so a fused forward may replace it.

    Offloaders, profilers and users' code register hooks on a module, or replace its ``forward``. Seamless tiling
    changes how convolutions pad.
    """
    if hooks._global_forward_hooks or hooks._global_forward_pre_hooks:
        return False
    module: Any
    for module in modules:  # called hundreds of times a forward pass: no generator, no attribute lookup
        own = module.__dict__
        # With len, torch.compile notices a hook in one of several blocks that share their code; it does not otherwise.
        if "forward" in own or len(own["_forward_hooks"]) or len(own["_forward_pre_hooks"]):
            return False
        if "padding_mode" in own and not pads_with_zeros(module):
            return False
    return True


def is_dropout(module: Any) -> bool:
    """True for a module that returns its input in evaluation mode."""
    return type(module) is nn.Dropout or type(module) is nn.Identity


def unwrapped(layer: Any) -> Any:
    """The layer that an adapter wraps; the layer itself if there is no adapter."""
    base = layer._modules.get("base_layer")
    return layer if base is None else base


def adapters_of(layers: Iterable[Any]) -> Adapters | None:
    """The active adapters of layers; None if a layer is not quantized, or its adapters need PEFT's own forward."""
    found: Adapters = {}
    for layer in layers:
        if type(layer) is not QuantLinear and type(layer) is not QuantConv2d:
            active = active_adapters(layer)
            if active is None:
                return None
            if active:
                found[layer] = active
    return found


def active_adapters(layer: Any) -> list[Adapter] | None:
    """The adapters that a layer applies now; None if it is not quantized, or they need PEFT's own forward.

    PEFT's forward serves other methods than LoRA and its variants (DoRA), merged adapters, dropout, biases, gradients,
    and hooks on the adapter's modules.
    """
    if type(layer) in STOCK:
        return []
    kind = type(layer)
    base = unwrapped(layer)
    if (
        kind.__module__ != LORA
        or type(base) not in STOCK
        or kind.__name__ != STOCK[type(base)].__name__
        or layer.merged
        or not run_as_made((layer, base))
    ):
        return None
    found: list[Adapter] = []
    for name in () if layer.disable_adapters else layer.active_adapters:
        if name not in layer.lora_A:
            continue
        down, up, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
        if (
            layer.use_dora.get(name)
            or name in getattr(layer, "lora_variant", ())
            or not _is_plain(down, up, dropout, base)
        ):
            return None
        found.append(Adapter(down, up, layer.scaling[name]))
    return found


def _is_plain(down: Any, up: Any, dropout: Any, base: Any) -> bool:
    """True if an adapter is two stock layers without a bias, which take no gradient and nothing intercepts."""
    stock = STOCK[type(base)]
    return bool(
        type(down) is type(up) is stock
        and (stock is nn.Linear or (down.padding_mode == up.padding_mode == "zeros" and down.groups == up.groups == 1))
        and down.bias is None
        and up.bias is None
        and (type(dropout) is nn.Identity or (type(dropout) is nn.Dropout and not dropout.training))
        and run_as_made((down, up, dropout))
        and down.weight.device == up.weight.device == base.packed_weight.device
        and down.weight.dtype in ops.COMPUTE_DTYPES
        and not (torch.is_grad_enabled() and (down.weight.requires_grad or up.weight.requires_grad))
    )


def add_adapters(adapters: Sequence[Sequence[Adapter]], sizes: Sequence[int], x: torch.Tensor, y: torch.Tensor) -> None:
    """Adds, in place, the products of the adapters of linears (or 1x1 convolutions) that read one input.

    The linears' first adapters share one product with their A, and so do the second ones. Neighbours of one shape share
    one batched product with their B.

    Args:
        adapters: of each linear.
        sizes: the number of outputs of each linear.
        x: [B, ..., K], the input.
        y: [B, ..., sum of sizes], contiguous and no view: the linears' results, concatenated.
    """
    given, rows = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    for position in range(max(len(active) for active in adapters)):
        runs = _runs(adapters, sizes, position)
        down = stacked([adapter.down.weight for run in runs for adapter in run.adapters]).flatten(1)
        lows = F.linear(given, down.to(x.dtype)).split([run.rank * len(run.adapters) for run in runs], dim=1)
        for run, low in zip(runs, lows, strict=True):
            count = len(run.adapters)
            low, scaling = _scaled(low, run.adapters[0].scaling)
            up = stacked([adapter.up.weight for adapter in run.adapters]).flatten(1).to(x.dtype)
            low = low.unflatten(1, (count, run.rank)).transpose(0, 1)
            up = up.unflatten(0, (count, run.size)).transpose(1, 2)
            if torch.compiler.is_compiling():  # it cannot write to the view below
                product = torch.bmm(low, up).transpose(0, 1).flatten(1)
                rows[:, run.column : run.column + count * run.size].add_(product, alpha=scaling)
            else:
                result = rows.as_strided((count, len(rows), run.size), (run.size, rows.shape[1], 1), run.column)
                result.baddbmm_(low, up, alpha=scaling)


def residual_with_adapters(
    adapters: Sequence[Adapter], image: torch.Tensor, residual: torch.Tensor | None = None
) -> torch.Tensor | None:
    """The residual [B, OH, OW, N], or 0, plus the products of a convolution's adapters of an image [B, H, W, K]."""
    for adapter in adapters:
        down, up = adapter.down, adapter.up.weight.to(image.dtype).flatten(1)
        low = F.conv2d(
            image.permute(0, 3, 1, 2), down.weight.to(image.dtype), None, down.stride, down.padding, down.dilation
        ).permute(0, 2, 3, 1)
        low, scaling = _scaled(low, adapter.scaling)
        rows = low.reshape(-1, low.shape[-1])
        if residual is None:  # beta = 0: the first argument is not read
            total = torch.addmm(rows.new_empty(up.shape[0]), rows, up.t(), beta=0, alpha=scaling)
        else:
            total = torch.addmm(residual.reshape(-1, up.shape[0]).to(image.dtype), rows, up.t(), alpha=scaling)
        residual = total.view(*low.shape[:-1], -1)
    return residual


def _scaled(low: torch.Tensor, scaling: Any) -> tuple[torch.Tensor, Any]:
    """A product with A, and the scaling of the next product; a scaling on the device is applied without a sync."""
    return (low * scaling.to(low.dtype), 1) if isinstance(scaling, torch.Tensor) else (low, scaling)


class _Run(NamedTuple):
    """Neighbours whose adapters have one shape and scaling: ``size`` columns of the result each, from ``column``."""

    column: int
    size: int
    rank: int
    adapters: list[Adapter]


def _runs(adapters: Sequence[Sequence[Adapter]], sizes: Sequence[int], position: int) -> list[_Run]:
    runs: list[_Run] = []
    column = 0
    for active, size in zip(adapters, sizes, strict=True):
        if len(active) > position:
            adapter = active[position]
            rank = adapter.up.weight.shape[1]
            last = runs[-1] if runs else None
            if (
                last is not None
                and (last.column + last.size * len(last.adapters), last.size, last.rank) == (column, size, rank)
                and not any(isinstance(member.scaling, torch.Tensor) for member in (last.adapters[0], adapter))
                and last.adapters[0].scaling == adapter.scaling
            ):
                last.adapters.append(adapter)
            else:
                runs.append(_Run(column, size, rank, [adapter]))
        column += size
    return runs


def stacked(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The weights as one, [sum of rows, K]. They become views of it, so later changes of a weight in place are seen.

    A second call finds the weights next to one another in memory, and copies nothing.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    if torch.compiler.is_compiling() or len({(part.dtype, part.is_inference()) for part in parts}) > 1:
        return torch.cat(list(parts))
    if not _adjacent(parts):
        # Inference tensors share memory with inference tensors only.
        with torch.inference_mode(first.is_inference()):
            merged = torch.cat([part.data for part in parts])
            for part, view in zip(parts, merged.split([part.shape[0] for part in parts]), strict=True):
                part.data = view
    return first.as_strided((sum(part.shape[0] for part in parts), first.shape[1]), first.stride())


def _adjacent(parts: Sequence[torch.Tensor]) -> bool:
    """True if the weights lie in one storage, without gaps and in order."""
    storage, end = parts[0].untyped_storage().data_ptr(), parts[0].data_ptr()
    for part in parts:
        if part.data_ptr() != end or part.untyped_storage().data_ptr() != storage or not part.is_contiguous():
            return False
        end += part.nbytes
    return not parts[0].is_meta
