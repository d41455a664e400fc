"""INT4 layers on CPUs: exact integers, by ``gemm.cpp`` where it runs, otherwise by oneDNN's int8 operators.

oneDNN takes some 80 us a call to find its code, longer than most layers of a small UNet compute at a batch of 1. Both
have the same results, bit for bit, so that in a batch of one timestep a sample's do not depend on the batch's size.

oneDNN multiplies uint8 by int8, so activations are shifted by 128 together with their zero point. It takes one
activation scale per call, so the scales of a batch with several timesteps follow in a pass of their own. Both read int8
weights in a layout of their own: this copy is made at a layer's first call, lives as long as the packed weight, and is
counted by ``prepacked_bytes``.

Without VNNI, oneDNN adds pairs of products in int16, which saturates if weights exceed 64 in magnitude. 4-bit values
are therefore exact on every processor; their multiples by 16, which the Triton kernels use, would not be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from dq_kernels.cpu import compiled
from dq_kernels.cpu.quantization import quantize, with_own_index
from dq_kernels.packing import unpack_int4
from dq_kernels.records import PackedWeight, Quantizer
from dq_kernels.shapes import STATISTICS_ROWS, conv2d_output_size, statistics_shape

Run = Callable[[Tensor, float, int, Tensor | None], Tensor]
LINEAR = (1, 1, 1, 1, 1, 1, 0)  # a linear layer as a convolution: kernel, stride, dilation, not doubled


class _Prepacked(NamedTuple):
    values: Tensor
    made_from: tuple[int, int, bool]  # address and version of the packed values, and whether the layout is oneDNN's


_prepacked_weights = WeakTensorKeyDictionary()


def prepacked_bytes(weights: Iterable[Tensor] | None = None) -> int:
    """Memory that the int8 copies for oneDNN take now, in bytes.

    Args:
        weights: packed values, of which views count as well; by default all that there are.
    """
    entries = _prepacked_weights.values()
    if weights is not None:
        addresses = {weight.data_ptr() for weight in weights}
        entries = [entry for entry in entries if entry.made_from[0] in addresses]
    return sum(entry.values.numel() for entry in entries)


def free_prepacked(weights: Iterable[Tensor] | None = None) -> None:
    """Frees the int8 copies for oneDNN; the next call of a layer makes its copy again.

    Args:
        weights: packed values, of which views count as well; by default all that there are.
    """
    addresses = None if weights is None else {weight.data_ptr() for weight in weights}
    for values, entry in list(_prepacked_weights.items()):
        if addresses is None or entry.made_from[0] in addresses:
            del _prepacked_weights[values]


def _prepack(values: Tensor, prepack: Callable[[Tensor], Tensor], by_onednn: bool = True) -> Tensor:
    # Inference tensors have no version counter; torch forbids in-place changes outside of inference mode.
    made_from = (values.data_ptr(), 0 if values.is_inference() else values._version, by_onednn)
    entry = _prepacked_weights.get(values)
    if entry is None or entry.made_from != made_from:
        if by_onednn and not torch.backends.mkldnn.is_available():
            raise RuntimeError("dq_kernels on a CPU needs a PyTorch built with oneDNN; this one has none")
        entry = _Prepacked(prepack(unpack_int4(values)), made_from)
        _prepacked_weights[values] = entry
    return entry.values


def _multiply(
    functions: Any, x: Tensor, weight: PackedWeight, quantizer: Quantizer, bias: Tensor | None,
    out_shape: tuple[int, ...], out_dtype: torch.dtype, residual: Tensor | None, channel_add: Tensor | None = None,
    statistics: Tensor | None = None, geometry: tuple[int, ...] = LINEAR,
) -> Tensor:  # fmt: skip
    """The product by ``gemm.cpp``, and what follows it."""
    prepacked = _prepack(
        weight.values, lambda w: compiled.panels(w.flatten(1, -2) if w.ndim > 2 else w[:, None]), False
    )
    product = (functions, x, prepacked, weight, quantizer, bias, out_shape, geometry)
    if all(addend is None or addend.dtype == out_dtype for addend in (channel_add, residual)):
        return compiled.multiply(*product, out_dtype, channel_add, residual, statistics)
    return _finish(compiled.multiply(*product, torch.float32), out_dtype, channel_add, residual, statistics)


def _samples_by_timestep(quantizer: Quantizer) -> tuple[list[tuple[int, list[int]]], list[int]]:
    """The timesteps of a batch, each with its samples; and the samples that are not finite."""
    most = quantizer.scale.numel() - 1
    samples: dict[int, list[int]] = {}
    index = quantizer.timestep_index.tolist()
    for sample, timestep in enumerate(index):
        samples.setdefault(min(max(timestep, ~timestep), most), []).append(sample)
    return sorted(samples.items()), [sample for sample, timestep in enumerate(index) if timestep < 0]


@lru_cache(maxsize=256)
def _no_zero_points(channels: int) -> Tensor:
    """The zero points of a symmetric weight."""
    with torch.inference_mode(False):
        return torch.zeros(channels, dtype=torch.int32)


def _multiply_by_onednn(run: Run, x: Tensor, quantizer: Quantizer, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """The product of ``run(uint8 samples, scale, zero point, bias)``, in fp32.

    oneDNN takes one activation scale a call. A batch of several timesteps runs in one call without scale and zero
    point, which follow in a pass of their own; in plain torch, each timestep runs alone.
    """
    unsigned = x.view(torch.uint8) ^ 0x80
    functions = compiled.library()
    timesteps, not_finite = _samples_by_timestep(quantizer)
    bias = None if bias is None else bias.float()
    if len(timesteps) > 1 and functions is not None:
        y = _without(run(unsigned, 1.0, 128, None), not_finite)
        return compiled.finish(functions, y, torch.float32, weight.sum * weight.scale, quantizer, bias)
    parts = [
        run(
            unsigned if len(timesteps) == 1 else unsigned[samples],
            float(quantizer.scale[t]),
            int(quantizer.zero_point[t]) + 128,
            bias,
        )
        for t, samples in timesteps
    ]
    y = parts[0] if len(parts) == 1 else _in_order(parts, [samples for _, samples in timesteps])
    return _without(y, not_finite)


def _finish(
    y: Tensor,
    out_dtype: torch.dtype,
    channel_add: Tensor | None,
    residual: Tensor | None,
    statistics: Tensor | None = None,
) -> Tensor:
    """What follows the product: the addends, ``out_dtype``, and the statistics."""
    addends = [addend for addend in (channel_add, residual) if addend is not None]
    if not addends and statistics is None:
        return y if y.dtype == out_dtype else y.to(out_dtype)
    functions = compiled.library() if all(addend.dtype == out_dtype for addend in addends) else None
    if functions is not None:
        return compiled.finish(
            functions, y, out_dtype, channel_add=channel_add, residual=residual, statistics=statistics
        )
    if channel_add is not None:
        y = y + channel_add[:, None, None, :]
    if residual is not None:
        y = y + residual
    y = y.to(out_dtype).contiguous()
    if statistics is not None:
        runs = y.float().reshape(y.shape[0], -1, STATISTICS_ROWS, y.shape[3])
        statistics[:, :, 0] = runs.sum(2)
        statistics[:, :, 1] = runs.var(2, correction=0) * STATISTICS_ROWS
    return y


def _without(y: Tensor, not_finite: list[int]) -> Tensor:
    """y, in which samples that are not finite become NaN."""
    if not_finite:
        y[not_finite] = torch.nan
    return y


def _in_order(parts: list[Tensor], samples: list[list[int]]) -> Tensor:
    """The samples of all parts in the order of their numbers."""
    joined = torch.cat(parts)
    return joined[torch.tensor([number for numbers in samples for number in numbers]).argsort()]


def int4_linear(
    x: Tensor, weight: PackedWeight, quantizer: Quantizer, bias: Tensor | None, residual: Tensor | None,
    out_dtype: torch.dtype, next_quantizer: Quantizer | None = None,
) -> Tensor:  # fmt: skip
    """As ``reference.int4_linear``."""
    dtype = out_dtype if next_quantizer is None else torch.float32
    if (functions := compiled.gemm(x.numel() * weight.scale.shape[0])) is not None:
        out_shape = (*x.shape[:-1], weight.scale.shape[0])
        y = _multiply(functions, x, weight, quantizer, bias, out_shape, dtype, residual)
    else:
        y = _finish(_multiply_by_onednn(_linear_by_onednn(weight), x, quantizer, weight, bias), dtype, None, residual)
    return y if next_quantizer is None else quantize(y, with_own_index(next_quantizer), (0, 0))


def _linear_by_onednn(weight: PackedWeight) -> Run:
    prepacked = _prepack(weight.values, lambda w: torch.ops.onednn.qlinear_prepack(w, None))
    out_channels = weight.scale.shape[0]

    def run(samples: Tensor, scale: float, zero_point: int, bias: Tensor | None) -> Tensor:
        y = torch.ops.onednn.qlinear_pointwise(
            samples.flatten(0, -2), scale, zero_point, prepacked, weight.scale, _no_zero_points(out_channels), bias,
            1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        return y.view(*samples.shape[:-1], out_channels)

    return run


def int4_geglu_quantize(
    x: Tensor, weight: PackedWeight, quantizer: Quantizer, next_quantizer: Quantizer, bias: Tensor | None
) -> Tensor:
    """As ``reference.int4_geglu_quantize``."""
    product = int4_linear(x, weight, quantizer, bias, None, torch.float32)
    if (functions := compiled.library()) is not None:
        return compiled.geglu_quantize(functions, product, next_quantizer)
    hidden, gate = product.chunk(2, dim=-1)
    return quantize(hidden * F.gelu(gate), with_own_index(next_quantizer), (0, 0))


def int4_conv2d(
    x: Tensor, weight: PackedWeight, quantizer: Quantizer, bias: Tensor | None, channel_add: Tensor | None,
    residual: Tensor | None, stride: tuple[int, int], dilation: tuple[int, int], upsample: bool,
    out_dtype: torch.dtype, with_statistics: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As ``reference.int4_conv2d``."""
    batch, out_channels, kernel_h, kernel_w = x.shape[0], *weight.values.shape[:3]
    size = conv2d_output_size(x.shape[1:3], (kernel_h, kernel_w), stride, dilation, upsample)
    statistics = torch.empty(statistics_shape(batch, size, out_channels, with_statistics), dtype=torch.float32)
    wanted = statistics if with_statistics else None
    if (functions := compiled.gemm(2 * weight.values.numel() * batch * size[0] * size[1])) is not None:
        geometry = (kernel_h, kernel_w, *stride, *dilation, int(upsample))
        out_shape = (batch, *size, out_channels)
        y = _multiply(
            functions, x, weight, quantizer, bias, out_shape, out_dtype, residual, channel_add, wanted, geometry
        )
        return y, statistics
    if upsample:
        # Pixel i of the doubled and then padded image is pixel (i + 1) // 2 of the padded one.
        rows, columns = ((torch.arange(2 * size - 2) + 1) // 2 for size in x.shape[1:3])
        x = x[:, rows][:, :, columns]
    y = _multiply_by_onednn(_convolution_by_onednn(weight, stride, dilation), x, quantizer, weight, bias)
    return _finish(y, out_dtype, channel_add, residual, wanted), statistics


def _convolution_by_onednn(weight: PackedWeight, stride: tuple[int, int], dilation: tuple[int, int]) -> Run:
    prepacked = _prepack(
        weight.values,
        lambda w: torch.ops.onednn.qconv_prepack(
            w.permute(0, 3, 1, 2).contiguous(), weight.scale, 1.0, 128, stride, (0, 0), dilation, 1, None
        ),
    )
    no_zero_points = _no_zero_points(weight.scale.shape[0])

    def run(samples: Tensor, scale: float, zero_point: int, bias: Tensor | None) -> Tensor:
        y = torch.ops.onednn.qconv2d_pointwise(
            samples.permute(0, 3, 1, 2), scale, zero_point, prepacked, weight.scale, no_zero_points, bias, stride,
            (0, 0), dilation, 1, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        return y.permute(0, 2, 3, 1).contiguous()

    return run
