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

from dq_kernels import attention, conv2d, cpu, linear, norm
from dq_kernels import quantize as triton_quantize
from dq_kernels.attention import MAX_HEAD_CHANNELS
from dq_kernels.checks import (
    COMPUTE_DTYPES,
    check_bits,
    check_floats,
    check_operands,
    check_padding,
    check_parameters,
    check_quantizer,
    check_size,
    check_tables,
    check_tensor,
)
from dq_kernels.conv2d import conv2d_output_size, statistics_shape
from dq_kernels.cpu import prepacked_bytes
from dq_kernels.gemm import STATISTICS_ROWS
from dq_kernels.packing import INT4_MAX, INT4_MIN, pack_int4, unpack_int4
from dq_kernels.quantize import quantized_shape

__all__ = [
    "COMPUTE_DTYPES",
    "INT4_MAX",
    "INT4_MIN",
    "MAX_HEAD_CHANNELS",
    "MAX_LAYER_NORM_CHANNELS",
    "STATISTICS_ROWS",
    "group_norm_quantize",
    "int4_conv2d",
    "int4_linear",
    "int4_linear_quantize",
    "int8_attention",
    "int8_attention_quantize",
    "layer_norm_quantize",
    "pack_int4",
    "prepacked_bytes",
    "quantize",
    "unpack_int4",
]

ACTIVATIONS = ("none", "gelu", "geglu")
MAX_LAYER_NORM_CHANNELS = 8192  # one program holds a row

