"""Fused forwards of diffusers' transformers: subclasses that change nothing but ``forward`` (see ``fused_blocks``)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from dq_kernels import ops
from dq_runtime.adapters import (
    Adapters,
    adapters_of,
    add_adapters,
    is_dropout,
    run_as_made,
    unwrapped,
)
from dq_runtime.attention import Int8AttnProcessor, float_attention, has_few_keys, in_int8
from dq_runtime.forward_state import ForwardState, LinearGroup
from dq_runtime.gradients import wants_gradient
from dq_runtime.layers import QuantLinear


def layer_norm(norm: Any) -> nn.LayerNorm:
    """A block's norm, which ``can_fuse`` has found to be a layer norm; diffusers annotates it as an adaptive one."""
    return norm


class FusedBasicTransformerBlock(BasicTransformerBlock):
    """Layer norm + quantize, one GEMM for q, k, v, residuals in the epilogues, GEGLU + quantize in one epilogue."""

    state: ForwardState
    self_attention: LinearGroup

    @staticmethod
    def can_fuse(block: Any) -> bool:
        """True if this forward supports the block's options."""
        attentions = [block.attn1] + ([block.attn2] if block.attn2 is not None else [])
        norms = [block.norm1, block.norm3] + ([block.norm2] if block.attn2 is not None else [])
        return (
            block.norm_type == "layer_norm"
            and block.pos_embed is None
            and not block.only_cross_attention
            and block._chunk_size is None
            and getattr(block, "fuser", None) is None
            and all(isinstance(norm, nn.LayerNorm) for norm in norms)
            and all(_plain(attention) for attention in attentions)
            and _is_geglu(block.ff.net)
        )

    def _adapters_now(self, x: torch.Tensor) -> Adapters | None:
        """The adapters to add; None if the block cannot run fused in this call."""
        if self.training or wants_gradient(x) or not self.can_fuse(self):
            return None
        net: Any = self.ff.net
        layers: list[Any] = [net[0].proj, net[2]]
        dropouts: list[Any] = [net[1]]
        others: list[Any] = [self.ff, net[0], self.norm1, self.norm3]
        for attention in (self.attn1, self.attn2):
            if attention is not None:
                out: Any = attention.to_out
                layers += [attention.to_q, attention.to_k, attention.to_v, out[0]]
                dropouts.append(out[1])
                others.append(attention)
                if type(attention.processor) not in (AttnProcessor2_0, Int8AttnProcessor):
                    return None
        if self.attn2 is not None:
            others.append(self.norm2)
        if any(dropout.training for dropout in dropouts) or not run_as_made((*layers, *dropouts, *others)):
            return None
        members = [unwrapped(layer) for layer in (self.attn1.to_q, self.attn1.to_k, self.attn1.to_v)]
        return adapters_of(layers) if members == self.self_attention.layers else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        timestep: Any = None,
        cross_attention_kwargs: Any = None,
        class_labels: Any = None,
        added_cond_kwargs: Any = None,
    ) -> torch.Tensor:
        """As ``BasicTransformerBlock.forward``."""
        adapters = self._adapters_now(hidden_states)
        if (
            attention_mask is not None
            or encoder_attention_mask is not None
            or cross_attention_kwargs
            or adapters is None
            or not (encoder_hidden_states is None or _fits(encoder_hidden_states, hidden_states))
        ):
            return super().forward(
                hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep,
                cross_attention_kwargs, class_labels, added_cond_kwargs,
            )  # fmt: skip
        x, dtype = hidden_states, hidden_states.dtype
        attention: Any = self.attn1
        q = unwrapped(attention.to_q).layer_norm_quantize(x, layer_norm(self.norm1))
        active = [adapters.get(layer, []) for layer in (attention.to_q, attention.to_k, attention.to_v)]
        if in_int8(attention) and x.shape[1] > ops.FEW_KEYS and not (any(active) or x.is_cpu):
            projected, statistics = self.self_attention.multiply_with_statistics(q, dtype)
        else:
            projected, statistics = self.self_attention.multiply(q, dtype), None
        if any(active):
            add_adapters(active, self.self_attention.sizes, self.norm1(x), projected)
        query, key, value = projected.chunk(3, dim=-1)
        x = _attend(attention, query, key, value, x, adapters, statistics)
        if self.attn2 is not None:
            attention = self.attn2
            to_q = unwrapped(attention.to_q)
            query = to_q.multiply(to_q.layer_norm_quantize(x, layer_norm(self.norm2)), dtype)
            if attention.to_q in adapters:
                add_adapters([adapters[attention.to_q]], [query.shape[-1]], self.norm2(x), query)
            if encoder_hidden_states is None:
                normed = self.norm2(x)
                key, value = attention.to_k(normed), attention.to_v(normed)
            else:
                key, value = (
                    self._of_encoder(layer, encoder_hidden_states) for layer in (attention.to_k, attention.to_v)
                )
            x = _attend(attention, query, key, value, x, adapters)
        return self._feed_forward(x, adapters)

    def _feed_forward(self, x: torch.Tensor, adapters: Adapters) -> torch.Tensor:
        """x plus the feed forward of its norm, in int8 if nothing but a quantized layer reads it.

        With adapters, the result of GEGLU is needed in floating point.
        """
        net: Any = self.ff.net
        reader = self.state.int8_readers.pop(self, None)
        first, second = net[0].proj, net[2]
        up, down = unwrapped(first), unwrapped(second)
        q = up.layer_norm_quantize(x, layer_norm(self.norm3))
        if not (adapters and (first in adapters or second in adapters)):
            return down.multiply(up.geglu_quantize(q, down), x.dtype, x, reader)
        h = up.multiply(q, x.dtype)
        if first in adapters:
            add_adapters([adapters[first]], [h.shape[-1]], self.norm3(x), h)
        values, gates = h.chunk(2, dim=-1)
        h = values * F.gelu(gates)
        y = down.multiply(down.quantize(h), x.dtype, x)
        if second in adapters:
            add_adapters([adapters[second]], [y.shape[-1]], h, y)
        return y

    def _of_encoder(self, layer: Any, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
        group = self.state.groups.get("encoder_hidden_states")
        return layer(encoder_hidden_states) if group is None else group.result(layer, encoder_hidden_states)


def _fits(encoder_hidden_states: torch.Tensor, hidden_states: torch.Tensor) -> bool:
    """True if the prompt has the samples of the hidden states (diffusers reports others), and needs no gradient."""
    return encoder_hidden_states.shape[0] == hidden_states.shape[0] and not wants_gradient(encoder_hidden_states)


def _plain(attention: Any) -> bool:
    """True if an attention is scaled dot products and four projections only."""
    return (
        attention.group_norm is None
        and attention.spatial_norm is None
        and attention.norm_q is None
        and attention.norm_k is None
        and not attention.norm_cross
        and not attention.residual_connection
        and attention.rescale_output_factor == 1
        and attention.added_kv_proj_dim is None
        and all(type(unwrapped(layer)) is QuantLinear for layer in (attention.to_out[0], attention.to_q))
        and is_dropout(attention.to_out[1])
    )


def _is_geglu(net: Any) -> bool:
    """True if a feed forward is GEGLU and a projection, quantized, of sizes that the kernels support."""
    if len(net) != 3 or type(net[0]) is not GEGLU or not is_dropout(net[1]):
        return False
    up, out = unwrapped(net[0].proj), unwrapped(net[2])
    return (
        type(up) is type(out) is QuantLinear
        and up.in_features % 2 == out.in_features % 2 == 0
        and up.in_features <= ops.MAX_LAYER_NORM_CHANNELS
    )


def _attend(
    attention: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    residual: torch.Tensor,
    adapters: Adapters,
    statistics: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention over [B, tokens, heads x d], its output projection, and the residual.

    The statistics are those of query, key and value, from ``multiply_with_statistics``.
    """
    layer = attention.to_out[0]
    out, active = unwrapped(layer), adapters.get(layer)
    if active is None and not out.is_dynamic and (in_int8(attention) or has_few_keys(attention, key)):
        quantizer = out.quantizer(query)
        if in_int8(attention):
            of_key_value = None if statistics is None else statistics[..., query.shape[-1] :]
            mixed = ops.int8_attention_quantize(query, key, value, attention.heads, quantizer, of_key_value)
        else:
            mixed = ops.attention_quantize(query, key, value, attention.heads, quantizer)
        return out.multiply(mixed, query.dtype, residual)
    attend = ops.int8_attention if in_int8(attention) else float_attention
    mixed = attend(query, key, value, attention.heads)
    y = out.multiply(out.quantize(mixed), query.dtype, residual)
    if active is not None:
        add_adapters([active], [y.shape[-1]], mixed, y)
    return y


class FusedTransformer2DModel(Transformer2DModel):
    """Group norm + quantize + projection to tokens; projection back to the image with the residual; channels last."""

    state: ForwardState

    @staticmethod
    def can_fuse(block: Any) -> bool:
        """True if this forward supports the block's options."""
        norm = block.norm if block.is_input_continuous else None
        return isinstance(norm, nn.GroupNorm) and norm.num_channels % 2 == 0

    def _adapters_now(self, x: torch.Tensor) -> Adapters | None:
        """The adapters to add; None if the projections cannot run fused in this call."""
        layers = (self.proj_in, self.proj_out)
        if wants_gradient(x) or not self.can_fuse(self) or not run_as_made((*layers, self.norm)):
            return None
        return adapters_of(layers)

    def _operate_on_continuous_inputs(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, int]:
        adapters = self._adapters_now(hidden_states)
        if adapters is None:
            return super()._operate_on_continuous_inputs(hidden_states)
        last: Any = self.transformer_blocks[-1]
        if self.proj_out not in adapters and run_as_made((last,)):
            self.state.int8_readers[last] = unwrapped(self.proj_out)
        statistics = self.state.recall(hidden_states)
        proj_in = unwrapped(self.proj_in)
        image = hidden_states.permute(0, 2, 3, 1)
        q, _ = proj_in.group_norm_quantize(image, self.norm, silu=False, statistics=statistics)
        tokens = proj_in.multiply(q.flatten(1, 2), hidden_states.dtype)
        if self.proj_in in adapters:
            normed = self.norm(hidden_states).permute(0, 2, 3, 1)
            add_adapters([adapters[self.proj_in]], [tokens.shape[-1]], normed, tokens)
        return tokens, tokens.shape[-1]

    def _get_output_for_continuous_inputs(
        self,
        hidden_states: torch.Tensor,
        residual: torch.Tensor,
        batch_size: int,
        height: int,
        width: int,
        inner_dim: int,
    ) -> torch.Tensor:
        adapters = self._adapters_now(hidden_states)
        if adapters is None:
            return super()._get_output_for_continuous_inputs(
                hidden_states, residual, batch_size, height, width, inner_dim
            )
        proj_out = unwrapped(self.proj_out)
        q = hidden_states if hidden_states.dtype == torch.int8 else proj_out.quantize(hidden_states)
        q, dtype, residual = q.unflatten(1, (height, width)), residual.dtype, residual.permute(0, 2, 3, 1)
        if self.proj_out in adapters:
            residual = residual.clone(memory_format=torch.contiguous_format)
            add_adapters([adapters[self.proj_out]], [residual.shape[-1]], hidden_states, residual)
        y, statistics = proj_out.convolve(q, dtype, residual=residual)
        return self.state.remember(y.permute(0, 3, 1, 2), statistics)
