"""The operators on CPUs: exact integers through oneDNN's int8 linear and convolution (VNNI, AMX where there is).

oneDNN multiplies uint8 by int8, so activations are shifted by 128 together with their zero point. It takes one
activation scale a call: samples are grouped by timestep index, of which a batch usually has one. It also wants int8
weights in a layout of its own: that copy is made at a layer's first call, kept for as long as its packed weight lives,
and counted by ``prepacked_bytes``. Attention's small integers are multiplied in fp32, which is exact for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from dq_kernels.attention import BLOCK_KEYS
from dq_kernels.conv2d import statistics_shape
from dq_kernels.gemm import STATISTICS_ROWS
from dq_kernels.packing import unpack_int4
from dq_kernels.quantize import quantized_shape

ATTENTION_SCORES = 2**24  # in memory at a time, 64 MB; those of one head, if it has more


class _Prepacked(NamedTuple):
    weight: torch.Tensor  # oneDNN's layout
    made_from: tuple[int, int]  # address and version of the packed weight


_prepacked_weights = WeakTensorKeyDictionary()


def prepacked_bytes(weights: Iterable[torch.Tensor] | None = None) -> int:
    """Memory that the int8 copies for oneDNN take now, in bytes: of these packed weights, or of all."""
    entries = _prepacked_weights.values() if weights is None else map(_prepacked_weights.get, weights)
    return sum(entry.weight.numel() for entry in entries if entry is not None)


def _prepack(weight: torch.Tensor, prepack: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    # Inference tensors count no versions, and torch forbids to change them in place outside of inference mode.
    made_from = (weight.data_ptr(), 0 if weight.is_inference() else weight._version)
    entry = _prepacked_weights.get(weight)
    if entry is None or entry.made_from != made_from:
        if not torch.backends.mkldnn.is_available():
            raise RuntimeError("dq_kernels on a CPU needs a PyTorch built with oneDNN; this one has none")
        entry = _Prepacked(prepack(unpack_int4(weight)), made_from)
        _prepacked_weights[weight] = entry
    return entry.weight


def _by_timestep(
    x: torch.Tensor, timestep_index: torch.Tensor, num_timesteps: int, run: Callable[[torch.Tensor, int], torch.Tensor]
) -> torch.Tensor:
    """Calls ``run(samples of x, t)`` once for every timestep index t in the batch; puts the results in order again."""
    indices = [min(max(t, 0), num_timesteps - 1) for t in timestep_index.tolist()]
    present = sorted(set(indices))
    if len(present) == 1:
        return run(x, present[0])
    index = torch.tensor(indices)
    parts = {t: run(x[index == t], t) for t in present}
    out = x.new_empty(x.shape[0], *parts[present[0]].shape[1:], dtype=torch.float32)
    for t, part in parts.items():
        out[index == t] = part
    return out


def quantize(
    x: torch.Tensor,
    weight_dilation: torch.Tensor,
    act_scale: torch.Tensor,
    act_zero_point: torch.Tensor,
    timestep_index: torch.Tensor,
    bits: int,
    padding: tuple[int, int],
    skip: torch.Tensor | None,
) -> torch.Tensor:
    """As ``reference.quantize``, in place on one fp32 buffer."""
    x = x if skip is None else torch.cat([x, skip], dim=-1)
    index = timestep_index.clamp(0, act_scale.numel() - 1)
    per_sample = (-1, *[1] * (x.ndim - 1))
    if x.shape[-1] % 2:
        x, weight_dilation = F.pad(x, (0, 1)), F.pad(weight_dilation, (0, 1), value=1.0)
    q = x.float() * weight_dilation.reciprocal()
    q *= act_scale[index].reciprocal().view(per_sample)
    q.add_(0.5).floor_().add_(act_zero_point[index].view(per_sample))
    q.clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    if not any(padding):
        return q.to(torch.int8, memory_format=torch.contiguous_format)
    out = torch.empty(quantized_shape(q.shape, padding), dtype=torch.int8)
    out[:] = act_zero_point[index].clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).view(per_sample)
    height, width = q.shape[1:3]
    out[:, padding[0] : padding[0] + height, padding[1] : padding[1] + width] = q
    return out


def int4_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_sum: torch.Tensor,
    act_scale: torch.Tensor,
    act_zero_point: torch.Tensor,
    timestep_index: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """As ``reference.int4_linear``."""
    out_channels = weight.shape[0]
    prepacked = _prepack(weight, lambda w: torch.ops.onednn.qlinear_prepack(w, None))
    bias = None if bias is None else bias.float()
    no_zero_points = torch.zeros(out_channels, dtype=torch.int32)

    def run(samples: torch.Tensor, t: int) -> torch.Tensor:
        rows = (samples.view(torch.uint8) ^ 0x80).flatten(0, -2)
        y = torch.ops.onednn.qlinear_pointwise(
            rows, float(act_scale[t]), int(act_zero_point[t]) + 128, prepacked, weight_scale, no_zero_points, bias,
            1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        return y.view(*samples.shape[:-1], out_channels)

    y = _by_timestep(x, timestep_index, act_scale.numel(), run)
    if residual is not None:
        y = y + residual
    return y.to(out_dtype)


def int4_linear_quantize(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_sum: torch.Tensor,
    act_scale: torch.Tensor,
    act_zero_point: torch.Tensor,
    timestep_index: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    next_dilation: torch.Tensor,
    next_scale: torch.Tensor,
    next_zero_point: torch.Tensor,
    next_bits: int,
) -> torch.Tensor:
    """As ``reference.int4_linear_quantize``."""
    y = int4_linear(
        x, weight, weight_scale, weight_sum, act_scale, act_zero_point, timestep_index, bias, None, torch.float32
    )
    if activation == "geglu":
        hidden, gate = y.chunk(2, dim=-1)
        y = hidden * F.gelu(gate)
    elif activation == "gelu":
        y = F.gelu(y)
    return quantize(y, next_dilation, next_scale, next_zero_point, timestep_index, next_bits, (0, 0), None)


def int4_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_sum: torch.Tensor,
    act_scale: torch.Tensor,
    act_zero_point: torch.Tensor,
    timestep_index: torch.Tensor,
    bias: torch.Tensor | None,
    channel_add: torch.Tensor | None,
    residual: torch.Tensor | None,
    skip: torch.Tensor | None,
    skip_weight: torch.Tensor | None,
    skip_weight_sum: torch.Tensor | None,
    skip_act_scale: torch.Tensor | None,
    skip_act_zero_point: torch.Tensor | None,
    stride: tuple[int, int],
    dilation: tuple[int, int],
    upsample: bool,
    out_dtype: torch.dtype,
    with_statistics: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``reference.int4_conv2d``."""
    y = _conv2d(x, weight, weight_scale, act_scale, act_zero_point, timestep_index, bias, stride, dilation, upsample)
    if skip is not None:
        assert skip_weight is not None, "ops checks that a skip comes whole"
        assert skip_act_scale is not None
        assert skip_act_zero_point is not None
        y = y + _conv2d(
            skip, skip_weight, weight_scale, skip_act_scale, skip_act_zero_point, timestep_index, None,
            stride, dilation, upsample,
        )  # fmt: skip
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


