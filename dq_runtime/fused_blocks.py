"""Fused forwards of diffusers' blocks: subclasses that change nothing but ``forward``.

Activations stay int8 between kernels: a norm writes the next layer's quantized input, a GEMM's epilogue adds time
embedding and residual or applies GEGLU, an up block reads its two sources without a concat. LoRA adapters read the
floating-point input of their layer, computed again if need be. ``can_fuse`` is True if the fused forward supports a
block's options. A block that cannot run fused in a call (other attention processor, mask, hook, offloaded weights,
gradient) runs diffusers' own forward. ``fused.fuse`` installs these classes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import Timesteps
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import CrossAttnUpBlock2D, UpBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from dq_kernels import ops
from dq_runtime.adapters import (
    Adapter,
    Adapters,
    active_adapters,
    adapters_of,
    add_adapters,
    residual_with_adapters,
    run_as_made,
    unwrapped,
)
from dq_runtime.attention import Int8AttnProcessor, float_attention, has_few_keys, in_int8
from dq_runtime.forward_state import ForwardState, LinearGroup, same_quantizer
from dq_runtime.gradients import wants_gradient
from dq_runtime.layers import QuantConv2d, QuantLinear


def layer_norm(norm: Any) -> nn.LayerNorm:
    """A block's norm, which ``can_fuse`` has found to be a layer norm; diffusers annotates it as an adaptive one."""
    return norm


