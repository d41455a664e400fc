"""The implementations in ``bench_kernels.py``: layers, and chains of operators that the runtime fuses.

A ``Side`` is one implementation with its own tensors. Both sides of a comparison compute the same function: the
baseline's weights are the dequantized INT4 weights. All values are random; the caller sets the seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers import linears
from benchmarks.unets import LayerShape
from dq_kernels import ops, reference
from dq_kernels.ops import Norm, PackedWeight, Quantizer

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
COMPUTE_DTYPE = torch.float16 if CUDA else torch.float32
OURS = "int4"
BASELINES = {"fp16": torch.float16} if CUDA else {"fp32": torch.float32, "bf16": torch.bfloat16}
BASELINE = next(iter(BASELINES))  # the reference of speed-ups
TIMESTEPS, BITS, GROUPS, EPS = 20, 8, 32, 1e-5
HEAD_CHANNELS = 64


@dataclass(frozen=True)
class Side:
    """A callable, the tensors that it reads, its multiplications and additions, and the conversion of its result."""

    run: Callable[[], Any]
    reads: tuple[Tensor, ...]
    operations: int
    to_floats: Callable[[Any], Tensor] = Tensor.float

    @property
    def bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.reads)


def random_quantizer(batch: int, channels: int) -> Quantizer:
    """The quantizer of one input, with scales per timestep for normally distributed values."""
    return Quantizer(
        torch.ones(channels, device=DEVICE),
        0.03 + 0.005 * torch.rand(TIMESTEPS, device=DEVICE),
        torch.randint(-8, 9, (TIMESTEPS,), dtype=torch.int32, device=DEVICE),
        torch.arange(batch, dtype=torch.int32, device=DEVICE) % TIMESTEPS,
        BITS,
    )


def dequantizer(quantizer: Quantizer, border: int = 0) -> Callable[[Tensor], Tensor]:
    """A function that converts an int8 activation to floats and removes a border of ``border`` pixels."""

    def to_floats(q: Tensor) -> Tensor:
        q = q[:, border:-border, border:-border] if border else q
        return reference.dequantize_activation(q, quantizer)

    return to_floats


@dataclass(frozen=True)
class Weights:
    """Random INT4 weights [N, ..., K], packed and dequantized, the latter [N, K] or [N, K, KH, KW] channels_last."""

    packed: PackedWeight
    dense: Tensor
    bias: Tensor

    @staticmethod
    def random(out_channels: int, *reduction: int) -> Weights:
        values = torch.randint(
            ops.INT4_MIN, ops.INT4_MAX + 1, (out_channels, *reduction), dtype=torch.int8, device=DEVICE
        )
        unit = (21.25 * values[0].numel()) ** -0.5  # 21.25: the variance of the values; that of results is about 1
        scale = unit * (0.5 + torch.rand(out_channels, device=DEVICE))
        sums = values.flatten(1).sum(1, dtype=torch.int32)
        dense = (values.float() * scale.view(-1, *[1] * len(reduction))).to(COMPUTE_DTYPE)
        dense = dense.permute(0, 3, 1, 2) if len(reduction) == 3 else dense
        return Weights(PackedWeight(ops.pack_int4(values), scale, sums), dense, 0.1 * _randn(out_channels))


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=COMPUTE_DTYPE)


def _nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def _tensors(*things: Any) -> tuple[Tensor, ...]:
    """The tensors among arguments and tuples of arguments."""
    flat = [part for thing in things for part in (thing if isinstance(thing, tuple) else (thing,))]
    return tuple(part for part in flat if isinstance(part, Tensor))


def layer_input(shape: LayerShape) -> Tensor:
    """The input of a layer: [B, tokens, K], or [B, H, W, K] for a convolution."""
    size = (shape.tokens,) if shape.kind == "linear" else (shape.height, shape.width)
    return _randn(shape.batch, *size, shape.in_channels)


def layer_weights(shape: LayerShape) -> Weights:
    """The weights of a layer; packing pads an odd number of input channels."""
    taps = () if shape.kind == "linear" else shape.kernel_size
    return Weights.random(shape.out_channels, *taps, shape.in_channels)


def int4_layer(shape: LayerShape, x: Tensor, quantizer: Quantizer, weights: Weights) -> Tensor:
    """Our layer with the quantization of x; a convolution's result is NHWC."""
    q = ops.quantize(x, quantizer, shape.padding)
    arguments = (q, weights.packed, quantizer, weights.bias)
    if shape.kind == "linear":
        return ops.int4_linear(*arguments, out_dtype=COMPUTE_DTYPE)
    return ops.int4_conv2d(*arguments, stride=shape.stride, out_dtype=COMPUTE_DTYPE)[0]


