"""Quantized layers: drop-ins for ``nn.Linear`` and ``nn.Conv2d`` with packed INT4 weights and small tables.

A layer is created empty, on the meta device; ``load_state_dict(tensors, assign=True)`` or diffusers' loader fills it.
Its forward quantizes the input with the current timestep's scale, multiplies integers, and returns the input's dtype.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import nn

from dq_kernels import ops
from dq_kernels.ops import Norm, PackedWeight, Quantizer
from dq_runtime.config import LARGEST_DILATION
from dq_runtime.tables import TableModule
from dq_runtime.timesteps import TimestepGrid
from dq_runtime.validation import is_within

# The product of both scales and an int32 is finite in float32, and so is the inverse of an activation's scale.
TABLE_RANGES = {
    "weight_scale": (2.0**-149, 2.0**40),
    "act_scale": (2.0**-127, 2.0**40),
    "weight_dilation": (1 / LARGEST_DILATION, LARGEST_DILATION),
}


class _NoGradient(torch.autograd.Function):
    """Returns y; a gradient from y to x raises, since rounding has none and zero would be silently wrong."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, x: torch.Tensor, name: str) -> torch.Tensor:
        ctx.name = name
        ctx.mark_dirty(y)  # not a view of y: those may not be changed in place
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise RuntimeError(
            f"{ctx.name}: no gradient passes through a quantized layer. Call unet.dequantize() to train, or to guide "
            "sampling by gradients"
        )


def wants_gradient(x: torch.Tensor) -> bool:
    """True if autograd may need a gradient through x."""
    return x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()


