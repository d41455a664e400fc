"""The operators, registered with PyTorch's dispatcher: ``torch.ops.dq_kernels.*``. The one door to this package.

Each operator has a CPU implementation (``cpu``), a CUDA and HIP one (Triton) and a fake one (shapes alone, for
``torch.compile`` and ``torch.export``). The functions below check their arguments, by name, and then call it.

Symbols: B samples, K input channels (K' = K padded to even), N output channels, T timestep groups. All tables are fp32
or int32, whatever the dtype of the activations. ``timestep_index`` [B] int32 selects a row of the tables for each
sample, on the device; out-of-range values are clamped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dq_kernels import conv2d, cpu, linear
from dq_kernels import quantize as triton_quantize
from dq_kernels.conv2d import conv2d_output_size
from dq_kernels.cpu import prepacked_bytes
from dq_kernels.packing import INT4_MAX, INT4_MIN, pack_int4, unpack_int4

__all__ = [
    "INT4_MAX",
    "INT4_MIN",
    "int4_conv2d",
    "int4_linear",
    "pack_int4",
    "prepacked_bytes",
    "quantize",
    "unpack_int4",
]

_library = torch.library.Library("dq_kernels", "DEF")
_TABLES = "Tensor act_scale, Tensor act_zero_point, Tensor timestep_index"
_WEIGHT = "Tensor weight, Tensor weight_scale, Tensor weight_sum"
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)

_library.define(f"quantize(Tensor x, Tensor weight_dilation, {_TABLES}, int bits) -> Tensor", tags=_TAGS)
_library.define(
    f"int4_linear(Tensor x, {_WEIGHT}, {_TABLES}, Tensor? bias, Tensor? residual, ScalarType out_dtype) -> Tensor",
    tags=_TAGS,
)
_library.define(
    f"int4_conv2d(Tensor x, {_WEIGHT}, {_TABLES}, Tensor? bias, Tensor? channel_add, Tensor? residual, "
    "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, ScalarType out_dtype) -> Tensor",
    tags=_TAGS,
)
_library.impl("quantize", cpu.quantize, "CPU")
_library.impl("quantize", triton_quantize.quantize, "CUDA")
_library.impl("int4_linear", cpu.int4_linear, "CPU")
_library.impl("int4_linear", linear.int4_linear, "CUDA")
_library.impl("int4_conv2d", cpu.int4_conv2d, "CPU")
_library.impl("int4_conv2d", conv2d.int4_conv2d, "CUDA")


@torch.library.register_fake("dq_kernels::quantize")
def _(
    x: Tensor, weight_dilation: Tensor, act_scale: Tensor, act_zero_point: Tensor, timestep_index: Tensor, bits: int
) -> Tensor:
    channels = x.shape[-1]
    return x.new_empty(*x.shape[:-1], channels + channels % 2, dtype=torch.int8)


@torch.library.register_fake("dq_kernels::int4_linear")
def _(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor,
    act_scale: Tensor,
    act_zero_point: Tensor,
    timestep_index: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0], dtype=out_dtype)


@torch.library.register_fake("dq_kernels::int4_conv2d")
def _(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor,
    act_scale: Tensor,
    act_zero_point: Tensor,
    timestep_index: Tensor,
    bias: Tensor | None,
    channel_add: Tensor | None,
    residual: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    out_dtype: torch.dtype,
) -> Tensor:
    size = conv2d_output_size(x.shape[1:3], weight.shape[1:3], stride, padding, dilation)
    return x.new_empty(x.shape[0], *size, weight.shape[0], dtype=out_dtype)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_tables(op: str, batch: int, act_scale: Tensor, act_zero_point: Tensor, timestep_index: Tensor) -> None:
    _require(
        act_scale.dtype == torch.float32 and act_zero_point.dtype == torch.int32,
        f"{op}: act_scale must be float32 and act_zero_point int32, got {act_scale.dtype} and {act_zero_point.dtype}",
    )
    _require(
        timestep_index.dtype == torch.int32 and timestep_index.shape == (batch,),
        f"{op}: timestep_index must be int32 [{batch}], one entry per sample, "
        f"got {timestep_index.dtype} {list(timestep_index.shape)}",
    )


def _check_operands(op: str, x: Tensor, weight: Tensor, weight_scale: Tensor, out_dtype: torch.dtype) -> None:
    _require(
        x.dtype == torch.int8 and weight.dtype == torch.uint8,
        f"{op}: x must be int8 (from quantize) and weight uint8 (from pack_int4), got {x.dtype} and {weight.dtype}",
    )
    _require(
        x.shape[-1] == 2 * weight.shape[-1],
        f"{op}: the packed weight {list(weight.shape)} takes {2 * weight.shape[-1]} input channels, "
        f"x {list(x.shape)} has {x.shape[-1]}",
    )
    _require(x.is_contiguous() and weight.is_contiguous(), f"{op}: x and weight must be contiguous")
    _require(weight_scale.dtype == torch.float32, f"{op}: weight_scale must be float32, got {weight_scale.dtype}")
    _require(
        out_dtype in (torch.float16, torch.bfloat16, torch.float32),
        f"{op}: out_dtype must be float16, bfloat16 or float32, got {out_dtype}",
    )
    _require(x.numel() < 2**31, f"{op}: x {list(x.shape)} has 2^31 elements or more; split the batch")


def quantize(
    x: Tensor,
    weight_dilation: Tensor,
    act_scale: Tensor,
    act_zero_point: Tensor,
    timestep_index: Tensor,
    bits: int,
) -> Tensor:
    """Quantizes activations: clamp(floor(x (1 / s_k) (1 / act_scale_t) + 0.5) + zp_t) to ``bits`` bits.

    Args:
        x: [B, ..., K] float16, bfloat16 or float32, any strides.
        weight_dilation: s, [K] fp32.
        act_scale, act_zero_point: [T] fp32, [T] int32.
        timestep_index: [B] int32.
        bits: 2 to 8.

    Returns:
        [B, ..., K'] int8, contiguous.

    Raises:
        ValueError: on any other dtype, shape or number of bits.
    """
    _require(x.is_floating_point(), f"quantize: x must be a floating-point tensor, got {x.dtype}")
    _require(
        weight_dilation.shape == (x.shape[-1],),
        f"quantize: x has {x.shape[-1]} channels, weight_dilation {list(weight_dilation.shape)}",
    )
    _require(2 <= bits <= 8, f"quantize: bits must be 2 to 8, got {bits}")
    _check_tables("quantize", x.shape[0], act_scale, act_zero_point, timestep_index)
    return torch.ops.dq_kernels.quantize.default(x, weight_dilation, act_scale, act_zero_point, timestep_index, bits)


def int4_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor,
    act_scale: Tensor,
    act_zero_point: Tensor,
    timestep_index: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """y = act_scale_t weight_scale_n (sum_k q_x q_w - zp_t sum_k q_w) + bias_n + residual, summed in int32.

    Args:
        x: [B, ..., K'] int8, contiguous, from ``quantize``.
        weight: [N, K'/2] uint8, from ``packing.pack_int4``.
        weight_scale, weight_sum: [N] fp32; [N] int32, the sum of each row's values.
        act_scale, act_zero_point: [T] fp32, [T] int32.
        timestep_index: [B] int32.
        bias: [N] float, optional.
        residual: [B, ..., N] float, optional.
        out_dtype: float16, bfloat16 or float32.

    Returns:
        [B, ..., N] ``out_dtype``, contiguous.

    Raises:
        ValueError: on any other dtype, shape or layout.
    """
    _check_operands("int4_linear", x, weight, weight_scale, out_dtype)
    _check_tables("int4_linear", x.shape[0], act_scale, act_zero_point, timestep_index)
    if residual is not None:
        out_shape = (*x.shape[:-1], weight.shape[0])
        _require(
            residual.shape == out_shape,
            f"int4_linear: residual must be {list(out_shape)}, got {list(residual.shape)}",
        )
        residual = residual.contiguous()
    return torch.ops.dq_kernels.int4_linear.default(
        x, weight, weight_scale, weight_sum, act_scale, act_zero_point, timestep_index, bias, residual, out_dtype
    )


def int4_conv2d(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor,
    act_scale: Tensor,
    act_zero_point: Tensor,
    timestep_index: Tensor,
    bias: Tensor | None = None,
    channel_add: Tensor | None = None,
    residual: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """A 2-D convolution over NHWC, groups = 1, padded with each sample's zero point (the quantized zero).

    Args:
        x: [B, H, W, K'] int8, contiguous, from ``quantize``.
        weight: [N, KH, KW, K'/2] uint8, from ``packing.pack_int4``.
        weight_scale, weight_sum: [N] fp32; [N] int32, the sum of each output channel's values.
        act_scale, act_zero_point: [T] fp32, [T] int32.
        timestep_index: [B] int32.
        bias: [N] float, optional.
        channel_add: [B, N] float, optional: added to every pixel (the time embedding).
        residual: [B, OH, OW, N] float, optional.
        stride, padding, dilation: (vertical, horizontal), as in ``torch.nn.Conv2d``.
        out_dtype: float16, bfloat16 or float32.

    Returns:
        [B, OH, OW, N] ``out_dtype``, contiguous.

    Raises:
        ValueError: on any other dtype, shape or layout.
    """
    _check_operands("int4_conv2d", x, weight, weight_scale, out_dtype)
    _check_tables("int4_conv2d", x.shape[0], act_scale, act_zero_point, timestep_index)
    size = conv2d_output_size(x.shape[1:3], weight.shape[1:3], stride, padding, dilation)
    _require(
        size[0] > 0 and size[1] > 0,
        f"int4_conv2d: an image of {list(x.shape[1:3])} is smaller than the kernel {list(weight.shape[1:3])}",
    )
    out_shape = (x.shape[0], *size, weight.shape[0])
    if channel_add is not None:
        _require(
            channel_add.shape == (out_shape[0], out_shape[3]),
            f"int4_conv2d: channel_add must be {[out_shape[0], out_shape[3]]}, got {list(channel_add.shape)}",
        )
        channel_add = channel_add.contiguous()
    if residual is not None:
        _require(
            residual.shape == out_shape,
            f"int4_conv2d: residual must be {list(out_shape)}, got {list(residual.shape)}",
        )
        residual = residual.contiguous()
    return torch.ops.dq_kernels.int4_conv2d.default(
        x, weight, weight_scale, weight_sum, act_scale, act_zero_point, timestep_index, bias, channel_add, residual,
        stride, padding, dilation, out_dtype,
    )  # fmt: skip
