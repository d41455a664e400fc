"""Quantized layers: drop-ins for ``nn.Linear`` and ``nn.Conv2d`` with packed INT4 weights and small tables.

A layer is created empty, on the meta device; ``load_state_dict(tensors, assign=True)`` or diffusers' loader fills it.
Its forward quantizes the input with the current timestep's scale, multiplies integers, and returns the input's dtype.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.grad import conv2d_input

from dq_kernels import ops
from dq_kernels.ops import Norm, PackedWeight, Quantizer
from dq_runtime.call_state import CallState
from dq_runtime.config import LARGEST_DILATION
from dq_runtime.dynamic import LastQuantizer, dynamic_quantizer
from dq_runtime.gradients import pass_gradient, wants_gradient
from dq_runtime.stock_weight import StockWeight
from dq_runtime.tables import TableModule
from dq_runtime.timesteps import TimestepGrid
from dq_runtime.validation import is_within

# The product of both scales and an int32 is finite in float32, and so is the inverse of an activation's scale.
TABLE_RANGES = {
    "weight_scale": (2.0**-149, 2.0**40),
    "act_scale": (2.0**-127, 2.0**40),
    "weight_dilation": (1 / LARGEST_DILATION, LARGEST_DILATION),
}


class QuantizedLayer(TableModule):
    """A linear layer or convolution with packed INT4 weights, and the operators that use them.

    ``quantize`` and ``*_norm_quantize`` compute the int8 input of ``multiply`` and ``convolve``.

    Tensors (N output channels, K input channels, T timesteps):
        packed_weight: uint8: [N, K'/2] or [N, KH, KW, K'/2], K' = K padded to even.
        weight_scale, weight_sum: [N] fp32; [N] int32, the sum of a channel's 4-bit values (also a checksum).
        weight_dilation: [K] fp32.
        act_scale, act_zero_point: [T] fp32, [T] int32.
        bias: [N] in the compute dtype, or None.

    ``weight`` is the rounded weight as users of the stock layer expect it (see ``StockWeight``).
    """

    packed_weight: torch.Tensor
    bias: Any
    weight_scale: torch.Tensor
    weight_sum: torch.Tensor
    weight_dilation: torch.Tensor
    act_scale: torch.Tensor
    act_zero_point: torch.Tensor
    timestep_grid: TimestepGrid | None
    dynamic: CallState[LastQuantizer]  # only without a grid
    name: str
    activation_bits: int
    compute_dtype: torch.dtype  # that of ``weight``; of bias, too, if there is one
    stock: ClassVar[type[nn.Linear] | type[nn.Conv2d]]
    fixed: ClassVar[frozenset[str]]  # attributes that cannot be set
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
        cls, layer: nn.Linear | nn.Conv2d, name: str, activation_bits: int, timestep_grid: TimestepGrid | None
    ) -> QuantizedLayer:
        """An empty quantized layer with the shape of a stock layer (groups = 1).

        Without a timestep grid it has no activation tables, and computes scales at run time.
        """
        quantized = cls.__new__(cls)
        stock = cls.stock(**constructor_arguments(layer), device="meta", dtype=layer.weight.dtype)
        quantized.__dict__.update(stock.__dict__)
        del quantized._parameters["weight"]
        if "_conv_forward" in layer.__dict__:
            own: Any = layer._conv_forward
            quantized._conv_forward = MethodType(own.__func__, quantized) if isinstance(own, MethodType) else own
        quantized.compute_dtype = layer.weight.dtype
        out_channels, in_channels, *taps = layer.weight.shape
        quantized.name = name
        quantized.activation_bits = activation_bits
        # All layers share the UNet's grid; as a submodule it would be saved once per layer.
        object.__setattr__(quantized, "timestep_grid", timestep_grid)
        packed = torch.empty(out_channels, *taps, (in_channels + 1) // 2, dtype=torch.uint8, device="meta")
        quantized.packed_weight = nn.Parameter(packed, requires_grad=False)
        if quantized.bias is not None:
            quantized.bias.requires_grad_(False)
        timesteps = None if timestep_grid is None else timestep_grid.num_timesteps
        for table, size, dtype in (
            ("weight_scale", out_channels, torch.float32),
            ("weight_sum", out_channels, torch.int32),
            ("weight_dilation", in_channels, torch.float32),
            ("act_scale", timesteps, torch.float32),
            ("act_zero_point", timesteps, torch.int32),
        ):
            empty = None if size is None else torch.empty(size, dtype=dtype, device="meta")
            quantized.register_buffer(table, empty)
        if timestep_grid is None:
            quantized.dynamic = CallState(LastQuantizer)
        return quantized

    def set_tables(self, grid: TimestepGrid, act_scale: torch.Tensor, act_zero_point: torch.Tensor) -> None:
        """Gives a layer whose scales are computed at run time one for each timestep of a grid instead."""
        object.__setattr__(self, "timestep_grid", grid)
        self._buffers |= {"act_scale": act_scale.clone(), "act_zero_point": act_zero_point.clone()}

    @property
    def is_dynamic(self) -> bool:
        """True if activation scales are computed at run time."""
        return self.timestep_grid is None

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
        """The input quantizer for the samples of x, the floating-point or quantized input.

        A dynamic layer makes it from a floating-point input, and keeps it for the quantized one.
        """
        tables: Any = self._buffers
        if self.timestep_grid is None:
            last: Any = self.dynamic.now()
            if x.dtype != torch.int8:
                last.quantizer = dynamic_quantizer(x, tables["weight_dilation"], self.activation_bits)
            return last.quantizer
        index = self.index_of_batch(x.shape[0], x.device)
        return Quantizer(
            tables["weight_dilation"], tables["act_scale"], tables["act_zero_point"], index, self.activation_bits
        )

    def quantize(self, x: torch.Tensor, padding: tuple[int, int] = (0, 0)) -> torch.Tensor:
        """x [B, ..., K] -> int8 [B, ..., K']; an image is padded."""
        return ops.quantize(x, self._checked_quantizer(x, x.shape[-1]), padding)

    def layer_norm_quantize(self, x: torch.Tensor, norm: nn.LayerNorm) -> torch.Tensor:
        """The int8 input of the layer from x [B, ..., K]: layer norm, then quantization."""
        if self.timestep_grid is None:
            return self.quantize(norm(x))
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
        if self.timestep_grid is None:
            image = x if skip is None else torch.cat([x, skip], dim=-1)
            y = norm(image.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            q = self.quantize((F.silu(y) if silu else y).contiguous(), padding)
            return q, x.new_empty(0, dtype=torch.int8) if shortcut is None else shortcut.quantize(image)
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
        if following is not None and following.is_dynamic:
            return following.quantize(self.multiply(q, out_dtype, residual))
        next_quantizer = None if following is None else following.quantizer(q)
        bias = self._parameters["bias"]
        return ops.int4_linear(
            q, self.weight_record(2), self.quantizer(q), bias, residual, out_dtype, next_quantizer
        )  # fmt: skip

    def geglu_quantize(self, q: torch.Tensor, following: QuantizedLayer) -> torch.Tensor:
        """The int8 input [B, ..., N / 2] of the following layer: the product, GEGLU, then quantization."""
        if following.is_dynamic:
            values, gates = self.multiply(q, self.compute_dtype).chunk(2, dim=-1)
            return following.quantize(values * F.gelu(gates))
        weight = self.weight_record(2)
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
            q, self.weight_record(4), self.quantizer(q), bias, channel_add, residual, stride, dilation, upsample,
            out_dtype, with_statistics,
        )  # fmt: skip

    def weight_record(self, ndim: int) -> PackedWeight:
        """The weight as a matrix [N, K'/2] or, for 4 dimensions, as taps [N, KH, KW, K'/2]."""
        tables: Any = self._buffers
        values: Any = self._parameters["packed_weight"]
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

    def index_of_batch(self, batch: int, device: torch.device) -> torch.Tensor:
        """The current timestep's row of the tables for each sample, [batch] int32; the same tensor during one call.

        Raises:
            ValueError: if the batch is not the UNet's, and the UNet's samples have different timesteps.
            RuntimeError: if no timestep is known.
        """
        grid = self.timestep_grid
        assert grid is not None
        index = grid.index
        if batch == index.shape[0]:
            return index if index.device == device else grid.copied_index(batch, device)
        if index.numel() == 0:
            raise RuntimeError(
                f"{self.name}: no timestep is known. Call the UNet, not the layer or `unet.forward`: a hook maps the "
                "UNet's `timestep` argument to the activation scales of all layers"
            )
        if not grid.uniform:
            raise ValueError(
                f"{self.name}: expected a batch of {index.shape[0]} samples, like the UNet's `sample`, got "
                f"{batch}, and cannot tell the timestep of each. Call the UNet with one `timestep` for all samples, or "
                "keep the layer in floating point with modules_to_not_convert"
            )
        return grid.copied_index(batch, device)  # an attention processor changed the batch

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedLayer:
        """A copy that reads the same timestep grid, or the copied grid if the UNet is copied as well."""
        memo.setdefault(id(self.timestep_grid), self.timestep_grid)
        duplicate = type(self).__new__(type(self))
        memo[id(self)] = duplicate
        duplicate.__setstate__(copy.deepcopy({**self.__dict__, "_weight_view": None}, memo))
        return duplicate

    def check_tensors(self, weights: bool = True) -> None:
        """Raises ValueError, naming the layer, if a tensor holds values that calibration cannot produce.

        A weight on the meta device, which is offloaded to disk, is not checked.

        Args:
            weights: False leaves out the sums of the packed weights, which a checkpoint's digest makes superfluous.
        """
        remedy = "The checkpoint is corrupt: download or save it again"
        for name, (least, most) in TABLE_RANGES.items():
            if getattr(self, name) is not None and not is_within(getattr(self, name), least, most):
                raise ValueError(
                    f"{self.name}.{name} must be finite, positive, and from {least:g} to {most:g}. {remedy}"
                )
        if self.bias is not None and not self.bias.is_meta and not bool(self.bias.isfinite().all()):
            raise ValueError(f"{self.name}.bias must be finite in {self.bias.dtype}. {remedy}")
        limit = 2 ** (self.activation_bits - 1)
        if not self.is_dynamic and not bool(((self.act_zero_point >= -limit) & (self.act_zero_point < limit)).all()):
            raise ValueError(f"{self.name}.act_zero_point must lie in [{-limit}, {limit - 1}]. {remedy}")
        is_read = weights and not self.packed_weight.is_meta
        if is_read and not torch.equal(ops.sum_int4(self.packed_weight), self.weight_sum):
            raise ValueError(f"{self.name}.packed_weight does not add up to {self.name}.weight_sum. {remedy}")

    def dequantized_weight(self) -> torch.Tensor:
        """The rounded weights without their dilation: [N, K] or [N, KH, KW, K] fp32."""
        per_output = self.weight_scale.view(-1, *[1] * (self.packed_weight.ndim - 1))
        weight = ops.unpack_int4(self.packed_weight)[..., : self.weight_dilation.numel()]
        return weight * per_output / self.weight_dilation

    @property
    def weight(self) -> torch.Tensor:
        """The rounded weight in the stock layer's shape and the compute dtype; read only."""
        return self.stock_weight_values() if torch.compiler.is_compiling() else StockWeight(self)

    @property
    def stock_shape(self) -> tuple[int, ...]:
        """The shape of the stock layer's weight."""
        out_channels, *taps, _ = self.packed_weight.shape
        return (out_channels, self.weight_dilation.numel(), *taps)

    @torch.no_grad()
    def stock_weight_values(self) -> torch.Tensor:
        """The values of ``weight``, as an ordinary tensor."""
        return self.dequantized_weight().movedim(-1, 1).to(self.compute_dtype).contiguous()

    def unclamped(self, q: torch.Tensor) -> torch.Tensor:
        """True where an int8 input [B, ..., K'] is inside its range: [B, ..., K] bool."""
        limit = 2 ** (self.activation_bits - 1)
        q = q[..., : self.weight_dilation.numel()]
        return (q > -limit) & (q < limit - 1)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.fixed:
            raise ValueError(
                f"{self.__dict__.get('name', type(self).__name__)}.{name} cannot be changed: the weight is packed in "
                "INT4 for it. Change the floating-point model before calibration, or call dequantize() first"
            )
        super().__setattr__(name, value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        old = state_dict.get(f"{prefix}weight")  # the name of ``packed_weight`` in older versions
        if old is not None and old.dtype == torch.uint8:
            state_dict[f"{prefix}packed_weight"] = state_dict.pop(f"{prefix}weight")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=self.packed_weight.device)).dtype
        return super()._apply(fn, recurse)


