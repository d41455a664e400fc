"""State that the fused blocks of a UNet share within one forward pass: merged linears, and statistics of images."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from dq_kernels import ops
from dq_kernels.ops import PackedWeight
from dq_runtime.adapters import active_adapters, add_adapters, run_as_made, unwrapped
from dq_runtime.call_state import CallState
from dq_runtime.gradients import wants_gradient
from dq_runtime.layers import QuantizedLayer, QuantLinear

QUANTIZER = ("weight_dilation", "act_scale", "act_zero_point")
_MERGING = threading.Lock()  # held while linears are merged: threads may share a model
MERGED = ("packed_weight", "weight_scale", "weight_sum", "bias")


class _Results:
    """The members' results for one input."""

    def __init__(self) -> None:
        self.read: torch.Tensor | None = None
        self.of_members: Sequence[torch.Tensor | None] = ()


class LinearGroup:
    """Quantized linears that read one tensor, as one GEMM.

    The members' weights and tables become views of the group's, so nothing is held twice. The group cannot own them:
    offloaders and ``load_state_dict(assign=True)`` replace a member's tensors or their ``data`` without a call into the
    member, one member at a time, so addresses are compared before use. A parameter stays the same object, since group
    offloading keeps it; a view that is set as its ``data`` has its own version, so ``count_new_weights`` is needed.

    Args:
        places: the module that holds each linear, and the linear's name in it: an adapter may wrap the linear. The
            linears have equal quantizers (see ``same_quantizer``).
        activation: applied to the input before quantization.
        around: modules that contain the linears. If one has another ``forward``, as with group offloading, its members'
            weights may not be loaded while another's are.
    """

    packed_weight: torch.Tensor
    weight_scale: torch.Tensor
    weight_sum: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self,
        places: Sequence[tuple[nn.Module, str]],
        activation: Callable[[torch.Tensor], torch.Tensor] | None = None,
        around: Sequence[nn.Module] = (),
    ) -> None:
        self.places = list(places)
        self.layers: list[Any] = [unwrapped(parent._modules[name]) for parent, name in self.places]
        self.sizes = [layer.out_features for layer in self.layers]
        self.activation = activation
        self.around = around
        self._calls = CallState(_Results)
        self._addresses: list[int] = []
        self._merge()
        for layer in self.layers:
            layer.after_move = self.follow

    def _merge(self) -> None:
        with _MERGING:
            if self._addresses != self._members_addresses():  # else another thread has merged
                self._merge_now()

    def _merge_now(self) -> None:
        # Inference tensors share memory with inference tensors only: those of a model made in inference mode.
        with torch.inference_mode(self.layers[0].packed_weight.is_inference()):
            for name in MERGED:
                parts = [getattr(layer, name) for layer in self.layers]
                present = [part for part in parts if part is not None]
                if not present:
                    setattr(self, name, None)
                    continue
                filled = [
                    present[0].new_zeros(size) if part is None else part.data
                    for part, size in zip(parts, self.sizes, strict=True)
                ]
                merged = torch.cat(filled)
                setattr(self, name, merged)
                for part, view in zip(parts, merged.split(self.sizes), strict=True):
                    if part is not None:
                        part.data = view
        self._addresses = self._members_addresses()

    def follow(self) -> None:
        """Merges again once the last member was moved or cast: compiled code does not compare addresses."""
        devices = {layer.packed_weight.device for layer in self.layers}
        dtypes = {layer.bias.dtype for layer in self.layers if layer.bias is not None}
        if len(devices) == 1 and len(dtypes) <= 1 and self._addresses != self._members_addresses():
            self._merge()

    def _members_addresses(self) -> list[int]:
        tensors = (getattr(layer, name) for layer in self.layers for name in MERGED)
        return [tensor.data_ptr() for tensor in tensors if tensor is not None]

    def multiply(self, q: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
        """int8 [B, ..., K] -> the members' results, concatenated: [B, ..., sum of N]."""
        return ops.int4_linear(q, self._weight(), self.layers[0].quantizer(q), self.bias, out_dtype=out_dtype)

    def multiply_with_statistics(
        self, q: torch.Tensor, out_dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As ``multiply``, for q [B, tokens, K]; and the statistics of the result, if ``ops.int4_conv2d`` has them."""
        values, scale, total = self._weight()
        y, statistics = ops.int4_conv2d(
            q[:, :, None], PackedWeight(values[:, None, None], scale, total), self.layers[0].quantizer(q), self.bias,
            out_dtype=out_dtype, with_statistics=True,
        )  # fmt: skip
        return y.squeeze(2), statistics if statistics.numel() else None

    def _weight(self) -> PackedWeight:
        if not torch.compiler.is_compiling() and self._addresses != self._members_addresses():
            self._merge()  # a member's tensors were replaced, or the model was copied
        return PackedWeight(self.packed_weight, self.weight_scale, self.weight_sum)

    def result(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        """A member's result for x, adapters included; the first request for an x computes the results of all members.

        Args:
            layer: the member, or the adapter that wraps it. It is called itself if it cannot be part of the group now.
            x: the input, before the activation.
        """
        base = unwrapped(layer)
        results = self._calls.now()
        if results.read is not x:
            results.of_members = self._all_results(self._activated(x))
            results.read = x
        for member, result in zip(self.layers, results.of_members, strict=False):
            if member is base and result is not None:
                return result
        return layer(self._activated(x))

    def _activated(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.activation is None else self.activation(x)

    def _all_results(self, x: torch.Tensor) -> list[torch.Tensor | None]:
        """The members' results, None for those whose adapter needs PEFT's forward; no results if members are hooked."""
        if wants_gradient(x) or not run_as_made(self.layers) or not self._all_loaded(x.device):
            return []
        adapters = [active_adapters(parent._modules[name]) for parent, name in self.places]
        y = self.multiply(self.layers[0].quantize(x), x.dtype)
        if any(adapters):
            add_adapters([active or [] for active in adapters], self.sizes, x, y)
        results = y.split(self.sizes, dim=-1)
        return [None if active is None else part for active, part in zip(adapters, results, strict=True)]

    def _all_loaded(self, device: torch.device) -> bool:
        for module in self.around:
            if "forward" in module.__dict__:
                return False
        return {member._parameters["packed_weight"].device for member in self.layers} == {device}

    def count_new_weights(self, *_: Any) -> None:
        """Increments the version of the merged weight after a member was loaded in place: oneDNN's copy is outdated."""
        self.packed_weight.add_(0)

    def forget(self) -> None:
        """Clears the results, at the end of a forward pass."""
        for results in self._calls.all_of_call():
            results.read, results.of_members = None, ()


class _Pass:
    """The state of a forward pass."""

    def __init__(self) -> None:
        self.int8_readers: dict[nn.Module, QuantizedLayer] = {}
        self.images_are_final = True
        # By the image's id: the image, its version and its statistics. The reference is weak, so that the image is
        # freed as early as in an unfused UNet.
        self.statistics: dict[int, tuple[weakref.ref[torch.Tensor], int, torch.Tensor]] = {}


class ForwardState:
    """State that the fused blocks of one UNet share within a forward pass.

    ``groups`` are the linears that read one tensor: time projections, cross-attention keys and values. The statistics
    of an image are computed by the convolution that writes it, and used by the norms that read it. ``int8_readers``
    are the layers that alone read the result of a block in this pass: the block writes their int8 input.
    """

    def __init__(self, groups: dict[str, LinearGroup]) -> None:
        self.groups = groups
        self.hooks: list[Any] = []  # hooks of the UNet that call the methods below
        self._calls = CallState(_Pass)

    @property
    def int8_readers(self) -> dict[nn.Module, QuantizedLayer]:
        """The only reader of a block's result, by block."""
        return self._calls.now().int8_readers

    def remember(self, image: torch.Tensor, statistics: torch.Tensor) -> torch.Tensor:
        """Stores an image's statistics, if there are any, for the norms that read the image; returns the image."""
        if statistics.numel() and self._calls.now().images_are_final and not torch.compiler.is_compiling():
            self._calls.now().statistics[id(image)] = (weakref.ref(image), _version(image), statistics)
        return image

    def recall(self, image: torch.Tensor | None) -> torch.Tensor | None:
        """The statistics of an image; None if they are not stored, or the image was changed since."""
        if image is None or torch.compiler.is_compiling():
            return None
        known, version, statistics = self._calls.now().statistics.get(id(image), (lambda: None, 0, None))
        return statistics if known() is image and version == _version(image) else None

    def begin(self, unet: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Clears the state of a failed pass; decides if statistics may be stored in this one.

        Inference tensors have no version, so in inference mode a change in place goes unnoticed. Statistics are stored
        only if nothing can change an image: no hook, and no T2I-Adapter, whose features are added in place.
        """
        self.forget()
        if torch.compiler.is_compiling():
            return  # no statistics are kept
        self._calls.now().images_are_final = kwargs.get("down_intrablock_additional_residuals") is None and (
            not torch.is_inference_mode_enabled() or run_as_made(_modules_within(unet))
        )

    def forget(self, *_: Any) -> None:
        """Clears all state, at the end of a forward pass."""
        for state in self._calls.all_of_call():
            state.statistics.clear()
            state.int8_readers.clear()
        for group in self.groups.values():
            group.forget()


def _modules_within(model: nn.Module) -> list[nn.Module]:
    """The modules of a model without itself; some may occur twice. ``model.modules()`` takes five times as long."""
    found = [module for module in model._modules.values() if module is not None]
    for parent in found:
        found.extend([module for module in parent._modules.values() if module is not None])
    return found


def _version(image: torch.Tensor) -> int:
    """The number of changes in place; 0 for inference tensors, which do not count them."""
    return 0 if image.is_inference() else image._version


def same_quantizer(layers: Iterable[Any]) -> bool:
    """True if all layers, without their adapters, are quantized linears with equal input quantizers."""
    members = [unwrapped(layer) for layer in layers]
    first = members[0]
    return all(
        type(layer) is QuantLinear
        and type(first) is QuantLinear
        and layer.in_features == first.in_features
        and layer.activation_bits == first.activation_bits
        and layer.packed_weight.device == first.packed_weight.device
        and all(_equal(getattr(layer, name), getattr(first, name)) for name in QUANTIZER)
        for layer in members
    )


def _equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """True if the values are equal; tensors on the meta device have none, so their shapes are compared."""
    if a is None or b is None:
        return a is b
    return a.shape == b.shape if a.is_meta else torch.equal(a, b)