_library = torch.library.Library("dq_kernels", "DEF")
_TABLES = "Tensor act_scale, Tensor act_zero_point, Tensor timestep_index"
_WEIGHT = "Tensor weight, Tensor weight_scale, Tensor weight_sum"
_QUANTIZER = f"Tensor weight_dilation, {_TABLES}, int bits"
_ATTENTION = "Tensor query, Tensor key, Tensor value, int heads"
_SCHEMAS = {
    "quantize": f"(Tensor x, {_QUANTIZER}, SymInt[2] padding, Tensor? skip) -> Tensor",
    "layer_norm_quantize": f"(Tensor x, Tensor? weight, Tensor? bias, float eps, {_QUANTIZER}) -> Tensor",
    "group_norm_quantize": "(Tensor x, Tensor? skip, Tensor? statistics, Tensor? skip_statistics, int num_groups, "
    f"Tensor weight, Tensor bias, float eps, bool silu, {_QUANTIZER}, SymInt[2] padding) -> Tensor",
    "int4_linear": f"(Tensor x, {_WEIGHT}, {_TABLES}, Tensor? bias, Tensor? residual, ScalarType out_dtype) -> Tensor",
    "int4_linear_quantize": f"(Tensor x, {_WEIGHT}, {_TABLES}, Tensor? bias, str activation, "
    "Tensor next_dilation, Tensor next_scale, Tensor next_zero_point, int next_bits) -> Tensor",
    "int4_conv2d": f"(Tensor x, {_WEIGHT}, {_TABLES}, Tensor? bias, Tensor? channel_add, Tensor? residual, "
    "Tensor? skip, Tensor? skip_weight, Tensor? skip_weight_sum, Tensor? skip_act_scale, "
    "Tensor? skip_act_zero_point, SymInt[2] stride, SymInt[2] dilation, bool upsample, ScalarType out_dtype, "
    "bool with_statistics) -> (Tensor, Tensor)",
    "int8_attention": f"({_ATTENTION}) -> Tensor",
    "int8_attention_quantize": f"({_ATTENTION}, {_QUANTIZER}) -> Tensor",
}
for _module, _names in {
    triton_quantize: ("quantize",),
    norm: ("layer_norm_quantize", "group_norm_quantize"),
    linear: ("int4_linear", "int4_linear_quantize"),
    conv2d: ("int4_conv2d",),
    attention: ("int8_attention", "int8_attention_quantize"),
}.items():
    for _name in _names:
        _library.define(_name + _SCHEMAS[_name], tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
        _library.impl(_name, getattr(cpu, _name), "CPU")
        _library.impl(_name, getattr(_module, _name), "CUDA")


def _alike(op: str, x: Tensor, *others: Tensor) -> None:
    """One tensor without values is enough for torch to ask for a result without values, which x's device has not."""
    for tensor in others:
        if x.is_meta != tensor.is_meta:
            raise ValueError(
                f"{op}: one argument is on {x.device}, another on {tensor.device}: offloaded weights have to be loaded "
                "first"
            )


@torch.library.register_fake("dq_kernels::quantize")
def _(x, weight_dilation, act_scale, act_zero_point, timestep_index, bits, padding, skip):  # type: ignore[no-untyped-def]
    _alike("quantize", x, act_scale)
    return x.new_empty(quantized_shape((*x.shape[:-1], weight_dilation.shape[0]), padding), dtype=torch.int8)


@torch.library.register_fake("dq_kernels::layer_norm_quantize")
def _(x, weight, bias, eps, weight_dilation, act_scale, act_zero_point, timestep_index, bits):  # type: ignore[no-untyped-def]
    _alike("layer_norm_quantize", x, act_scale)
    return x.new_empty(x.shape, dtype=torch.int8)


@torch.library.register_fake("dq_kernels::group_norm_quantize")
def _(x, skip, statistics, skip_statistics, num_groups, weight, bias, eps, silu, *quantizer):  # type: ignore[no-untyped-def]
    _alike("group_norm_quantize", x, quantizer[0])
    channels = x.shape[-1] + (0 if skip is None else skip.shape[-1])
    return x.new_empty(quantized_shape((*x.shape[:-1], channels), quantizer[-1]), dtype=torch.int8)


@torch.library.register_fake("dq_kernels::int4_linear")
def _(x, weight, weight_scale, weight_sum, act_scale, act_zero_point, timestep_index, bias, residual, out_dtype):  # type: ignore[no-untyped-def]
    _alike("int4_linear", x, weight)
    return x.new_empty(*x.shape[:-1], weight.shape[0], dtype=out_dtype)


@torch.library.register_fake("dq_kernels::int4_linear_quantize")
def _(x, weight, weight_scale, weight_sum, act_scale, act_zero_point, timestep_index, bias, activation, *quantizer):  # type: ignore[no-untyped-def]
    _alike("int4_linear_quantize", x, weight)
    return x.new_empty(*x.shape[:-1], quantizer[0].shape[0], dtype=torch.int8)


@torch.library.register_fake("dq_kernels::int4_conv2d")
def _(x, weight, *arguments):  # type: ignore[no-untyped-def]
    _alike("int4_conv2d", x, weight)
    stride, dilation, upsample, out_dtype, with_statistics = arguments[-5:]
    size = conv2d_output_size(x.shape[1:3], weight.shape[1:3], stride, dilation, upsample)
    statistics = statistics_shape(x.shape[0], size, weight.shape[0], with_statistics)
    return (
        x.new_empty(x.shape[0], *size, weight.shape[0], dtype=out_dtype),
        x.new_empty(statistics, dtype=torch.float32),
    )


@torch.library.register_fake("dq_kernels::int8_attention")
def _(query, key, value, heads):  # type: ignore[no-untyped-def]
    _alike("int8_attention", query, key, value)
    return query.new_empty(query.shape)


@torch.library.register_fake("dq_kernels::int8_attention_quantize")
def _(query, key, value, heads, weight_dilation, act_scale, act_zero_point, timestep_index, bits):  # type: ignore[no-untyped-def]
    _alike("int8_attention_quantize", query, key, value, act_scale)
    return query.new_empty(query.shape, dtype=torch.int8)


def quantize(
    x: Tensor,
    weight_dilation: Tensor,
    act_scale: Tensor,
    act_zero_point: Tensor,
    timestep_index: Tensor,
    bits: int,
    padding: tuple[int, int] = (0, 0),
    skip: Tensor | None = None,
) -> Tensor:
    """Quantizes activations: clamp(floor(x (1 / s_k) (1 / act_scale_t) + 0.5) + zp_t) to ``bits`` bits.

    Args:
        x: [B, ..., K] float16, bfloat16 or float32, any strides.
        weight_dilation: s, [K] fp32, or [K + K2] with a skip.
        act_scale, act_zero_point: [T] fp32, [T] int32.
        timestep_index: [B] int32.
        bits: 2 to 8.
        padding: (vertical, horizontal): rows and columns of the zero point around images x [B, H, W, K].
        skip: [B, ..., K2] float, optional: the channels that a concat would put behind x's, K even.

    Returns:
        [B, ..., K'] int8, contiguous; [B, H + 2 vertical, W + 2 horizontal, K'] with padding.

    Raises:
        ValueError: on any other dtype, shape or number of bits.
    """
    op = "quantize"
    check_floats(op, "x", x, ("B", "...", "K"))
    channels = x.shape[-1]
    if skip is not None:
        check_floats(op, "skip", skip, (*x.shape[:-1], "K2"))
        if channels % 2:
            raise ValueError(f"{op}: x must have an even number of channels before a skip, got {channels}")
        channels += skip.shape[-1]
    check_quantizer(op, x.shape[0], channels, weight_dilation, act_scale, act_zero_point, timestep_index, bits)
    check_padding(op, x, padding)
    return torch.ops.dq_kernels.quantize.default(
        x, weight_dilation, act_scale, act_zero_point, timestep_index, bits, padding, skip
    )


def layer_norm_quantize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_dilation: Tensor,
    act_scale: Tensor,
    act_zero_point: Tensor,
    timestep_index: Tensor,
    bits: int,
) -> Tensor:
    """Layer norm over the channels (torch.nn.LayerNorm) and ``quantize``, in one pass.

    Args:
        x: [B, ..., K] float16, bfloat16 or float32, K even.
        weight, bias: [K] float, optional.
        eps: added to the variance.
        weight_dilation, act_scale, act_zero_point, timestep_index, bits: as for ``quantize``.

    Returns:
        [B, ..., K] int8, contiguous.

    Raises:
        ValueError: on any other dtype or shape.
    """
    check_floats("layer_norm_quantize", "x", x, ("B", "...", "K"))
    channels = x.shape[-1]
    if channels % 2 or channels > MAX_LAYER_NORM_CHANNELS:
        raise ValueError(
            f"layer_norm_quantize: the channels must be even and at most {MAX_LAYER_NORM_CHANNELS}, got {channels}; "
            "use torch.nn.functional.layer_norm and quantize instead"
        )
    check_parameters("layer_norm_quantize", channels, {"weight": weight, "bias": bias})
    check_quantizer(
        "layer_norm_quantize", x.shape[0], channels, weight_dilation, act_scale, act_zero_point, timestep_index, bits
    )
    return torch.ops.dq_kernels.layer_norm_quantize.default(
        x.contiguous(), weight, bias, eps, weight_dilation, act_scale, act_zero_point, timestep_index, bits
    )


