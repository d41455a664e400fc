"""The operators, registered with PyTorch's dispatcher: ``torch.ops.dq_kernels.*``. The one door to this package.

Each operator has a CPU implementation (``cpu``), a CUDA and HIP one (Triton) and a fake one (shapes alone, for
``torch.compile`` and ``torch.export``). The functions below check their arguments, by name, and then call it.

Symbols: B samples, K input channels (K' = K padded to even), N output channels, T timestep groups. All tables are fp32
or int32, whatever the dtype of the activations. ``timestep_index`` [B] int32 selects a row of the tables for each
sample, on the device; out-of-range values are clamped.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dq_kernels import conv2d, cpu, linear
from dq_kernels import quantize as triton_quantize
from dq_kernels.conv2d import conv2d_output_size
from dq_kernels.cpu import prepacked_bytes
from dq_kernels.packing import INT4_MAX, INT4_MIN, pack_int4, unpack_int4

__all__ = [
    "COMPUTE_DTYPES",
    "INT4_MAX",
    "INT4_MIN",
    "int4_conv2d",
    "int4_linear",
    "pack_int4",
    "prepacked_bytes",
    "quantize",
    "unpack_int4",
]

COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

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


def _check(
    op: str,
    name: str,
    tensor: Tensor,
    dtypes: tuple[torch.dtype, ...],
    shape: Sequence[int | str],
    any_strides: bool = False,
) -> None:
    """Raises unless the tensor is contiguous and has one of the dtypes and the shape, where a letter is any size.

    The message is put together only when it is needed: formatting sizes makes torch.compile specialize on them.
    """
    if (
        tensor.dtype not in dtypes
        or tensor.ndim != len(shape)
        or any(not isinstance(size, str) and size != tensor.shape[i] for i, size in enumerate(shape))
        or not (any_strides or tensor.is_contiguous())
    ):
        raise ValueError(
            f"{op}: {name} must be {'' if any_strides else 'contiguous '}{' or '.join(str(dtype) for dtype in dtypes)} "
            f"[{', '.join(str(size) for size in shape)}], "
            f"got {tensor.dtype} {list(tensor.shape)} with strides {list(tensor.stride())}"
        )


def _check_tables(op: str, batch: int, act_scale: Tensor, act_zero_point: Tensor, timestep_index: Tensor) -> None:
    _check(op, "act_scale", act_scale, (torch.float32,), ("T",))
    _check(op, "act_zero_point", act_zero_point, (torch.int32,), act_scale.shape)
    _check(op, "timestep_index", timestep_index, (torch.int32,), (batch,))


def _check_operands(
    op: str,
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor,
    bias: Tensor | None,
    x_shape: Sequence[int | str],
    weight_shape: Sequence[int | str],
    out_dtype: torch.dtype,
) -> None:
    _check(op, "x", x, (torch.int8,), x_shape)
    _check(op, "weight", weight, (torch.uint8,), weight_shape)
    if x.shape[-1] != 2 * weight.shape[-1]:
        raise ValueError(
            f"{op}: the packed weight {list(weight.shape)} takes {2 * weight.shape[-1]} input channels, "
            f"x {list(x.shape)} has {x.shape[-1]}"
        )
    _check(op, "weight_scale", weight_scale, (torch.float32,), weight.shape[:1])
    _check(op, "weight_sum", weight_sum, (torch.int32,), weight.shape[:1])
    if bias is not None:
        _check(op, "bias", bias, COMPUTE_DTYPES, weight.shape[:1])
    if out_dtype not in COMPUTE_DTYPES:
        raise ValueError(f"{op}: out_dtype must be float16, bfloat16 or float32, got {out_dtype}")


def _check_size(op: str, x: Tensor, rows: int, out_channels: int) -> None:
    """The kernels count elements in int32."""
    if x.numel() >= 2**31 or rows * out_channels >= 2**31:
        raise ValueError(
            f"{op}: x {list(x.shape)} or the result [{rows}, {out_channels}] has 2^31 elements or more; split the batch"
        )


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
    if x.dtype not in COMPUTE_DTYPES or x.ndim < 2:
        raise ValueError(f"quantize: x must be float16, bfloat16 or float32 [B, ..., K], got {x.dtype} {list(x.shape)}")
    _check("quantize", "weight_dilation", weight_dilation, (torch.float32,), x.shape[-1:])
    if bits < 2 or bits > 8:
        raise ValueError(f"quantize: bits must be 2 to 8, got {bits}")
    if x.numel() >= 2**31 * x.shape[0]:
        raise ValueError(f"quantize: a sample of x {list(x.shape)} has 2^31 elements or more")
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
    if x.ndim < 2:
        raise ValueError(f"int4_linear: x must be [B, ..., K'], got {list(x.shape)}")
    _check_operands(
        "int4_linear", x, weight, weight_scale, weight_sum, bias, (*x.shape[:-1], "K'"), ("N", "K'/2"), out_dtype
    )
    _check_tables("int4_linear", x.shape[0], act_scale, act_zero_point, timestep_index)
    _check_size("int4_linear", x, x.numel() // x.shape[-1], weight.shape[0])
    if residual is not None:
        _check("int4_linear", "residual", residual, COMPUTE_DTYPES, (*x.shape[:-1], weight.shape[0]), any_strides=True)
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
    x_shape, weight_shape = ("B", "H", "W", "K'"), ("N", "KH", "KW", "K'/2")
    _check_operands("int4_conv2d", x, weight, weight_scale, weight_sum, bias, x_shape, weight_shape, out_dtype)
    _check_tables("int4_conv2d", x.shape[0], act_scale, act_zero_point, timestep_index)
    if min(*stride, *dilation) < 1 or min(padding) < 0:
        raise ValueError(
            "int4_conv2d: stride and dilation must be at least 1 and padding at least 0, "
            f"got {stride}, {dilation} and {padding}"
        )
    size = conv2d_output_size(x.shape[1:3], weight.shape[1:3], stride, padding, dilation)
    if size[0] < 1 or size[1] < 1:
        raise ValueError(
            f"int4_conv2d: an image of {list(x.shape[1:3])} padded by {list(padding)} is smaller than the kernel "
            f"{list(weight.shape[1:3])} with dilation {list(dilation)}"
        )
    out_shape = (x.shape[0], *size, weight.shape[0])
    _check_size("int4_conv2d", x, x.shape[0] * size[0] * size[1], weight.shape[0])
    if channel_add is not None:
        _check(
            "int4_conv2d", "channel_add", channel_add, COMPUTE_DTYPES, (out_shape[0], out_shape[3]), any_strides=True
        )
        channel_add = channel_add.contiguous()
    if residual is not None:
        _check("int4_conv2d", "residual", residual, COMPUTE_DTYPES, out_shape, any_strides=True)
        residual = residual.contiguous()
    return torch.ops.dq_kernels.int4_conv2d.default(
        x, weight, weight_scale, weight_sum, act_scale, act_zero_point, timestep_index, bias, channel_add, residual,
        stride, padding, dilation, out_dtype,
    )  # fmt: skip