class FusedResnetBlock2D(ResnetBlock2D):
    """Group norm + SiLU + quantize, conv + time embedding + statistics, norm again, conv + residual."""

    state: ForwardState
    conv1: QuantConv2d
    conv2: QuantConv2d
    conv_shortcut: QuantConv2d | None

    @staticmethod
    def can_fuse(block: Any) -> bool:
        """True if this forward supports the block's options."""
        return (
            block.upsample is None
            and block.downsample is None
            and block.time_embedding_norm in ("default", "group")
            and (block.time_embedding_norm == "default" or block.time_emb_proj is None)  # "group": autoencoders
            and not block.skip_time_act
            and block.output_scale_factor == 1
            and isinstance(block.nonlinearity, nn.SiLU)
            and isinstance(block.norm1, nn.GroupNorm)
            and isinstance(block.norm2, nn.GroupNorm)
            and block.norm1.num_channels % 2 == block.norm2.num_channels % 2 == 0
            and (block.conv_shortcut is None or unwrapped(block.conv_shortcut).kernel_size == (1, 1))
        )

    def _adapters_now(self, x: torch.Tensor) -> Adapters | None:
        """The adapters to add; None if the block cannot run fused in this call."""
        convolutions = [self.conv1, self.conv2]
        if self.conv_shortcut is not None:
            convolutions.append(self.conv_shortcut)
        if self.training or wants_gradient(x) or not run_as_made((*convolutions, self.norm1, self.norm2)):
            return None
        return adapters_of(convolutions)

    def forward(
        self, input_tensor: torch.Tensor, temb: Any, *args: Any, skip: Any = None, **kwargs: Any
    ) -> torch.Tensor:
        """As ``ResnetBlock2D.forward`` of the concat of ``input_tensor`` and ``skip``."""
        if skip is not None and skip.shape[1] % 2:
            input_tensor, skip = torch.cat([input_tensor, skip], dim=1), None
        adapters = self._adapters_now(input_tensor)
        if adapters is None:
            joined = input_tensor if skip is None else torch.cat([input_tensor, skip], dim=1)
            return super().forward(joined, temb, *args, **kwargs)
        dtype = input_tensor.dtype
        statistics, skip_statistics = self.state.recall(input_tensor), self.state.recall(skip)
        x = input_tensor.permute(0, 2, 3, 1)
        skip = None if skip is None else skip.permute(0, 2, 3, 1)
        conv1, conv2 = unwrapped(self.conv1), unwrapped(self.conv2)
        shortcut = None if self.conv_shortcut is None else unwrapped(self.conv_shortcut)
        q, shortcut_q = conv1.group_norm_quantize(
            x, self.norm1, skip=skip, statistics=statistics, skip_statistics=skip_statistics, padding=conv1.padding,
            shortcut=shortcut,
        )  # fmt: skip
        added = self._added(adapters, self.conv1, self.norm1, x, skip) if adapters else None
        h, statistics = conv1.convolve(q, dtype, channel_add=self._time_embedding(temb), residual=added)
        q, _ = conv2.group_norm_quantize(
            h, self.norm2, statistics=statistics if statistics.numel() else None, padding=conv2.padding
        )
        residual = x
        if shortcut is not None:
            residual = shortcut.multiply(shortcut_q, dtype)
            if self.conv_shortcut in adapters:
                image = x if skip is None else torch.cat([x, skip], dim=-1)
                add_adapters([adapters[self.conv_shortcut]], [residual.shape[-1]], image, residual)
        if adapters:
            residual = self._added(adapters, self.conv2, self.norm2, h, residual=residual)
        y, statistics = conv2.convolve(q, dtype, residual=residual)
        return self.state.remember(y.permute(0, 3, 1, 2), statistics)

    def _time_embedding(self, temb: torch.Tensor | None) -> torch.Tensor | None:
        projection: Any = self.time_emb_proj
        if temb is None or projection is None:
            return None
        group = self.state.groups.get("time_emb_proj")
        return projection(self.nonlinearity(temb)) if group is None else group.result(projection, temb)

    def _added(
        self, adapters: Adapters, conv: Any, norm: Any, x: torch.Tensor, skip: Any = None, residual: Any = None
    ) -> Any:
        """The residual plus the products of a convolution's adapters of x and skip [B, H, W, K], normalized."""
        if conv not in adapters:
            return residual
        image = x if skip is None else torch.cat([x, skip], dim=-1)
        image = self.nonlinearity(norm(image.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        return residual_with_adapters(adapters[conv], image, residual)


class FusedBasicTransformerBlock(BasicTransformerBlock):
    """Layer norm + quantize, one GEMM for q, k, v, residuals in the epilogues, GEGLU + quantize in one epilogue."""

    state: ForwardState
    self_attention: LinearGroup

    @staticmethod
    def can_fuse(block: Any) -> bool:
        """True if this forward supports the block's options."""
        attentions = [block.attn1] + ([block.attn2] if block.attn2 is not None else [])
        gate, _, out = block.ff.net[0], block.ff.net[1], block.ff.net[2]
        return (
            block.norm_type == "layer_norm"
            and block.pos_embed is None
            and not block.only_cross_attention
            and block._chunk_size is None
            and getattr(block, "fuser", None) is None
            and all(isinstance(norm, nn.LayerNorm) for norm in (block.norm1, block.norm3))
            and (block.attn2 is None or isinstance(block.norm2, nn.LayerNorm))
            and all(_plain(attention) for attention in attentions)
            and same_quantizer([block.attn1.to_q, block.attn1.to_k, block.attn1.to_v])
            and len(block.ff.net) == 3
            and type(gate) is GEGLU
            and type(unwrapped(gate.proj)) is QuantLinear
            and type(unwrapped(out)) is QuantLinear
            and gate.proj.in_features % 2 == 0
            and gate.proj.in_features <= ops.MAX_LAYER_NORM_CHANNELS
            and out.in_features % 2 == 0
        )

    def _adapters_now(self, x: torch.Tensor) -> Adapters | None:
        """The adapters to add; None if the block cannot run fused in this call."""
        net: Any = self.ff.net
        layers: list[Any] = [net[0].proj, net[2]]
        others: list[Any] = [self.ff, net[0], self.norm1, self.norm3]
        for attention in (self.attn1, self.attn2):
            if attention is not None:
                layers += [attention.to_q, attention.to_k, attention.to_v, attention.to_out[0]]
                others.append(attention)
                if type(attention.processor) not in (AttnProcessor2_0, Int8AttnProcessor):
                    return None
        if self.attn2 is not None:
            others.append(self.norm2)
        if self.training or wants_gradient(x) or not run_as_made((*layers, *others)):
            return None
        return adapters_of(layers)

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
        and type(unwrapped(attention.to_out[0])) is QuantLinear
        and type(unwrapped(attention.to_q)) is QuantLinear
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
        if wants_gradient(x) or not run_as_made((*layers, self.norm)):
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


class FusedTimesteps(Timesteps):
    """The sinusoids of all channels at once: sin(t frequency + phase), with frequencies that are computed once."""

    waves: torch.Tensor  # [2, channels] fp32, frequencies and phases; no buffer, which a cast of the model would change

    @staticmethod
    def can_fuse(block: Any) -> bool:
        """True if this forward supports the block's options."""
        return bool(block.num_channels % 2 == 0)

    def waves_on(self, device: torch.device) -> torch.Tensor:
        """The waves of ``diffusers.models.embeddings.get_timestep_embedding``."""
        half = self.num_channels // 2
        exponent = (
            -math.log(10000)
            / (half - self.downscale_freq_shift)
            * torch.arange(half, dtype=torch.float32, device=device)
        )
        sine = torch.zeros(half, dtype=torch.float32, device=device)
        phases = [sine + math.pi / 2, sine] if self.flip_sin_to_cos else [sine, sine + math.pi / 2]
        return torch.stack([self.scale * exponent.exp().repeat(2), torch.cat(phases)])

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        """As ``Timesteps.forward``."""
        if self.waves.device != timesteps.device:
            self.waves = self.waves_on(timesteps.device)
        frequency, phase = self.waves
        return torch.addcmul(phase, timesteps[:, None], frequency).sin().float()


class FusedUpsample2D(Upsample2D):
    """Nearest doubling folded into the addressing of the convolution."""

    state: ForwardState

    @staticmethod
    def can_fuse(block: Any) -> bool:
        """True if this forward supports the block's options."""
        conv = unwrapped(block.conv) if block.use_conv and block.name == "conv" else None
        return (
            type(conv) is QuantConv2d
            and block.interpolate
            and not block.use_conv_transpose
            and block.norm is None
            and _is_plain_3x3(conv)
        )

    def forward(self, hidden_states: torch.Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As ``Upsample2D.forward``."""
        doubled = [2 * size for size in hidden_states.shape[2:]]
        adapters = _adapters_of_conv(self.conv, hidden_states)
        conv = unwrapped(self.conv)
        if (output_size is not None and list(output_size) != doubled) or adapters is None or not _is_plain_3x3(conv):
            return super().forward(hidden_states, output_size, *args, **kwargs)
        q = conv.quantize(hidden_states.permute(0, 2, 3, 1), (1, 1))
        added = None
        if adapters:
            image = F.interpolate(hidden_states, scale_factor=2.0, mode="nearest").permute(0, 2, 3, 1)
            added = residual_with_adapters(adapters, image)
        y, statistics = conv.convolve(q, hidden_states.dtype, residual=added, upsample=True)
        return self.state.remember(y.permute(0, 3, 1, 2), statistics)


def _is_plain_3x3(conv: Any) -> bool:
    """True for the geometry that the doubling supports. Users may dilate a convolution after it was fused."""
    return bool((conv.kernel_size, conv.stride, conv.padding, conv.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1)))


class FusedDownsample2D(Downsample2D):
    """The strided convolution, with the next norm's statistics."""

    state: ForwardState

    @staticmethod
    def can_fuse(block: Any) -> bool:
        """True if this forward supports the block's options."""
        return (
            bool(block.use_conv)
            and block.norm is None
            and block.padding > 0
            and type(unwrapped(block.conv)) is QuantConv2d
        )

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As ``Downsample2D.forward``."""
        adapters = _adapters_of_conv(self.conv, hidden_states)
        if adapters is None:
            return super().forward(hidden_states, *args, **kwargs)
        conv, image = unwrapped(self.conv), hidden_states.permute(0, 2, 3, 1)
        q = conv.quantize(image, conv.padding)
        added = residual_with_adapters(adapters, image)
        y, statistics = conv.convolve(q, hidden_states.dtype, residual=added)
        return self.state.remember(y.permute(0, 3, 1, 2), statistics)


class FusedUpBlock2D(UpBlock2D):
    """An up block that passes each skip to its resnet instead of concatenating it."""

    @staticmethod
    def can_fuse(block: Any) -> bool:
        """True if every resnet of the block is fused."""
        return all(isinstance(resnet, FusedResnetBlock2D) for resnet in block.resnets)

    def forward(
        self, hidden_states: torch.Tensor, res_hidden_states_tuple: tuple[torch.Tensor, ...], temb: Any = None,
        upsample_size: Any = None, *args: Any, **kwargs: Any,
    ) -> torch.Tensor:  # fmt: skip
        """As ``UpBlock2D.forward``."""
        if not _hands_skips_over(self):
            return super().forward(hidden_states, res_hidden_states_tuple, temb, upsample_size, *args, **kwargs)
        for resnet, skip in zip(self.resnets, reversed(res_hidden_states_tuple), strict=False):
            hidden_states = resnet(hidden_states, temb, skip=skip)
        for upsampler in self.upsamplers or ():
            hidden_states = upsampler(hidden_states, upsample_size)
        return hidden_states


class FusedCrossAttnUpBlock2D(CrossAttnUpBlock2D):
    """An up block that passes each skip to its resnet instead of concatenating it."""

    can_fuse = staticmethod(FusedUpBlock2D.can_fuse)

    def forward(
        self, hidden_states: torch.Tensor, res_hidden_states_tuple: tuple[torch.Tensor, ...], temb: Any = None,
        encoder_hidden_states: Any = None, cross_attention_kwargs: Any = None, upsample_size: Any = None,
        attention_mask: Any = None, encoder_attention_mask: Any = None,
    ) -> torch.Tensor:  # fmt: skip
        """As ``CrossAttnUpBlock2D.forward``."""
        conditions = {
            "encoder_hidden_states": encoder_hidden_states,
            "cross_attention_kwargs": cross_attention_kwargs,
            "attention_mask": attention_mask,
            "encoder_attention_mask": encoder_attention_mask,
        }
        if not _hands_skips_over(self):
            return super().forward(
                hidden_states, res_hidden_states_tuple, temb, upsample_size=upsample_size, **conditions
            )
        layers = zip(self.resnets, self.attentions, reversed(res_hidden_states_tuple), strict=False)
        for resnet, attention, skip in layers:
            hidden_states = resnet(hidden_states, temb, skip=skip)
            hidden_states = attention(hidden_states, return_dict=False, **conditions)[0]
        for upsampler in self.upsamplers or ():
            hidden_states = upsampler(hidden_states, upsample_size)
        return hidden_states


def _adapters_of_conv(conv: Any, x: torch.Tensor) -> list[Adapter] | None:
    """The active adapters of a convolution; None if it cannot run fused in this call."""
    return None if wants_gradient(x) or not run_as_made((conv,)) else active_adapters(conv)


def _hands_skips_over(block: Any) -> bool:
    """True if the resnets can take the skips as an argument: hooks and a replaced ``forward`` expect the concat."""
    freeu = all(getattr(block, name, None) for name in ("s1", "s2", "b1", "b2"))
    return not (freeu or block.training) and run_as_made(block.resnets)
