"""Attention in int8, including the softmax, as a diffusers attention processor; it needs no calibration."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.hooks._helpers import AttentionProcessorRegistry
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from dq_kernels import ops


class Int8AttnProcessor(AttnProcessor2_0):
    """``AttnProcessor2_0`` with ``ops.int8_attention`` between the projections.

    An attention that the operator does not support (see ``reason_against_int8``; a mask, a gradient) runs in floating
    point. ``DilateQuantConfig.int8_attention`` selects it; diffusers' ``set_processor`` also sets it, on any attention
    that has ``AttnProcessor2_0``.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As ``AttnProcessor2_0.__call__``: [B, tokens, channels] or [B, channels, H, W], in and out.

        Raises:
            ValueError: for an attention with added keys and values, which needs another processor.
        """
        if attn.added_kv_proj_dim is not None:
            raise ValueError(
                "Int8AttnProcessor does not support added keys and values: call "
                "set_processor(AttnAddedKVProcessor2_0()) on attentions that have them"
            )
        if attention_mask is not None or reason_against_int8(attn) is not None or _is_intercepted():
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)
        tokens = hidden_states
        if attn.spatial_norm is not None:
            tokens = attn.spatial_norm(tokens, temb)
        if hidden_states.ndim == 4:
            tokens = tokens.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            tokens = attn.group_norm(tokens.transpose(1, 2)).transpose(1, 2)
        context = tokens
        if encoder_hidden_states is not None:
            context = encoder_hidden_states
            if attn.norm_cross:
                context = attn.norm_encoder_hidden_states(context)
        projected = attn.to_q(tokens), attn.to_k(context), attn.to_v(context)
        # Not wants_gradient: it is False under torch.compile, and a compiled attention may be trained.
        differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in projected)
        known = projected[0].dtype in ops.COMPUTE_DTYPES
        attend = ops.int8_attention if known and not differentiable else float_attention
        out: Any = attn.to_out
        tokens = out[1](out[0](attend(*projected, attn.heads)))
        if hidden_states.ndim == 4:
            tokens = tokens.transpose(1, 2).unflatten(2, hidden_states.shape[2:])
        if attn.residual_connection:
            tokens = tokens + hidden_states
        return tokens / attn.rescale_output_factor


# diffusers' layer skip finds processors by their classes.
AttentionProcessorRegistry.register(Int8AttnProcessor, replace(AttentionProcessorRegistry.get(AttnProcessor2_0)))


def _is_intercepted() -> bool:
    """True if a mode may replace PyTorch's attention, as diffusers' ``skip_attention_scores`` does."""
    if torch.compiler.is_compiling():
        return False
    return any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())


def float_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v in PyTorch: query [B, L, H D], key and value [B, S, H D] -> [B, L, H D]."""
    per_head = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(*per_head).transpose(1, 2).flatten(2)


def has_few_keys(attention: Any, key: torch.Tensor) -> bool:
    """True if ``ops.attention_quantize`` supports an attention to these keys, and nothing replaces PyTorch's."""
    return (
        key.shape[1] <= ops.MAX_FLOAT_KEYS
        and attention.inner_dim == attention.inner_kv_dim
        and attention.inner_dim // attention.heads <= ops.MAX_FLOAT_HEAD_CHANNELS
        and attention.inner_dim % 2 == 0
        and not _is_intercepted()
    )


def reason_against_int8(attention: Any) -> str | None:
    """The reason why an attention cannot run in int8; None if it can."""
    if attention.added_kv_proj_dim is not None:
        return "added keys and values"
    head_channels = attention.inner_dim // attention.heads
    if head_channels > ops.MAX_HEAD_CHANNELS:
        return f"heads of more than {ops.MAX_HEAD_CHANNELS} channels"
    if attention.inner_dim != attention.inner_kv_dim:
        return "keys of fewer heads than queries"
    if attention.norm_q is not None or attention.norm_k is not None:
        return "norms of queries and keys"
    return None


def in_int8(attention: Any) -> bool:
    """True if an attention has ``Int8AttnProcessor`` and can run in int8."""
    return type(attention.processor) is Int8AttnProcessor and reason_against_int8(attention) is None