class QuantLinear(QuantizedLayer, nn.Linear):  # type: ignore[override]
    """``y = x W^T + b`` with packed INT4 weights; takes and returns [B, ..., channels] in the compute dtype."""

    stock = nn.Linear
    fixed = frozenset({"weight", "in_features", "out_features"})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.quantize(x)
        y = self.multiply(q, x.dtype)
        return pass_gradient(y, x, q, self) if wants_gradient(x) else y

    def input_gradient(
        self, gradient: torch.Tensor, q: torch.Tensor, shape: torch.Size, padding: tuple[int, int]
    ) -> torch.Tensor:
        """The gradient [B, ..., K] of the input for that of the output [B, ..., N] (see ``gradients``)."""
        return (gradient @ self.stock_weight_values().to(gradient.dtype)) * self.unclamped(q)


class QuantConv2d(QuantizedLayer, nn.Conv2d):  # type: ignore[override]
    """A 2-D convolution with packed INT4 weights; takes [B, K, H, W], returns channels_last [B, N, OH, OW].

    Changes of ``padding``, ``padding_mode``, ``stride``, ``dilation`` and ``_conv_forward`` are heeded.
    """

    stock = nn.Conv2d
    fixed = frozenset(
        {"weight", "in_channels", "out_channels", "kernel_size", "groups", "transposed", "output_padding"}
    )
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("stride", "padding", "dilation"):
            value = self._pair(name, value)
        super().__setattr__(name, value)

    def _pair(self, name: str, value: Any) -> tuple[int, int]:
        """A setting for height and width, as ``nn.Conv2d`` takes it.

        Raises:
            ValueError: if it is another value, or needs more padding on one side than on the other.
        """
        if value == "valid":
            return (0, 0)
        if value == "same":
            sizes = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            if not any(size % 2 for size in sizes):
                return (sizes[0] // 2, sizes[1] // 2)
        pair = (value, value) if isinstance(value, int) else value
        least = 0 if name == "padding" else 1
        if (
            not isinstance(pair, (tuple, list))
            or len(pair) != 2
            or not all(isinstance(size, int) and size >= least for size in pair)
        ):
            raise ValueError(f"{self.name}.{name} must be one or two numbers of at least {least}, got {value!r}")
        return (pair[0], pair[1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As ``nn.Conv2d.forward``."""
        padding = self.padding
        if not pads_with_zeros(self):
            if replaces_conv_forward(self):
                return self._conv_forward(x, self.stock_weight_values(), self.bias)
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), (0, 0)
        q = self.quantize(x.permute(0, 2, 3, 1), padding)
        y = self.convolve(q, x.dtype, with_statistics=False)[0]
        if wants_gradient(x):
            y = pass_gradient(y, x, q, self, padding)
        return y.permute(0, 3, 1, 2)

    def input_gradient(
        self, gradient: torch.Tensor, q: torch.Tensor, shape: torch.Size, padding: tuple[int, int]
    ) -> torch.Tensor:
        """The gradient [B, K, H, W] of the input for that of the output [B, OH, OW, N] (see ``gradients``)."""
        weight, gradient = self.stock_weight_values().to(gradient.dtype), gradient.permute(0, 3, 1, 2)
        (top, left), (height, width) = padding, shape[2:]
        inside = self.unclamped(q[:, top : top + height, left : left + width]).permute(0, 3, 1, 2)
        return conv2d_input(shape, weight, gradient, self.stride, padding, self.dilation) * inside


STOCK_CONV_FORWARD = nn.Conv2d._conv_forward


def replaces_conv_forward(conv: nn.Conv2d) -> bool:
    """True if a user set ``_conv_forward``, of this convolution or of all."""
    return "_conv_forward" in conv.__dict__ or nn.Conv2d._conv_forward is not STOCK_CONV_FORWARD


def pads_with_zeros(conv: nn.Conv2d) -> bool:
    """True if a convolution pads with zeros, as the kernels do; seamless tiling changes that."""
    return conv.padding_mode == "zeros" and not replaces_conv_forward(conv)


def constructor_arguments(layer: nn.Module) -> dict[str, Any]:
    """The arguments of ``nn.Linear`` or ``nn.Conv2d`` for a layer of the same shape."""
    names = ["in_features", "out_features"]
    if isinstance(layer, nn.Conv2d):
        names = ["in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "padding_mode"]
    return {**{name: getattr(layer, name) for name in names}, "bias": layer.bias is not None}


def is_quantized(unet: nn.Module) -> bool:
    """True if a UNet has quantized layers."""
    return bool(quantized_layers(unet))


def quantized_layers(unet: nn.Module) -> dict[str, QuantizedLayer]:
    """The quantized layers of a UNet, by name."""
    return {name: module for name, module in unet.named_modules() if isinstance(module, QuantizedLayer)}
