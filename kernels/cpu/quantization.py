"""Quantization on CPUs, alone and behind norms: one pass if there is a C++ compiler, otherwise plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dq_kernels.cpu import compiled
from dq_kernels.records import Norm, Quantizer
from dq_kernels.shapes import quantized_shape


def quantize(x: Tensor, quantizer: Quantizer, padding: tuple[int, int]) -> Tensor:
    """As ``reference.quantize``."""
    if (functions := compiled.library()) is not None:
        return compiled.quantize(functions, x, quantizer, padding)
    dilation, scale, zero_point, timestep_index, bits = quantizer
    if mark_not_finite(x, quantizer):
        x = x.nan_to_num()
    index = torch.maximum(timestep_index, ~timestep_index).clamp(max=scale.numel() - 1)
    per_sample = (-1, *[1] * (x.ndim - 1))
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if x.shape[-1] % 2:
        x, dilation = F.pad(x, (0, 1)), F.pad(dilation, (0, 1), value=1.0)
    q = x.float() * dilation.reciprocal()
    q *= scale[index].reciprocal().view(per_sample)
    q.add_(0.5).floor_().add_(zero_point[index].view(per_sample))
    q.clamp_(low, high)
    if not any(padding):
        return q.to(torch.int8, memory_format=torch.contiguous_format)
    out = torch.empty(quantized_shape(q.shape, padding), dtype=torch.int8)
    out[:] = zero_point[index].clamp(low, high).view(per_sample)
    height, width = q.shape[1:3]
    out[:, padding[0] : padding[0] + height, padding[1] : padding[1] + width] = q
    return out


def mark_not_finite(x: Tensor, quantizer: Quantizer) -> bool:
    """Makes the timestep index t of samples of x [B, ...] that are not finite ~t; True if there are any.

    t is not lost, so a batch is split by its timesteps (see ``onednn``) as it would be without them.
    """
    values = tuple(range(1, x.ndim))
    lost = (x.amax(values) * 0 + x.amin(values) * 0).isnan()  # several times as fast as isfinite
    index = quantizer.timestep_index
    index.copy_(torch.where(lost, torch.minimum(index, ~index), index))
    return bool(lost.any())


def group_norm_quantize(
    x: Tensor, num_groups: int, norm: Norm, quantizer: Quantizer, silu: bool, skip: Tensor | None,
    statistics: Tensor | None, skip_statistics: Tensor | None, padding: tuple[int, int],
    plain_quantizer: Quantizer | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As ``reference.group_norm_quantize``."""
    if (functions := compiled.library()) is not None:
        return compiled.group_norm_quantize(
            functions, x, num_groups, norm, quantizer, silu, skip, statistics, skip_statistics, padding, plain_quantizer
        )
    image = (x if skip is None else torch.cat([x, skip], dim=-1)).float()
    # Contiguous, since torch's group norm of channels-last images subtracts squares, which cancels.
    y = F.group_norm(image.permute(0, 3, 1, 2).contiguous(), num_groups, *_float(norm))
    q = quantize((F.silu(y, inplace=True) if silu else y).permute(0, 2, 3, 1), quantizer, padding)
    if plain_quantizer is None:
        return q, torch.empty(0, *image.shape[1:], dtype=torch.int8)
    return q, quantize(image, with_own_index(plain_quantizer), (0, 0))


def layer_norm_quantize(x: Tensor, norm: Norm, quantizer: Quantizer) -> Tensor:
    """As ``reference.layer_norm_quantize``."""
    if (functions := compiled.library()) is not None:
        return compiled.layer_norm_quantize(functions, x, norm, quantizer)
    y = F.layer_norm(x.float(), x.shape[-1:], *_float(norm))
    return quantize(y, quantizer, (0, 0))


def with_own_index(quantizer: Quantizer) -> Quantizer:
    """A quantizer that writes into no other index: for operators that must change none."""
    return quantizer._replace(timestep_index=quantizer.timestep_index.clone())


def _float(norm: Norm) -> Norm:
    weight, bias = (None if parameter is None else parameter.float() for parameter in (norm.weight, norm.bias))
    return Norm(weight, bias, norm.eps)