class QuantizedLayer(TableModule):
    """A linear layer or convolution with packed INT4 weights, and the operators that use them.

    ``quantize`` and ``*_norm_quantize`` compute the int8 input of ``multiply`` and ``convolve``.

    Tensors (N output channels, K input channels, T timesteps):
        weight: uint8, packed: [N, K'/2] or [N, KH, KW, K'/2], K' = K padded to even.
        weight_scale, weight_sum: [N] fp32; [N] int32, the sum of a channel's 4-bit values (also a checksum).
        weight_dilation: [K] fp32.
        act_scale, act_zero_point: [T] fp32, [T] int32.
        bias: [N] in the compute dtype, or None.
    """

    weight: torch.Tensor
    bias: Any
    weight_scale: torch.Tensor
    weight_sum: torch.Tensor
    weight_dilation: torch.Tensor
    act_scale: torch.Tensor
    act_zero_point: torch.Tensor
    timestep_grid: TimestepGrid
    name: str
    activation_bits: int
    stock: ClassVar[type[nn.Linear] | type[nn.Conv2d]]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    _weight_view: torch.Tensor | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A stock floating-point layer, if there are arguments; ``like`` creates quantized ones.

        PEFT creates the convolutions of a LoRA with ``type(base_layer)(...)``.
        """
        return cls.stock(*args, **kwargs) if args or kwargs else super().__new__(cls)

    @classmethod
    def like(
        cls, layer: nn.Linear | nn.Conv2d, name: str, activation_bits: int, timestep_grid: TimestepGrid
    ) -> QuantizedLayer:
        """An empty quantized layer with the shape of a stock layer (groups = 1)."""
        quantized = cls.__new__(cls)
        cls.stock.__init__(quantized, **constructor_arguments(layer), device="meta", dtype=layer.weight.dtype)
        out_channels, in_channels, *taps = layer.weight.shape
        quantized.name = name
        quantized.activation_bits = activation_bits
        # All layers share the UNet's grid; as a submodule it would be saved once per layer.
        object.__setattr__(quantized, "timestep_grid", timestep_grid)
        packed = torch.empty(out_channels, *taps, (in_channels + 1) // 2, dtype=torch.uint8, device="meta")
        quantized.weight = nn.Parameter(packed, requires_grad=False)
        if quantized.bias is not None:
            quantized.bias.requires_grad_(False)
        for table, size, dtype in (
            ("weight_scale", out_channels, torch.float32),
            ("weight_sum", out_channels, torch.int32),
            ("weight_dilation", in_channels, torch.float32),
            ("act_scale", timestep_grid.num_timesteps, torch.float32),
            ("act_zero_point", timestep_grid.num_timesteps, torch.int32),
        ):
            quantized.register_buffer(table, torch.empty(size, dtype=dtype, device="meta"))
        return quantized

    def _checked_quantizer(self, x: torch.Tensor, channels: int) -> Quantizer:
        """The input quantizer at the current timestep of each sample.

        Args:
            x: the layer's floating-point input, [B, ...].
            channels: number of input channels; with a skip, of both tensors.

        Raises:
            ValueError: if the number of samples or channels, or the dtype, does not fit this layer.
            RuntimeError: if no timestep is known.
        """
        tables: Any = self._buffers  # nn.Module's attribute lookup is slow, and a forward pass needs thousands
        expected = tables["weight_dilation"].shape[0]
        if channels != expected:
            raise ValueError(f"{self.name}: expected an input of {expected} channels, got {channels}")
        if x.dtype not in ops.COMPUTE_DTYPES:
            raise ValueError(f"{self.name}: expected float16, bfloat16 or float32, got {x.dtype}; cast the UNet to one")
        return self.quantizer(x)

    def quantizer(self, x: torch.Tensor) -> Quantizer:
        """The input quantizer for the samples of x, the floating-point or quantized input."""
        tables: Any = self._buffers
        index = self.index_of_batch(x.shape[0])
        if index.device != x.device:
            index = index.to(x.device)
        return Quantizer(
            tables["weight_dilation"], tables["act_scale"], tables["act_zero_point"], index, self.activation_bits
        )

    def quantize(self, x: torch.Tensor, padding: tuple[int, int] = (0, 0)) -> torch.Tensor:
        """x [B, ..., K] -> int8 [B, ..., K']; an image is padded."""
        return ops.quantize(x, self._checked_quantizer(x, x.shape[-1]), padding)

    def layer_norm_quantize(self, x: torch.Tensor, norm: nn.LayerNorm) -> torch.Tensor:
        """The int8 input of the layer from x [B, ..., K]: layer norm, then quantization."""
        return ops.layer_norm_quantize(
            x, Norm(norm.weight, norm.bias, norm.eps), self._checked_quantizer(x, x.shape[-1])
        )

    def group_norm_quantize(
        self,
        x: torch.Tensor,
        norm: nn.GroupNorm,
        silu: bool = True,
        skip: torch.Tensor | None = None,
        statistics: torch.Tensor | None = None,
        skip_statistics: torch.Tensor | None = None,
        padding: tuple[int, int] = (0, 0),
        shortcut: QuantizedLayer | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The int8 input of the layer from an image x [B, H, W, K]: ``ops.group_norm_quantize``.

        Also that of the shortcut, which reads x and skip without norm; empty if there is none.
        """
        channels = x.shape[-1] + (0 if skip is None else skip.shape[-1])
        quantizer = self._checked_quantizer(x, channels)
        plain = None if shortcut is None else shortcut._checked_quantizer(x, channels)
        parameters = Norm(norm.weight, norm.bias, norm.eps)
        return ops.group_norm_quantize(
            x, norm.num_groups, parameters, quantizer, silu, skip, statistics, skip_statistics, padding, plain
        )

    def multiply(
        self,
        q: torch.Tensor,
        out_dtype: torch.dtype,
        residual: torch.Tensor | None = None,
        following: QuantizedLayer | None = None,
    ) -> torch.Tensor:
        """The layer's output [B, ..., N] for its int8 input; a 1x1 convolution multiplies each pixel.

        With a following layer the output is that layer's int8 input.
        """
        next_quantizer = None if following is None else following.quantizer(q)
        bias = self._parameters["bias"]
        return ops.int4_linear(
            q, self.packed_weight(2), self.quantizer(q), bias, residual, out_dtype, next_quantizer
        )  # fmt: skip

    def geglu_quantize(self, q: torch.Tensor, following: QuantizedLayer) -> torch.Tensor:
        """The int8 input [B, ..., N / 2] of the following layer: the product, GEGLU, then quantization."""
        weight = self.packed_weight(2)
        return ops.int4_geglu_quantize(q, weight, self.quantizer(q), following.quantizer(q), self._parameters["bias"])

    def convolve(
        self,
        q: torch.Tensor,
        out_dtype: torch.dtype,
        channel_add: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        upsample: bool = False,
        with_statistics: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The convolution of the padded int8 image, and statistics for the next norm (``ops.int4_conv2d``).

        A linear layer runs as a 1x1 convolution.
        """
        stride, dilation = (self.stride, self.dilation) if isinstance(self, nn.Conv2d) else ((1, 1), (1, 1))
        bias = self._parameters["bias"]
        return ops.int4_conv2d(
            q, self.packed_weight(4), self.quantizer(q), bias, channel_add, residual, stride, dilation, upsample,
            out_dtype, with_statistics,
        )  # fmt: skip

    def packed_weight(self, ndim: int) -> PackedWeight:
        """The weight as a matrix [N, K'/2] or, for 4 dimensions, as taps [N, KH, KW, K'/2]."""
        tables: Any = self._buffers
        values: Any = self._parameters["weight"]
        if values.ndim != ndim:
            values = self._with_other_rank(values)
        return PackedWeight(values, tables["weight_scale"], tables["weight_sum"])

    def _with_other_rank(self, values: torch.Tensor) -> torch.Tensor:
        """The weight without its two dimensions of 1, or with them."""
        known = self._weight_view
        if known is not None and values.device.type == "cpu" and known.data_ptr() == values.data_ptr():
            return known
        view = values[:, None, None] if values.ndim == 2 else values.flatten(1)
        if values.device.type == "cpu" and not torch.compiler.is_compiling():
            self._weight_view = view  # oneDNN's copy of the weight lives as long as this object
        return view

    def index_of_batch(self, batch: int) -> torch.Tensor:
        """The current timestep's row of the tables for each sample, [batch] int32.

        Raises:
            ValueError: if the batch is not the UNet's, and the UNet's samples have different timesteps.
            RuntimeError: if no timestep is known.
        """
        grid = self.timestep_grid
        if batch == grid.index.shape[0]:
            return grid.index
        if grid.index.numel() == 0:
            raise RuntimeError(
                f"{self.name}: no timestep is known. Call the UNet, not the layer or `unet.forward`: a hook maps the "
                "UNet's `timestep` argument to the activation scales of all layers"
            )
        if not grid.uniform:
            raise ValueError(
                f"{self.name}: expected a batch of {grid.index.shape[0]} samples, like the UNet's `sample`, got "
                f"{batch}, and cannot tell the timestep of each. Call the UNet with one `timestep` for all samples, or "
                "keep the layer in floating point with modules_to_not_convert"
            )
        return grid.index[:1].expand(batch).contiguous()  # an attention processor changed the batch

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedLayer:
        """A copy that reads the same timestep grid, or the copied grid if the UNet is copied as well."""
        memo.setdefault(id(self.timestep_grid), self.timestep_grid)
        duplicate = type(self).__new__(type(self))
        memo[id(self)] = duplicate
        duplicate.__setstate__(copy.deepcopy({**self.__dict__, "_weight_view": None}, memo))
        return duplicate

    def check_tensors(self) -> None:
        """Raises ValueError, naming the layer, if a tensor holds values that calibration cannot produce."""
        remedy = "The checkpoint is corrupt: download or save it again"
        for name, (least, most) in TABLE_RANGES.items():
            if not is_within(getattr(self, name), least, most):
                raise ValueError(
                    f"{self.name}.{name} must be finite, positive, and from {least:g} to {most:g}. {remedy}"
                )
        if self.bias is not None and not bool(self.bias.isfinite().all()):
            raise ValueError(f"{self.name}.bias must be finite in {self.bias.dtype}. {remedy}")
        limit = 2 ** (self.activation_bits - 1)
        if not bool(((self.act_zero_point >= -limit) & (self.act_zero_point < limit)).all()):
            raise ValueError(f"{self.name}.act_zero_point must lie in [{-limit}, {limit - 1}]. {remedy}")
        if not torch.equal(ops.unpack_int4(self.weight).flatten(1).sum(1, dtype=torch.int32), self.weight_sum):
            raise ValueError(f"{self.name}.weight does not add up to {self.name}.weight_sum. {remedy}")

    def dequantized_weight(self) -> torch.Tensor:
        """The rounded weights without their dilation: [N, K] or [N, KH, KW, K] fp32."""
        per_output = self.weight_scale.view(-1, *[1] * (self.weight.ndim - 1))
        weight = ops.unpack_int4(self.weight)[..., : self.weight_dilation.numel()]
        return weight * per_output / self.weight_dilation


class QuantLinear(QuantizedLayer, nn.Linear):
    """``y = x W^T + b`` with packed INT4 weights; takes and returns [B, ..., channels] in the compute dtype."""

    stock = nn.Linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.multiply(self.quantize(x), x.dtype)
        return _NoGradient.apply(y, x, self.name) if wants_gradient(x) else y


class QuantConv2d(QuantizedLayer, nn.Conv2d):
    """A 2-D convolution with packed INT4 weights; takes [B, K, H, W], returns channels_last [B, N, OH, OW]."""

    stock = nn.Conv2d
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.quantize(x.permute(0, 2, 3, 1), self.padding)
        y = self.convolve(q, x.dtype, with_statistics=False)[0]
        if wants_gradient(x):
            y = _NoGradient.apply(y, x, self.name)
        return y.permute(0, 3, 1, 2)


def constructor_arguments(layer: nn.Module) -> dict[str, Any]:
    """The arguments of ``nn.Linear`` or ``nn.Conv2d`` for a layer of the same shape."""
    names = ["in_features", "out_features"]
    if isinstance(layer, nn.Conv2d):
        names = ["in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"]
    return {**{name: getattr(layer, name) for name in names}, "bias": layer.bias is not None}


def is_quantized(unet: nn.Module) -> bool:
    """True if a UNet has quantized layers."""
    return bool(quantized_layers(unet))


def quantized_layers(unet: nn.Module) -> dict[str, QuantizedLayer]:
    """The quantized layers of a UNet, by name."""
    return {name: module for name, module in unet.named_modules() if isinstance(module, QuantizedLayer)}
