"""Attention on CPUs. The small integers of int8 attention are multiplied in fp32, which is exact for them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dq_kernels.cpu.quantization import mark_not_finite, quantize
from dq_kernels.records import Quantizer
from dq_kernels.shapes import BLOCK_KEYS

ATTENTION_SCORES = 2**24  # in memory at a time: 64 MB, or one head


def attention_quantize(query: Tensor, key: Tensor, value: Tensor, heads: int, quantizer: Quantizer) -> Tensor:
    """As ``reference.attention_quantize``."""
    for x in (query, key):  # PyTorch's attention returns 0 for a query whose scores all are NaN
        mark_not_finite(x, quantizer)
    q, k, v = (x.to(query.dtype).unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    return quantize(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), quantizer, (0, 0))


def int8_attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
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


def _attend(q: Tensor, k: Tensor, v: Tensor, beyond: int) -> Tensor:
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
    query: Tensor, key: Tensor, value: Tensor, heads: int, quantizer: Quantizer, statistics: Tensor | None = None
) -> Tensor:
    """As ``reference.int8_attention_quantize``; the statistics are not read."""
    return quantize(int8_attention(query.float(), key, value, heads), quantizer, (0, 0))


def _quantize_to_127(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """As ``reference.quantize_to_127``, in fp32; the steps of what is not finite are NaN."""
    largest = x.abs().amax(dims, keepdim=True)
    scale = torch.where(largest > 1e-30, largest / 127, 1.0) + largest * 0
    return (x * scale.reciprocal()).add_(0.5).floor_(), scale