def layer_side(shape: LayerShape, implementation: str) -> Side:
    """One implementation of a single layer."""
    x, weights = layer_input(shape), layer_weights(shape)
    quantizer = random_quantizer(shape.batch, shape.in_channels)
    if implementation == OURS:
        reads = _tensors(x, weights.packed, weights.bias)
        return Side(lambda: int4_layer(shape, x, quantizer, weights), reads, shape.operations)
    if implementation in linears.PEERS:
        x = x.to(linears.activation_dtype(implementation))
        peer = linears.PEERS[implementation](weights.dense)
        held = weights.dense.numel() * linears.weight_bits(implementation) // 8
        return Side(lambda: peer(x), (x, torch.empty(held, dtype=torch.uint8, device="meta")), shape.operations)
    x, weight, bias = (tensor.to(BASELINES[implementation]) for tensor in (x, weights.dense, weights.bias))
    if shape.kind == "linear":
        return Side(lambda: F.linear(x, weight, bias), (x, weight, bias), shape.operations)
    image = _nchw(x)
    stride, padding = shape.stride, shape.padding
    return Side(lambda: F.conv2d(image, weight, bias, stride, padding), (x, weight, bias), shape.operations)


def layer_error(shape: LayerShape) -> float:
    """Relative error of our layer against the fp64 product of the dequantized operands, on a few rows or channels.

    The check covers the last 8 tokens, or 16 output channels, of the last sample, where a wrong mask shows first.
    """
    x, weights = layer_input(shape), layer_weights(shape)
    quantizer = random_quantizer(shape.batch, shape.in_channels)
    y = int4_layer(shape, x, quantizer, weights)[-1:].double()
    last = quantizer._replace(timestep_index=quantizer.timestep_index[-1:])
    weight, scale, _ = weights.packed
    if shape.kind == "linear":
        q = reference.quantize(x[-1:, -8:], last)
        dense = reference.dequantize_weight(weight, scale)[:, : shape.in_channels]
        return relative_error(
            y[:, -8:],
            F.linear(reference.dequantize_activation(q, last).double(), dense.double(), weights.bias.double()),
        )
    q = reference.quantize(x[-1:], last)
    dense = _nchw(reference.dequantize_weight(weight[-16:], scale[-16:])[..., : shape.in_channels]).double()
    image, bias = _nchw(reference.dequantize_activation(q, last)).double(), weights.bias[-16:].double()
    expected = F.conv2d(image, dense, bias, shape.stride, shape.padding).permute(0, 2, 3, 1)
    return relative_error(y[..., -16:], expected)


def relative_error(y: Tensor, expected: Tensor) -> float:
    """||y - expected|| / ||expected||."""
    return ((y - expected).norm() / expected.norm()).item()


def _main_convolution(shapes: Sequence[LayerShape]) -> LayerShape:
    """The 3x3 convolution between equal channels with most of the UNet's FLOPs."""
    candidates = (
        s for s in shapes if s.kernel_size == (3, 3) and s.stride == (1, 1) and s.in_channels == s.out_channels
    )
    return max(candidates, key=lambda shape: shape.operations * len(shape.names))


def _main_gate(shapes: Sequence[LayerShape]) -> LayerShape:
    """The GEGLU projection (four times as wide, twice) with most of the UNet's FLOPs."""
    candidates = (s for s in shapes if s.kind == "linear" and s.out_channels == 8 * s.in_channels)
    return max(candidates, key=lambda shape: shape.operations * len(shape.names))


def _norm_parameters(channels: int) -> Norm:
    return Norm(1 + 0.1 * _randn(channels), 0.1 * _randn(channels), EPS)


def _group_norm_silu(x: Tensor, norm: Norm) -> Tensor:
    return F.silu(F.group_norm(x, GROUPS, *norm))


def group_norm_chain(shapes: Sequence[LayerShape]) -> tuple[Side, Side]:
    """Group norm + SiLU; our kernel writes the padded int8 image of the next convolution."""
    shape = _main_convolution(shapes)
    x, norm = layer_input(shape), _norm_parameters(shape.in_channels)
    quantizer = random_quantizer(shape.batch, shape.in_channels)
    reads = _tensors(x, *norm)
    return (
        Side(
            lambda: ops.group_norm_quantize(x, GROUPS, norm, quantizer, padding=(1, 1))[0],
            reads, 0, dequantizer(quantizer, border=1),
        ),
        Side(lambda: _group_norm_silu(_nchw(x), norm), reads, 0, lambda y: y.permute(0, 2, 3, 1).float()),
    )  # fmt: skip