def _conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    act_scale: torch.Tensor,
    act_zero_point: torch.Tensor,
    timestep_index: torch.Tensor,
    bias: torch.Tensor | None,
    stride: tuple[int, int],
    dilation: tuple[int, int],
    upsample: bool,
) -> torch.Tensor:
    """One source's product and the bias, fp32 [B, OH, OW, N]."""
    if upsample:
        # Pixel i of the doubled and then padded image is pixel (i + 1) // 2 of the padded one.
        rows, columns = ((torch.arange(2 * size - 2) + 1) // 2 for size in x.shape[1:3])
        x = x[:, rows][:, :, columns]
    prepacked = _prepack(
        weight,
        lambda w: torch.ops.onednn.qconv_prepack(
            w.permute(0, 3, 1, 2).contiguous(), weight_scale, 1.0, 128, stride, (0, 0), dilation, 1, None
        ),
    )
    bias = None if bias is None else bias.float()
    no_zero_points = torch.zeros(weight.shape[0], dtype=torch.int32)

    def run(samples: torch.Tensor, t: int) -> torch.Tensor:
        pixels = (samples.view(torch.uint8) ^ 0x80).permute(0, 3, 1, 2)
        y = torch.ops.onednn.qconv2d_pointwise(
            pixels, float(act_scale[t]), int(act_zero_point[t]) + 128, prepacked, weight_scale, no_zero_points, bias,
            stride, (0, 0), dilation, 1, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        return y.permute(0, 2, 3, 1)

    return _by_timestep(x, timestep_index, act_scale.numel(), run)


def group_norm_quantize(
    x: torch.Tensor,
    skip: torch.Tensor | None,
    statistics: torch.Tensor | None,
    skip_statistics: torch.Tensor | None,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    silu: bool,
    weight_dilation: torch.Tensor,
    act_scale: torch.Tensor,
    act_zero_point: torch.Tensor,
    timestep_index: torch.Tensor,
    bits: int,
    padding: tuple[int, int],
) -> torch.Tensor:
    """As ``reference.group_norm_quantize``."""
    # Contiguous, since torch's group norm of channels-last images subtracts squares, which cancels.
    image = (x if skip is None else torch.cat([x, skip], dim=-1)).float().permute(0, 3, 1, 2).contiguous()
    y = F.group_norm(image, num_groups, weight.float(), bias.float(), eps)
    y = (F.silu(y, inplace=True) if silu else y).permute(0, 2, 3, 1)
    return quantize(y, weight_dilation, act_scale, act_zero_point, timestep_index, bits, padding, None)


def layer_norm_quantize(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    weight_dilation: torch.Tensor,
    act_scale: torch.Tensor,
    act_zero_point: torch.Tensor,
    timestep_index: torch.Tensor,
    bits: int,
) -> torch.Tensor:
    """As ``reference.layer_norm_quantize``."""
    weight, bias = (None if parameter is None else parameter.float() for parameter in (weight, bias))
    y = F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps)
    return quantize(y, weight_dilation, act_scale, act_zero_point, timestep_index, bits, (0, 0), None)


def int8_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int) -> torch.Tensor:
    """As ``reference.int8_attention``."""
    (batch, length, _), key_length = query.shape, key.shape[1]
    key_mean, value_mean = (x.mean(1, keepdim=True, dtype=torch.float32) for x in (key, value))
    key, value = key.float() - key_mean, value.float() - value_mean
    q, k, v = (x.float().unflatten(-1, (heads, -1)).transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    num_blocks = -(-key_length // BLOCK_KEYS)
    beyond = num_blocks * BLOCK_KEYS - key_length
    k, v = (F.pad(x, (0, 0, 0, beyond)).unflatten(1, (num_blocks, BLOCK_KEYS)) for x in (k, v))
    heads_at_once = max(1, ATTENTION_SCORES // (max(1, length) * num_blocks * BLOCK_KEYS))
    shares = zip(q.split(heads_at_once), k.split(heads_at_once), v.split(heads_at_once), strict=True)
    y = torch.cat([_attend(*share, beyond) for share in shares])
    return (y.unflatten(0, (batch, heads)).transpose(1, 2).flatten(2) + value_mean).to(query.dtype).contiguous()


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, beyond: int) -> torch.Tensor:
    """Some heads: q [heads, L, D]; k, v [heads, blocks, keys, D], of which the last ``beyond`` keys do not count."""
    q8, q_scale = _quantize_to_127(q, (-1,))
    (k8, k_scale), (v8, v_scale) = (_quantize_to_127(x, (-2, -1)) for x in (k, v))
    p = (q8 @ k8.flatten(1, 2).mT).unflatten(-1, k.shape[1:3])  # [heads, L, blocks, keys]
    p *= q_scale[..., None] * k_scale.transpose(1, 2) * q.shape[-1] ** -0.5
    if beyond:
        p[:, :, -1, -beyond:] = -torch.inf
    so_far = p.amax(-1, keepdim=True).cummax(2).values
    p.sub_(so_far).exp_()
    fade = torch.exp(so_far - so_far[:, :, -1:])
    total = (p.sum(-1, keepdim=True) * fade).sum(2)
    p.mul_(255).add_(0.5).floor_().mul_(fade * (v_scale.transpose(1, 2) / 255))
    return p.flatten(2) @ v8.flatten(1, 2) / total


def int8_attention_quantize(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    heads: int,
    weight_dilation: torch.Tensor,
    act_scale: torch.Tensor,
    act_zero_point: torch.Tensor,
    timestep_index: torch.Tensor,
    bits: int,
) -> torch.Tensor:
    """As ``reference.int8_attention_quantize``."""
    y = int8_attention(query.float(), key, value, heads)
    return quantize(y, weight_dilation, act_scale, act_zero_point, timestep_index, bits, (0, 0), None)


def _quantize_to_127(x: torch.Tensor, dims: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``reference.quantize_to_127``, in fp32; the steps of what is not finite are NaN."""
    largest = x.abs().amax(dims, keepdim=True)
    scale = torch.where(largest > 1e-30, largest / 127, 1.0) + largest * 0
    return (x * scale.reciprocal()).add_(0.5).floor_(), scale
