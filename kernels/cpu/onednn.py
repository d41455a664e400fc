"""INT4 layers on CPUs: exact integers through oneDNN's int8 linear and convolution (VNNI, AMX where there is).

oneDNN multiplies uint8 by int8, so activations are shifted by 128 together with their zero point. It takes one
activation scale per call, so samples are grouped by timestep index; most batches have one. It needs int8 weights in a
layout of its own: this copy is made at a layer's first call, lives as long as the packed weight, and is counted by
``prepacked_bytes``.

Without VNNI, oneDNN adds pairs of products in int16, which saturates if weights exceed 64 in magnitude. 4-bit values
are therefore exact on every processor; their multiples by 16, which the Triton kernels use, would not be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from dq_kernels.cpu.quantization import quantize
from dq_kernels.packing import unpack_int4
from dq_kernels.records import PackedWeight, Quantizer
from dq_kernels.shapes import STATISTICS_ROWS, statistics_shape


class _Prepacked(NamedTuple):
    values: Tensor  # oneDNN's layout
    made_from: tuple[int, int]  # address and version of the packed values


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


def _prepack(values: Tensor, prepack: Callable[[Tensor], Tensor]) -> Tensor:
    # Inference tensors have no version counter; torch forbids in-place changes outside of inference mode.
    made_from = (values.data_ptr(), 0 if values.is_inference() else values._version)
    entry = _prepacked_weights.get(values)
    if entry is None or entry.made_from != made_from:
        if not torch.backends.mkldnn.is_available():
            raise RuntimeError("dq_kernels on a CPU needs a PyTorch built with oneDNN; this one has none")
        entry = _Prepacked(prepack(unpack_int4(values)), made_from)
        _prepacked_weights[values] = entry
    return entry.values


def _by_timestep(x: Tensor, quantizer: Quantizer, run: Callable[[Tensor, float, int], Tensor]) -> Tensor:
    """Calls ``run(samples of x, scale, zero point)`` once for every timestep in the batch; keeps the samples' order."""
    most = quantizer.scale.numel() - 1
    indices = [min(max(t, 0), most) for t in quantizer.timestep_index.tolist()]
    present = sorted(set(indices))
    tables = {t: (float(quantizer.scale[t]), int(quantizer.zero_point[t])) for t in present}
    if len(present) == 1:
        return run(x, *tables[present[0]])
    index = torch.tensor(indices)
    parts = {t: run(x[index == t], *tables[t]) for t in present}
    out = x.new_empty(x.shape[0], *parts[present[0]].shape[1:], dtype=torch.float32)
    for t, part in parts.items():
        out[index == t] = part
    return out


def int4_linear(
    x: Tensor, weight: PackedWeight, quantizer: Quantizer, bias: Tensor | None, residual: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """As ``reference.int4_linear``."""
    out_channels = weight.scale.numel()
    prepacked = _prepack(weight.values, lambda w: torch.ops.onednn.qlinear_prepack(w, None))
    bias = None if bias is None else bias.float()
    no_zero_points = torch.zeros(out_channels, dtype=torch.int32)

    def run(samples: Tensor, scale: float, zero_point: int) -> Tensor:
        rows = (samples.view(torch.uint8) ^ 0x80).flatten(0, -2)
        y = torch.ops.onednn.qlinear_pointwise(
            rows, scale, zero_point + 128, prepacked, weight.scale, no_zero_points, bias,
            1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        return y.view(*samples.shape[:-1], out_channels)

    y = _by_timestep(x, quantizer, run)
    if residual is not None:
        y = y + residual
    return y.to(out_dtype)


def int4_geglu_quantize(
    x: Tensor, weight: PackedWeight, quantizer: Quantizer, next_quantizer: Quantizer, bias: Tensor | None
) -> Tensor:
    """As ``reference.int4_geglu_quantize``."""
    hidden, gate = int4_linear(x, weight, quantizer, bias, None, torch.float32).chunk(2, dim=-1)
    return quantize(hidden * F.gelu(gate), next_quantizer, (0, 0), None)


def int4_conv2d(
    x: Tensor, weight: PackedWeight, quantizer: Quantizer, bias: Tensor | None, channel_add: Tensor | None,
    residual: Tensor | None, stride: tuple[int, int], dilation: tuple[int, int], upsample: bool,
    out_dtype: torch.dtype, with_statistics: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As ``reference.int4_conv2d``."""
    if upsample:
        # Pixel i of the doubled and then padded image is pixel (i + 1) // 2 of the padded one.
        rows, columns = ((torch.arange(2 * size - 2) + 1) // 2 for size in x.shape[1:3])
        x = x[:, rows][:, :, columns]
    prepacked = _prepack(
        weight.values,
        lambda w: torch.ops.onednn.qconv_prepack(
            w.permute(0, 3, 1, 2).contiguous(), weight.scale, 1.0, 128, stride, (0, 0), dilation, 1, None
        ),
    )
    bias = None if bias is None else bias.float()
    no_zero_points = torch.zeros(weight.scale.numel(), dtype=torch.int32)

    def run(samples: Tensor, scale: float, zero_point: int) -> Tensor:
        pixels = (samples.view(torch.uint8) ^ 0x80).permute(0, 3, 1, 2)
        y = torch.ops.onednn.qconv2d_pointwise(
            pixels, scale, zero_point + 128, prepacked, weight.scale, no_zero_points, bias,
            stride, (0, 0), dilation, 1, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        return y.permute(0, 2, 3, 1)

    y = _by_timestep(x, quantizer, run)
    if channel_add is not None:
        y = y + channel_add[:, None, None, :]
    if residual is not None:
        y = y + residual
    y = y.to(out_dtype).contiguous()
    statistics = torch.empty(statistics_shape(y.shape[0], y.shape[1:3], y.shape[3], with_statistics))
    if with_statistics:
        runs = y.float().reshape(y.shape[0], -1, STATISTICS_ROWS, y.shape[3])
        statistics[:, :, 0] = runs.sum(2)
        statistics[:, :, 1] = runs.var(2, correction=0) * STATISTICS_ROWS
    return y, statistics
