"""Quantized layers: drop-ins for ``nn.Linear`` and ``nn.Conv2d`` that hold packed INT4 weights and small tables.

A layer is born empty, on the meta device; ``load_state_dict(tensors, assign=True)`` or diffusers' loader fills it. Its
forward quantizes the input with the current timestep's scale, multiplies integers, and returns the input's dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dq_kernels import ops
from dq_runtime.tables import TableModule
from dq_runtime.timesteps import TimestepGrid


class _NoGradient(torch.autograd.Function):
    """y as it is, whose gradient towards x is an error: without it x would seem not to matter."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, x: torch.Tensor, name: str) -> torch.Tensor:
        ctx.name = name
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise RuntimeError(
            f"{ctx.name}: no gradient passes a quantized layer. Call unet.dequantize() to train, or to guide sampling "
            "by gradients"
        )


def wants_gradient(x: torch.Tensor) -> bool:
    """Whether what is computed from x will be asked for its gradient."""
    return x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()


class QuantizedLayer(TableModule):
    """What ``QuantLinear`` and ``QuantConv2d`` have in common.

    Tensors (N output channels, K input channels, T timesteps):
        weight: uint8, packed: [N, K'/2] or [N, KH, KW, K'/2], K' = K padded to even.
        weight_scale, weight_sum: [N] fp32; [N] int32, the sum of a channel's 4-bit values (also its check sum).
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

    def _init_quantized(
        self, name: str, packed_shape: tuple[int, ...], channels: int, activation_bits: int, timestep_grid: TimestepGrid
    ) -> None:
        self.name = name
        self.activation_bits = activation_bits
        # One grid serves all layers and belongs to the UNet; as a submodule it would be saved once a layer.
        object.__setattr__(self, "timestep_grid", timestep_grid)
        self.weight = nn.Parameter(torch.empty(packed_shape, dtype=torch.uint8, device="meta"), requires_grad=False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        per_output, per_timestep = (packed_shape[0],), (timestep_grid.num_timesteps,)
        for table, shape, dtype in (
            ("weight_scale", per_output, torch.float32),
            ("weight_sum", per_output, torch.int32),
            ("weight_dilation", (channels,), torch.float32),
            ("act_scale", per_timestep, torch.float32),
            ("act_zero_point", per_timestep, torch.int32),
        ):
            self.register_buffer(table, torch.empty(shape, dtype=dtype, device="meta"))

    def timestep_index(self, batch: int, channels: int, dtype: torch.dtype) -> torch.Tensor:
        """The current timestep's row of the tables for each sample, [batch] int32.

        Raises:
            ValueError: if an input of so many samples and channels, or of that dtype, cannot be this layer's.
            RuntimeError: if no timestep is known.
        """
        if channels != self.weight_dilation.shape[0]:
            raise ValueError(
                f"{self.name}: expected an input of {self.weight_dilation.shape[0]} channels, got {channels}"
            )
        if dtype not in ops.COMPUTE_DTYPES:
            raise ValueError(f"{self.name}: expected float16, bfloat16 or float32, got {dtype}; cast the UNet to one")
        return self.index_of_batch(batch)

    def index_of_batch(self, batch: int) -> torch.Tensor:
        """``timestep_index`` for an input that was checked before."""
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

    def quantize(
        self, x: torch.Tensor, padding: tuple[int, int] = (0, 0), skip: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x [B, ..., K] -> (int8 [B, ..., K'], an image with its borders; timestep index [B]).

        ``skip`` are the channels that a concat would put behind x's.
        """
        channels = x.shape[-1] + (0 if skip is None else skip.shape[-1])
        index = self.timestep_index(x.shape[0], channels, x.dtype).to(x.device)
        tables = self.act_scale, self.act_zero_point, index
        return ops.quantize(x, self.weight_dilation, *tables, self.activation_bits, padding, skip), index

    def check_tensors(self) -> None:
        """Raises ValueError, naming the layer, if a tensor holds values that no calibration writes."""
        remedy = "The checkpoint is corrupt: download or save it again"
        for name, table in self.named_buffers(recurse=False):
            if table.is_floating_point() and not bool((table.isfinite() & (table > 0)).all()):
                raise ValueError(f"{self.name}.{name} must be finite and positive. {remedy}")
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
    """``y = x W^T + b`` with packed INT4 weights; takes and returns [B, ..., channels] in the compute dtype.

    Made by ``like``.
    """

    @classmethod
    def like(cls, linear: nn.Linear, name: str, activation_bits: int, timestep_grid: TimestepGrid) -> QuantLinear:
        """An empty quantized layer of a linear layer's shape."""
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, "meta", linear.weight.dtype)
        packed_shape = (linear.out_features, (linear.in_features + 1) // 2)
        layer._init_quantized(name, packed_shape, linear.in_features, activation_bits, timestep_grid)
        return layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, index = self.quantize(x)
        y = ops.int4_linear(
            q, self.weight, self.weight_scale, self.weight_sum, self.act_scale, self.act_zero_point, index, self.bias,
            out_dtype=x.dtype,
        )  # fmt: skip
        return _NoGradient.apply(y, x, self.name) if wants_gradient(x) else y


def conv2d_arguments(conv: nn.Conv2d) -> dict[str, Any]:
    """The arguments with which ``nn.Conv2d`` makes a convolution of the same shape."""
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
    return {**{name: getattr(conv, name) for name in names}, "bias": conv.bias is not None}


class QuantConv2d(QuantizedLayer, nn.Conv2d):
    """A 2-D convolution with packed INT4 weights; takes [B, K, H, W], returns channels_last [B, N, OH, OW].

    Made by ``like``. Called as ``nn.Conv2d`` is, the class makes an ``nn.Conv2d``: so PEFT, which builds a LoRA's own
    convolutions with ``type(base_layer)(...)``, gets floating-point ones.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return nn.Conv2d(*args, **kwargs) if args or kwargs else super().__new__(cls)

    @classmethod
    def like(cls, conv: nn.Conv2d, name: str, activation_bits: int, timestep_grid: TimestepGrid) -> QuantConv2d:
        """An empty quantized layer of a convolution's shape (groups = 1)."""
        layer = cls.__new__(cls)
        nn.Conv2d.__init__(layer, **conv2d_arguments(conv), device="meta", dtype=conv.weight.dtype)
        packed_shape = (conv.out_channels, *conv.kernel_size, (conv.in_channels + 1) // 2)
        layer._init_quantized(name, packed_shape, conv.in_channels, activation_bits, timestep_grid)
        return layer

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, index = self.quantize(x.permute(0, 2, 3, 1), self.padding)
        y, _ = ops.int4_conv2d(
            q, self.weight, self.weight_scale, self.weight_sum, self.act_scale, self.act_zero_point, index, self.bias,
            stride=self.stride, dilation=self.dilation, out_dtype=x.dtype,
        )  # fmt: skip
        y = y.permute(0, 3, 1, 2)
        return _NoGradient.apply(y, x, self.name) if wants_gradient(x) else y


def is_quantized(unet: nn.Module) -> bool:
    """Whether a UNet holds quantized layers."""
    return bool(quantized_layers(unet))


def quantized_layers(unet: nn.Module) -> dict[str, QuantizedLayer]:
    """The quantized layers of a UNet, by name."""
    return {name: module for name, module in unet.named_modules() if isinstance(module, QuantizedLayer)}