def layer_norm_chain(shapes: Sequence[LayerShape]) -> tuple[Side, Side]:
    """Layer norm; our kernel writes int8."""
    shape = _main_gate(shapes)
    channels = shape.in_channels
    x, norm, quantizer = layer_input(shape), _norm_parameters(channels), random_quantizer(shape.batch, channels)
    reads = _tensors(x, *norm)
    return (
        Side(lambda: ops.layer_norm_quantize(x, norm, quantizer), reads, 0, dequantizer(quantizer)),
        Side(lambda: F.layer_norm(x, (channels,), *norm), reads, 0),
    )


def geglu_chain(shapes: Sequence[LayerShape]) -> tuple[Side, Side]:
    """Linear and GEGLU; our kernel reads the int8 output of a norm and writes the next layer's int8 input."""
    shape = _main_gate(shapes)
    x, weights = layer_input(shape), layer_weights(shape)
    quantizer, following = (
        random_quantizer(shape.batch, channels) for channels in (shape.in_channels, 4 * shape.in_channels)
    )
    following = following._replace(scale=3 * following.scale)  # the products have longer tails
    q = ops.quantize(x, quantizer)

    def unfused() -> Tensor:
        hidden, gate = F.linear(x, weights.dense, weights.bias).chunk(2, dim=-1)
        return hidden * F.gelu(gate)

    return (
        Side(
            lambda: ops.int4_geglu_quantize(q, weights.packed, quantizer, following, weights.bias),
            _tensors(q, weights.packed, weights.bias), shape.operations, dequantizer(following),
        ),
        Side(unfused, (x, weights.dense, weights.bias), shape.operations),
    )  # fmt: skip


def qkv_chain(shapes: Sequence[LayerShape]) -> tuple[Side, Side]:
    """Layer norm and the projections to q, k and v; our form is two kernels."""
    gate = _main_gate(shapes)
    channels = gate.in_channels
    x, norm, quantizer = layer_input(gate), _norm_parameters(channels), random_quantizer(gate.batch, channels)
    weights = Weights.random(3 * channels, channels)
    parts = weights.dense.chunk(3)
    operations = 2 * gate.rows * channels * 3 * channels

    def fused() -> Tensor:
        q = ops.layer_norm_quantize(x, norm, quantizer)
        return ops.int4_linear(q, weights.packed, quantizer, out_dtype=COMPUTE_DTYPE)

    def unfused() -> list[Tensor]:
        normed = F.layer_norm(x, (channels,), *norm)
        return [F.linear(normed, part) for part in parts]

    return (
        Side(fused, _tensors(x, norm, weights.packed), operations),
        Side(unfused, _tensors(x, norm, weights.dense), operations, lambda results: torch.cat(results, -1).float()),
    )


def resnet_chain(shapes: Sequence[LayerShape]) -> tuple[Side, Side]:
    """Norm + SiLU, convolution + time embedding + residual, norm + SiLU; our kernels pass on int8 and statistics."""
    shape = _main_convolution(shapes)
    batch, channels = shape.batch, shape.in_channels
    x, residual, embedding, weights = (
        layer_input(shape),
        layer_input(shape),
        _randn(batch, channels),
        layer_weights(shape),
    )
    first, second = _norm_parameters(channels), _norm_parameters(channels)
    quantizer, following = random_quantizer(batch, channels), random_quantizer(batch, channels)

    def fused() -> Tensor:
        q, _ = ops.group_norm_quantize(x, GROUPS, first, quantizer, padding=(1, 1))
        y, statistics = ops.int4_conv2d(
            q, weights.packed, quantizer, weights.bias, embedding, residual, out_dtype=COMPUTE_DTYPE,
            with_statistics=True,
        )  # fmt: skip
        return ops.group_norm_quantize(y, GROUPS, second, following, statistics=statistics, padding=(1, 1))[0]

    def unfused() -> Tensor:
        y = F.conv2d(_group_norm_silu(_nchw(x), first), weights.dense, weights.bias, padding=1)
        y = y + embedding[:, :, None, None] + _nchw(residual)
        return _group_norm_silu(y, second)

    reads = (x, residual, embedding, *first, *second, weights.bias)
    return (
        Side(
            fused, _tensors(*reads, weights.packed), shape.operations,
            dequantizer(following, border=1),
        ),
        Side(unfused, (*reads, weights.dense), shape.operations, lambda y: y.permute(0, 2, 3, 1).float()),
    )  # fmt: skip


