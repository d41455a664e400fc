"""The operators: public functions that check their arguments by name, and then call ``torch.ops.dq_kernels.*``.

Each operator has a CPU implementation (``cpu``), a CUDA and HIP one (``triton``) and a fake one (shapes alone, for
``torch.compile`` and ``torch.export``); ``reference`` defines what it computes.

Symbols: B samples, K input channels (K' = K padded to even), N output channels, T timestep groups. All tables are fp32
or int32, whatever the dtype of the activations.

An argument of another class than annotated is a TypeError that names it.

A NaN or an infinity of a sample passes through int8 in the quantizer's ``timestep_index`` (see ``reference``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dq_kernels import cpu, fake, reference, triton
from dq_kernels.checks import (
    COMPUTE_DTYPES,
    check_another_quantizer,
    check_floats,
    check_norm,
    check_operands,
    check_out_dtype,
    check_padding,
    check_quantizer,
    check_samples,
    check_size,
    check_tensor,
    names_wrong_types,
)
from dq_kernels.cpu import free_prepacked, prepacked_bytes
from dq_kernels.packing import INT4_MAX, INT4_MIN, pack_int4, sum_int4, unpack_int4
from dq_kernels.records import Norm, PackedWeight, Quantizer
from dq_kernels.registration import register
from dq_kernels.shapes import (
    FEW_KEYS,
    MAX_FLOAT_HEAD_CHANNELS,
    MAX_FLOAT_KEYS,
    MAX_HEAD_CHANNELS,
    MAX_LAYER_NORM_CHANNELS,
    MAX_REDUCTION,
    STATISTICS_ROWS,
    conv2d_output_size,
    statistics_shape,
)

__all__ = [
    "COMPUTE_DTYPES",
    "FEW_KEYS",
    "INT4_MAX",
    "INT4_MIN",
    "MAX_FLOAT_HEAD_CHANNELS",
    "MAX_FLOAT_KEYS",
    "MAX_HEAD_CHANNELS",
    "MAX_LAYER_NORM_CHANNELS",
    "MAX_REDUCTION",
    "STATISTICS_ROWS",
    "Norm",
    "PackedWeight",
    "Quantizer",
    "attention_quantize",
    "free_prepacked",
    "group_norm_quantize",
    "int4_conv2d",
    "int4_geglu_quantize",
    "int4_linear",
    "int8_attention",
    "int8_attention_quantize",
    "layer_norm_quantize",
    "pack_int4",
    "prepacked_bytes",
    "quantize",
    "sum_int4",
    "unpack_int4",
]

_BACKENDS = (reference, cpu, triton, fake)
_INDEX = ("quantizer_timestep_index",)  # of which samples that are not finite get NOT_FINITE
_quantize = register(*(backend.quantize for backend in _BACKENDS), mutates=_INDEX)
_layer_norm_quantize = register(*(backend.layer_norm_quantize for backend in _BACKENDS), mutates=_INDEX)
_group_norm_quantize = register(*(backend.group_norm_quantize for backend in _BACKENDS), mutates=_INDEX)
_int4_linear = register(*(backend.int4_linear for backend in _BACKENDS))
_int4_geglu_quantize = register(*(backend.int4_geglu_quantize for backend in _BACKENDS))
_int4_conv2d = register(*(backend.int4_conv2d for backend in _BACKENDS))
_attention_quantize = register(*(backend.attention_quantize for backend in _BACKENDS), mutates=_INDEX)
_int8_attention = register(*(backend.int8_attention for backend in _BACKENDS))
_int8_attention_quantize = register(*(backend.int8_attention_quantize for backend in _BACKENDS), mutates=_INDEX)


@names_wrong_types
def quantize(x: Tensor, quantizer: Quantizer, padding: tuple[int, int] = (0, 0)) -> Tensor:
    """Quantizes activations: clamp(floor(x (1 / s_k) (1 / act_scale_t) + 0.5) + zp_t) to ``quantizer.bits`` bits.

    Args:
        x: [B, ..., K] float16, bfloat16 or float32, any strides.
        quantizer: of K channels.
        padding: (vertical, horizontal): rows and columns of the zero point around images x [B, H, W, K].

    Returns:
        [B, ..., K'] int8, contiguous; [B, H + 2 vertical, W + 2 horizontal, K'] with padding.

    Raises:
        ValueError: for any other dtype, shape or number of bits.
    """
    op = "quantize"
    check_floats(op, "x", x, ("B", "...", "K"))
    check_quantizer(op, quantizer, x.shape[0], x.shape[-1])
    check_padding(op, x, x.shape[-1], padding)
    check_samples(op, x.shape[0])
    return _quantize(x, quantizer, padding)


@names_wrong_types
def layer_norm_quantize(x: Tensor, norm: Norm, quantizer: Quantizer) -> Tensor:
    """Layer norm over the channels (torch.nn.LayerNorm) and ``quantize``, in one pass.

    Args:
        x: [B, ..., K] float16, bfloat16 or float32, K even.
        norm: of K channels; weight and bias are optional.
        quantizer: of K channels.

    Returns:
        [B, ..., K] int8, contiguous.

    Raises:
        ValueError: for any other dtype or shape.
    """
    op = "layer_norm_quantize"
    check_floats(op, "x", x, ("B", "...", "K"))
    channels = x.shape[-1]
    if channels % 2 or channels > MAX_LAYER_NORM_CHANNELS:
        raise ValueError(
            f"{op}: the channels must be even and at most {MAX_LAYER_NORM_CHANNELS}, got {channels}; "
            "use torch.nn.functional.layer_norm and quantize instead"
        )
    check_norm(op, norm, channels)
    check_quantizer(op, quantizer, x.shape[0], channels)
    return _layer_norm_quantize(x.contiguous(), norm, quantizer)


@names_wrong_types
def group_norm_quantize(
    x: Tensor,
    num_groups: int,
    norm: Norm,
    quantizer: Quantizer,
    silu: bool = True,
    skip: Tensor | None = None,
    statistics: Tensor | None = None,
    skip_statistics: Tensor | None = None,
    padding: tuple[int, int] = (0, 0),
    plain_quantizer: Quantizer | None = None,
) -> tuple[Tensor, Tensor]:
    """Group norm (torch.nn.GroupNorm), SiLU if wanted, and ``quantize`` to a padded image, without the concat of skips.

    Args:
        x: [B, H, W, K] float16, bfloat16 or float32, any strides.
        num_groups: divides the channels K + K2, whose number is even.
        norm: of K + K2 channels, with weight and bias.
        quantizer: of K + K2 channels.
        silu: whether x sigmoid(x) follows the norm.
        skip: [B, H, W, K2] float, optional: is concatenated behind x's channels.
        statistics, skip_statistics: of x and of skip, from ``int4_conv2d``; computed if they are not given.
        padding: as for ``quantize``.
        plain_quantizer: of K + K2 channels, with as many timesteps and the same ``timestep_index`` as ``quantizer``:
            quantizes x beside skip as well, without norm, SiLU and padding (a resnet's shortcut reads them).

    Returns:
        [B, H + 2 vertical, W + 2 horizontal, K + K2] int8, contiguous; and [B, H, W, K + K2] int8, contiguous, without
        samples unless wanted.

    Raises:
        ValueError: for any other dtype or shape.
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
    if norm.weight is None or norm.bias is None:
        raise ValueError(f"{op}: norm.weight and norm.bias must be tensors of {channels} channels, not None")
    check_norm(op, norm, channels)
    check_quantizer(op, quantizer, x.shape[0], channels)
    if plain_quantizer is not None:
        check_another_quantizer(op, "plain_quantizer", plain_quantizer, quantizer, channels)
    check_padding(op, x, channels, padding)
    check_samples(op, x.shape[0])
    return _group_norm_quantize(
        x, num_groups, norm, quantizer, silu, skip, statistics, skip_statistics, padding, plain_quantizer
    )


@names_wrong_types
def int4_linear(
    x: Tensor,
    weight: PackedWeight,
    quantizer: Quantizer,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
    next_quantizer: Quantizer | None = None,
) -> Tensor:
    """y = act_scale_t weight_scale_n (sum_k q_x q_w - zp_t sum_k q_w) + bias_n + residual, summed in int32.

    Args:
        x: [B, ..., K'] int8, contiguous, from ``quantize``.
        weight: its values are [N, K'/2].
        quantizer: the one that made x; its dilation and bits are not read.
        bias: [N] float, optional.
        residual: [B, ..., N] float, optional.
        out_dtype: float16, bfloat16 or float32; of no effect with ``next_quantizer``.
        next_quantizer: of N channels, N even, with as many timesteps and the same ``timestep_index`` as ``quantizer``:
            quantizes the result. A residual that is not finite must have changed the index before, in an operator that
            quantized it.

    Returns:
        [B, ..., N] ``out_dtype``, or int8 with ``next_quantizer``; contiguous.

    Raises:
        ValueError: for any other dtype, shape or layout, or a sum that may exceed int32.
    """
    op = "int4_linear"
    out_channels = _check_linear(op, x, weight, quantizer, bias)
    check_out_dtype(op, out_dtype)
    if residual is not None:
        check_tensor(op, "residual", residual, COMPUTE_DTYPES, (*x.shape[:-1], out_channels), any_strides=True)
        residual = residual.contiguous()
    if next_quantizer is not None:
        if out_channels % 2:
            raise ValueError(f"{op}: the {out_channels} output channels must be an even number to be quantized")
        check_another_quantizer(op, "next_quantizer", next_quantizer, quantizer, out_channels)
    return _int4_linear(x, weight, quantizer, bias, residual, out_dtype, next_quantizer)


@names_wrong_types
def int4_geglu_quantize(
    x: Tensor, weight: PackedWeight, quantizer: Quantizer, next_quantizer: Quantizer, bias: Tensor | None = None
) -> Tensor:
    """A linear layer, GEGLU and the quantization of the next layer's input; no float reaches memory.

    GEGLU is the first half of the channels times gelu of the second, with the exact gelu x Phi(x).

    Args:
        x, quantizer: as for ``int4_linear``.
        weight, bias: of 2 N channels.
        next_quantizer: of N channels, N even, with as many timesteps and the same ``timestep_index`` as ``quantizer``.

    Returns:
        [B, ..., N] int8, contiguous.

    Raises:
        ValueError: for any other dtype, shape or layout, or a sum that may exceed int32.
    """
    op = "int4_geglu_quantize"
    out_channels = _check_linear(op, x, weight, quantizer, bias)
    if out_channels % 4:
        raise ValueError(f"{op}: half of the weight's {out_channels} output channels must be an even number")
    check_another_quantizer(op, "next_quantizer", next_quantizer, quantizer, out_channels // 2)
    return _int4_geglu_quantize(x, weight, quantizer, next_quantizer, bias)


def _check_linear(op: str, x: Tensor, weight: PackedWeight, quantizer: Quantizer, bias: Tensor | None) -> int:
    """The number of output channels."""
    if x.ndim < 2:
        raise ValueError(f"{op}: x must be [B, ..., K'], got {list(x.shape)}")
    check_operands(op, x, weight, bias, (*x.shape[:-1], "K'"), ("N", "K'/2"))
    check_quantizer(op, quantizer, x.shape[0])
    out_channels = weight.values.shape[0]
    check_size(op, x, x.numel() // x.shape[-1], out_channels)
    return out_channels


@names_wrong_types
def int4_conv2d(
    x: Tensor,
    weight: PackedWeight,
    quantizer: Quantizer,
    bias: Tensor | None = None,
    channel_add: Tensor | None = None,
    residual: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    upsample: bool = False,
    out_dtype: torch.dtype = torch.float16,
    with_statistics: bool = False,
) -> tuple[Tensor, Tensor]:
    """A 2-D convolution over NHWC, groups = 1, of an image that ``quantize`` has padded.

    Args:
        x: [B, H, W, K'] int8, contiguous, borders included.
        weight: its values are [N, KH, KW, K'/2].
        quantizer: the one that made x; its dilation and bits are not read.
        bias: [N] float, optional.
        channel_add: [B, N] float, optional: is added to every pixel (the time embedding).
        residual: [B, OH, OW, N] float, optional.
        stride, dilation: (vertical, horizontal), as in ``torch.nn.Conv2d``.
        upsample: doubles the image first (nearest), inside its border of 1; for a 3x3 kernel and stride 1.
        out_dtype: float16, bfloat16 or float32.
        with_statistics: whether to return the statistics for the next group norm.

    Returns:
        [B, OH, OW, N] ``out_dtype``, contiguous, and the sum and centred sum of squares of each channel over each run
        of pixels, [B, OH OW / STATISTICS_ROWS, 2, N] fp32; the latter is empty unless wanted, and where the runs would
        not be whole.

    Raises:
        ValueError: for any other dtype, shape or layout, or a sum that may exceed int32.
    """
    op = "int4_conv2d"
    check_operands(op, x, weight, bias, ("B", "H", "W", "K'"), ("N", "KH", "KW", "K'/2"))
    check_quantizer(op, quantizer, x.shape[0])
    check_out_dtype(op, out_dtype)
    out_channels, kernel_size = weight.values.shape[0], weight.values.shape[1:3]
    if min(*stride, *dilation) < 1:
        raise ValueError(f"{op}: stride and dilation must be at least 1, got {stride} and {dilation}")
    if upsample and (kernel_size != (3, 3) or stride != (1, 1) or dilation != (1, 1) or min(x.shape[1:3]) < 3):
        raise ValueError(
            f"{op}: upsampling takes a 3x3 kernel of stride and dilation 1 and an image with a border of 1, got "
            f"{list(kernel_size)}, {stride}, {dilation} and x {list(x.shape)}"
        )
    size = conv2d_output_size(x.shape[1:3], kernel_size, stride, dilation, upsample)
    if size[0] < 1 or size[1] < 1:
        raise ValueError(
            f"{op}: a padded image of {list(x.shape[1:3])} is smaller than the kernel {list(kernel_size)} with "
            f"dilation {list(dilation)}"
        )
    out_shape = (x.shape[0], *size, out_channels)
    check_size(op, x, x.shape[0] * size[0] * size[1], out_channels)
    if channel_add is not None:
        check_tensor(op, "channel_add", channel_add, COMPUTE_DTYPES, (out_shape[0], out_channels), any_strides=True)
        channel_add = channel_add if channel_add.stride(1) == 1 else channel_add.contiguous()
    if residual is not None:
        check_tensor(op, "residual", residual, COMPUTE_DTYPES, out_shape, any_strides=True)
        residual = residual.contiguous()
    with_statistics = with_statistics and size[0] * size[1] % STATISTICS_ROWS == 0
    return _int4_conv2d(
        x, weight, quantizer, bias, channel_add, residual, stride, dilation, upsample, out_dtype, with_statistics
    )


@names_wrong_types
def attention_quantize(query: Tensor, key: Tensor, value: Tensor, heads: int, quantizer: Quantizer) -> Tensor:
    """softmax(q k^T / sqrt(D)) v in floating point, for few keys, and ``quantize``.

    Args:
        query: [B, L, H D] float16, bfloat16 or float32, any strides; H D is even.
        key, value: [B, S, H D] float, any strides; S is at most ``MAX_FLOAT_KEYS``.
        heads: H; D is at most ``MAX_FLOAT_HEAD_CHANNELS``.
        quantizer: of H D channels.

    Returns:
        [B, L, H D] int8, contiguous.

    Raises:
        ValueError: for any other dtype or shape.
    """
    op = "attention_quantize"
    _check_attention(op, query, key, value, heads, MAX_FLOAT_HEAD_CHANNELS)
    if key.shape[1] > MAX_FLOAT_KEYS:
        raise ValueError(
            f"{op}: key {list(key.shape)} has more than {MAX_FLOAT_KEYS} tokens; use "
            "torch.nn.functional.scaled_dot_product_attention and quantize instead"
        )
    _check_quantized_attention(op, query, quantizer)
    return _attention_quantize(query, key, value, heads, quantizer)


@names_wrong_types
def int8_attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(D)) v with q, k, v and the probabilities in 8 bits, both products summed in int32.

    The scales are computed from the inputs: one for each query, one for each 64 keys or values of a head, less their
    means (see ``triton.attention``).

    Args:
        query: [B, L, H D] float16, bfloat16 or float32, any strides.
        key, value: [B, S, H D] float, any strides.
        heads: H; D is at most ``MAX_HEAD_CHANNELS``.

    Returns:
        [B, L, H D] in query's dtype, contiguous. NaN where an input that counts is not finite.

    Raises:
        ValueError: for any other dtype or shape.
    """
    _check_attention("int8_attention", query, key, value, heads)
    return _int8_attention(query, key, value, heads)


@names_wrong_types
def int8_attention_quantize(
    query: Tensor, key: Tensor, value: Tensor, heads: int, quantizer: Quantizer, statistics: Tensor | None = None
) -> Tensor:
    """``int8_attention`` and ``quantize``, without the float result between them.

    Args:
        query, key, value, heads: as for ``int8_attention``; H D is even.
        quantizer: of H D channels.
        statistics: [B, S / STATISTICS_ROWS, 2, 2 H D] fp32, of key beside value, from ``int4_conv2d``; optional. They
            save two sums over more than ``FEW_KEYS`` tokens.

    Returns:
        [B, L, H D] int8, contiguous.

    Raises:
        ValueError: for any other dtype or shape.
    """
    op = "int8_attention_quantize"
    _check_attention(op, query, key, value, heads)
    _check_quantized_attention(op, query, quantizer)
    if statistics is not None:
        if key.shape[1] % STATISTICS_ROWS:
            raise ValueError(f"{op}: statistics are given for whole runs of {STATISTICS_ROWS} keys alone")
        shape = statistics_shape(key.shape[0], (key.shape[1], 1), 2 * key.shape[2], True)
        check_tensor(op, "statistics", statistics, (torch.float32,), shape, any_strides=True)
        statistics = statistics if statistics.stride(3) == 1 else statistics.contiguous()
    return _int8_attention_quantize(query, key, value, heads, quantizer, statistics)


def _check_quantized_attention(op: str, query: Tensor, quantizer: Quantizer) -> None:
    batch, _, channels = query.shape
    if channels % 2:
        raise ValueError(f"{op}: the channels must be even, got {channels}; quantize the float result instead")
    check_quantizer(op, quantizer, batch, channels)


def _check_attention(
    op: str, query: Tensor, key: Tensor, value: Tensor, heads: int, most_channels: int = MAX_HEAD_CHANNELS
) -> None:
    check_floats(op, "query", query, ("B", "L", "H D"))
    batch, _, channels = query.shape
    check_floats(op, "key", key, (batch, "S", channels))
    check_floats(op, "value", value, key.shape)
    if key.shape[1] == 0:
        raise ValueError(f"{op}: key {list(key.shape)} has no token")
    check_samples(op, batch)
    if heads < 1 or channels % heads or not 1 <= channels // heads <= most_channels:
        raise ValueError(f"{op}: the {channels} channels must divide into {heads} heads of 1 to {most_channels}")