def group_norm_quantize(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    weight_dilation: Tensor,
    act_scale: Tensor,
    act_zero_point: Tensor,
    timestep_index: Tensor,
    bits: int,
    silu: bool = True,
    skip: Tensor | None = None,
    statistics: Tensor | None = None,
    skip_statistics: Tensor | None = None,
    padding: tuple[int, int] = (0, 0),
) -> Tensor:
    """Group norm (torch.nn.GroupNorm), SiLU if wanted, and ``quantize`` to a padded image, without the concat of skips.

    Args:
        x: [B, H, W, K] float16, bfloat16 or float32, any strides.
        num_groups: divides the channels K + K2, whose number is even.
        weight, bias: [K + K2] float.
        eps: added to the variance.
        weight_dilation: [K + K2] fp32; a source has a range of its own through its share of this vector.
        act_scale, act_zero_point, timestep_index, bits, padding: as for ``quantize``.
        silu: whether x sigmoid(x) follows the norm.
        skip: [B, H, W, K2] float, optional: the channels that a concat would put behind x's.
        statistics, skip_statistics: of x and of skip, from ``int4_conv2d``; computed where they are not given.

    Returns:
        [B, H + 2 vertical, W + 2 horizontal, K + K2] int8, contiguous.

    Raises:
        ValueError: on any other dtype or shape.
    """
    op = "group_norm_quantize"
    check_floats(op, "x", x, ("B", "H", "W", "K"))
    channels = x.shape[3]
    sources = [(x, "statistics", statistics)]
    if skip is not None:
        check_floats(op, "skip", skip, (*x.shape[:3], "K2"))
        channels += skip.shape[3]
        sources.append((skip, "skip_statistics", skip_statistics))
    elif skip_statistics is not None:
        raise ValueError(f"{op}: skip_statistics came without a skip")
    for source, name, given in sources:
        if given is not None:
            if source.shape[1] * source.shape[2] % STATISTICS_ROWS:
                raise ValueError(f"{op}: {name} are given for whole runs of {STATISTICS_ROWS} pixels alone")
            shape = statistics_shape(source.shape[0], source.shape[1:3], source.shape[3], True)
            check_tensor(op, name, given, (torch.float32,), shape)
    if num_groups < 1 or channels % num_groups or channels % 2:
        raise ValueError(f"{op}: the {channels} channels must be even and divide into {num_groups} groups")
    check_parameters(op, channels, {"weight": weight, "bias": bias})
    check_quantizer(op, x.shape[0], channels, weight_dilation, act_scale, act_zero_point, timestep_index, bits)
    check_padding(op, x, padding)
    return torch.ops.dq_kernels.group_norm_quantize.default(
        x, skip, statistics, skip_statistics, num_groups, weight, bias, eps, silu, weight_dilation, act_scale,
        act_zero_point, timestep_index, bits, padding,
    )  # fmt: skip


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
    check_operands(
        "int4_linear", x, weight, weight_scale, weight_sum, bias, (*x.shape[:-1], "K'"), ("N", "K'/2"), out_dtype
    )
    check_tables("int4_linear", x.shape[0], act_scale, act_zero_point, timestep_index)
    check_size("int4_linear", x, x.numel() // x.shape[-1], weight.shape[0])
    if residual is not None:
        check_tensor(
            "int4_linear", "residual", residual, COMPUTE_DTYPES, (*x.shape[:-1], weight.shape[0]), any_strides=True
        )
        residual = residual.contiguous()
    return torch.ops.dq_kernels.int4_linear.default(
        x, weight, weight_scale, weight_sum, act_scale, act_zero_point, timestep_index, bias, residual, out_dtype
    )


def int4_linear_quantize(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor,
    act_scale: Tensor,
    act_zero_point: Tensor,
    timestep_index: Tensor,
    next_dilation: Tensor,
    next_scale: Tensor,
    next_zero_point: Tensor,
    next_bits: int,
    bias: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """A linear layer, its activation and the quantization of the next layer's input; no float reaches memory.

    Args:
        x, weight, weight_scale, weight_sum, act_scale, act_zero_point, timestep_index, bias: as for ``int4_linear``.
        next_dilation: [N] fp32, or [N / 2] for "geglu".
        next_scale, next_zero_point: the next layer's [T] fp32, [T] int32.
        next_bits: 2 to 8.
        activation: "none", "gelu" (exact), or "geglu": the first half of the channels times gelu of the second.

    Returns:
        [B, ..., N] int8, or [B, ..., N / 2] for "geglu", contiguous.

    Raises:
        ValueError: on any other dtype, shape or layout.
    """
    op = "int4_linear_quantize"
    if x.ndim < 2:
        raise ValueError(f"{op}: x must be [B, ..., K'], got {list(x.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    check_operands(op, x, weight, weight_scale, weight_sum, bias, (*x.shape[:-1], "K'"), ("N", "K'/2"), torch.float32)
    check_tables(op, x.shape[0], act_scale, act_zero_point, timestep_index)
    check_size(op, x, x.numel() // x.shape[-1], weight.shape[0])
    out_channels = weight.shape[0] // 2 if activation == "geglu" else weight.shape[0]
    if out_channels % 2 or (activation == "geglu" and weight.shape[0] % 2):
        raise ValueError(f"{op}: the result must have an even number of channels, got a weight {list(weight.shape)}")
    check_tensor(op, "next_dilation", next_dilation, (torch.float32,), (out_channels,))
    check_tables(op, x.shape[0], next_scale, next_zero_point, timestep_index, "next")
    if next_scale.shape != act_scale.shape:
        raise ValueError(f"{op}: next_scale has {next_scale.numel()} timesteps, act_scale {act_scale.numel()}")
    check_bits(op, next_bits, "next_bits")
    return torch.ops.dq_kernels.int4_linear_quantize.default(
        x, weight, weight_scale, weight_sum, act_scale, act_zero_point, timestep_index, bias, activation,
        next_dilation, next_scale, next_zero_point, next_bits,
    )  # fmt: skip


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
    skip: Tensor | None = None,
    skip_weight: Tensor | None = None,
    skip_weight_sum: Tensor | None = None,
    skip_act_scale: Tensor | None = None,
    skip_act_zero_point: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    upsample: bool = False,
    out_dtype: torch.dtype = torch.float16,
    with_statistics: bool = False,
) -> tuple[Tensor, Tensor]:
    """A 2-D convolution over NHWC, groups = 1, of an image that ``quantize`` has padded.

    Args:
        x: [B, H, W, K'] int8, contiguous, borders included.
        weight: [N, KH, KW, K'/2] uint8, from ``packing.pack_int4``.
        weight_scale, weight_sum: [N] fp32; [N] int32, the sum of each output channel's values.
        act_scale, act_zero_point: [T] fp32, [T] int32.
        timestep_index: [B] int32.
        bias: [N] float, optional.
        channel_add: [B, N] float, optional: added to every pixel (the time embedding).
        residual: [B, OH, OW, N] float, optional.
        skip, skip_weight, skip_weight_sum, skip_act_scale, skip_act_zero_point: a second image [B, H, W, K2'] beside
            x, as in a concat of channels, with its own part of the weights and its own range; all or none.
        stride, dilation: (vertical, horizontal), as in ``torch.nn.Conv2d``.
        upsample: double the image first (nearest), inside its border of 1; for a 3x3 kernel and stride 1.
        out_dtype: float16, bfloat16 or float32.
        with_statistics: whether the next group norm's statistics are wanted.

    Returns:
        [B, OH, OW, N] ``out_dtype``, contiguous, and the sum and centred sum of squares of each channel over each run
        of pixels, [B, OH OW / STATISTICS_ROWS, 2, N] fp32; empty unless wanted, and where the runs would not be whole.

    Raises:
        ValueError: on any other dtype, shape or layout.
    """
    op = "int4_conv2d"
    x_shape, weight_shape = ("B", "H", "W", "K'"), ("N", "KH", "KW", "K'/2")
    check_operands(op, x, weight, weight_scale, weight_sum, bias, x_shape, weight_shape, out_dtype)
    check_tables(op, x.shape[0], act_scale, act_zero_point, timestep_index)
    if min(*stride, *dilation) < 1:
        raise ValueError(f"{op}: stride and dilation must be at least 1, got {stride} and {dilation}")
    if upsample and (weight.shape[1:3] != (3, 3) or stride != (1, 1) or dilation != (1, 1) or min(x.shape[1:3]) < 3):
        raise ValueError(
            f"{op}: upsampling takes a 3x3 kernel of stride and dilation 1 and an image with a border of 1, got "
            f"{list(weight.shape[1:3])}, {stride}, {dilation} and x {list(x.shape)}"
        )
    size = conv2d_output_size(x.shape[1:3], weight.shape[1:3], stride, dilation, upsample)
    if size[0] < 1 or size[1] < 1:
        raise ValueError(
            f"{op}: a padded image of {list(x.shape[1:3])} is smaller than the kernel {list(weight.shape[1:3])} with "
            f"dilation {list(dilation)}"
        )
    out_shape = (x.shape[0], *size, weight.shape[0])
    check_size(op, x, x.shape[0] * size[0] * size[1], weight.shape[0])
    if channel_add is not None:
        check_tensor(op, "channel_add", channel_add, COMPUTE_DTYPES, (out_shape[0], out_shape[3]), any_strides=True)
        channel_add = channel_add if channel_add.stride(1) == 1 else channel_add.contiguous()
    if residual is not None:
        check_tensor(op, "residual", residual, COMPUTE_DTYPES, out_shape, any_strides=True)
        residual = residual.contiguous()
    if skip is not None:
        if skip_weight is None or skip_weight_sum is None or skip_act_scale is None or skip_act_zero_point is None:
            raise ValueError(f"{op}: skip needs skip_weight, skip_weight_sum, skip_act_scale and skip_act_zero_point")
        check_operands(
            op, skip, skip_weight, weight_scale, skip_weight_sum, None, (*x.shape[:3], "K2'"),
            (*weight.shape[:3], "K2'/2"), out_dtype, "skip",
        )  # fmt: skip
        check_tensor(op, "skip_act_scale", skip_act_scale, (torch.float32,), act_scale.shape)
        check_tensor(op, "skip_act_zero_point", skip_act_zero_point, (torch.int32,), act_scale.shape)
    else:
        for name, part in {
            "skip_weight": skip_weight,
            "skip_weight_sum": skip_weight_sum,
            "skip_act_scale": skip_act_scale,
            "skip_act_zero_point": skip_act_zero_point,
        }.items():
            if part is not None:
                raise ValueError(f"{op}: {name} came without a skip")
    return torch.ops.dq_kernels.int4_conv2d.default(
        x, weight, weight_scale, weight_sum, act_scale, act_zero_point, timestep_index, bias, channel_add, residual,
        skip, skip_weight, skip_weight_sum, skip_act_scale, skip_act_zero_point, stride, dilation, upsample, out_dtype,
        with_statistics and size[0] * size[1] % STATISTICS_ROWS == 0,
    )  # fmt: skip


def int8_attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(D)) v with q, k, v and the probabilities in 8 bits, both products summed in int32.

    The scales are found on the way: one for each query, one for each 64 keys or values of a head, less their means (see
    ``attention``).

    Args:
        query: [B, L, H D] float16, bfloat16 or float32, any strides.
        key, value: [B, S, H D] float, any strides.
        heads: H; D is at most ``MAX_HEAD_CHANNELS``.

    Returns:
        [B, L, H D] in query's dtype, contiguous. NaN where an input that counts is not finite.

    Raises:
        ValueError: on any other dtype or shape.
    """
    _check_attention("int8_attention", query, key, value, heads)
    return torch.ops.dq_kernels.int8_attention.default(query, key, value, heads)


def int8_attention_quantize(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    weight_dilation: Tensor,
    act_scale: Tensor,
    act_zero_point: Tensor,
    timestep_index: Tensor,
    bits: int,
) -> Tensor:
    """``int8_attention`` and ``quantize``, without the float result between them.

    Args:
        query, key, value, heads: as for ``int8_attention``; H D is even.
        weight_dilation, act_scale, act_zero_point, timestep_index, bits: as for ``quantize``, of H D channels.

    Returns:
        [B, L, H D] int8, contiguous.

    Raises:
        ValueError: on any other dtype or shape.
    """
    op = "int8_attention_quantize"
    _check_attention(op, query, key, value, heads)
    batch, _, channels = query.shape
    if channels % 2:
        raise ValueError(f"{op}: the channels must be even, got {channels}; use int8_attention and quantize instead")
    check_quantizer(op, batch, channels, weight_dilation, act_scale, act_zero_point, timestep_index, bits)
    return torch.ops.dq_kernels.int8_attention_quantize.default(
        query, key, value, heads, weight_dilation, act_scale, act_zero_point, timestep_index, bits
    )


def _check_attention(op: str, query: Tensor, key: Tensor, value: Tensor, heads: int) -> None:
    check_floats(op, "query", query, ("B", "L", "H D"))
    batch, _, channels = query.shape
    check_floats(op, "key", key, (batch, "S", channels))
    check_floats(op, "value", value, key.shape)
    if key.shape[1] == 0:
        raise ValueError(f"{op}: key {list(key.shape)} has no token")
    if batch >= 2**16:
        raise ValueError(f"{op}: at most {2**16 - 1} samples are launched at a time, got {batch}; split the batch")
    if heads < 1 or channels % heads or not 1 <= channels // heads <= MAX_HEAD_CHANNELS:
        raise ValueError(f"{op}: the {channels} channels must divide into {heads} heads of 1 to {MAX_HEAD_CHANNELS}")