def upsample_chain(shapes: Sequence[LayerShape]) -> tuple[Side, Side]:
    """Nearest upsampling by 2 and a convolution; ours upsamples by addressing, and includes the quantization."""
    large = _main_convolution(shapes)
    shape = replace(large, height=large.height // 2, width=large.width // 2)  # before upsampling
    x, weights = layer_input(shape), layer_weights(shape)
    quantizer = random_quantizer(shape.batch, shape.in_channels)

    def fused() -> Tensor:
        q = ops.quantize(x, quantizer, (1, 1))
        return ops.int4_conv2d(q, weights.packed, quantizer, weights.bias, upsample=True, out_dtype=COMPUTE_DTYPE)[0]

    def unfused() -> Tensor:
        doubled = F.interpolate(_nchw(x), scale_factor=2.0, mode="nearest")
        return F.conv2d(doubled, weights.dense, weights.bias, padding=1)

    reads = _tensors(x, weights.packed, weights.bias)
    return (
        Side(fused, reads, large.operations),
        Side(unfused, (x, weights.dense, weights.bias), large.operations, lambda y: y.permute(0, 2, 3, 1).float()),
    )


def time_projections_chain(shapes: Sequence[LayerShape]) -> tuple[Side, Side]:
    """SiLU and the linear of the time embedding in every resnet of the UNet; our form is one GEMM."""
    layers = [(s, name) for s in shapes for name in s.names if name.endswith("time_emb_proj")]
    sizes, (batch, channels) = [s.out_channels for s, _ in layers], (layers[0][0].batch, layers[0][0].in_channels)
    x, quantizer = _randn(batch, channels), random_quantizer(batch, channels)
    weights = Weights.random(sum(sizes), channels)
    pairs = list(zip(weights.dense.split(sizes), weights.bias.split(sizes), strict=True))
    operations = 2 * batch * channels * sum(sizes)

    def fused() -> Tensor:
        q = ops.quantize(F.silu(x), quantizer)
        return ops.int4_linear(q, weights.packed, quantizer, weights.bias, out_dtype=COMPUTE_DTYPE)

    def unfused() -> list[Tensor]:
        return [F.linear(F.silu(x), weight, bias) for weight, bias in pairs]

    return (
        Side(fused, _tensors(x, weights.packed, weights.bias), operations),
        Side(unfused, (x, weights.dense, weights.bias), operations, lambda results: torch.cat(results, -1).float()),
    )


def attention_chain(shapes: Sequence[LayerShape]) -> tuple[Side, Side]:
    """Self-attention after the projection to q, k and v, with SDXL's head size; ours uses int8 and writes int8."""
    shape = _main_gate(shapes)
    channels, heads = shape.in_channels, shape.in_channels // HEAD_CHANNELS
    q, k, v = _randn(shape.batch, shape.tokens, 3 * channels).chunk(3, dim=-1)
    following = random_quantizer(shape.batch, channels)
    following = following._replace(scale=following.scale * (math.e / shape.tokens) ** 0.5)  # attention averages values

    def unfused() -> Tensor:
        per_head = (x.unflatten(-1, (heads, HEAD_CHANNELS)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*per_head).transpose(1, 2).flatten(2)

    operations = 4 * shape.rows * shape.tokens * channels
    return (
        Side(
            lambda: ops.int8_attention_quantize(q, k, v, heads, following), (q, k, v), operations,
            dequantizer(following),
        ),
        Side(unfused, (q, k, v), operations),
    )  # fmt: skip


# Layers of a UNet -> our side, the baseline's side.
CHAINS: dict[str, Callable[[Sequence[LayerShape]], tuple[Side, Side]]] = {
    "group norm + SiLU": group_norm_chain,
    "layer norm": layer_norm_chain,
    "linear + GEGLU": geglu_chain,
    "layer norm, q k v": qkv_chain,
    "norm, conv + time embedding + residual, norm": resnet_chain,
    "upsampling, conv": upsample_chain,
    "all time projections": time_projections_chain,
    "attention": attention_chain,
}
