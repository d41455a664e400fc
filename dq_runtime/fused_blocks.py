"""Fused forwards of diffusers' blocks: subclasses that change nothing but ``forward``.

Activations stay int8 between kernels: a norm writes the next layer's quantized input, a GEMM's epilogue adds time
embedding and residual or applies GEGLU, an up block reads its two sources without a concat. ``can_fuse`` is True if the
fused forward supports a block's options. A block that cannot run fused in a call (adapter, other attention processor,
mask, hook, offloaded weights, gradient through the input) runs diffusers' own forward. ``fused.fuse`` installs these
classes.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import CrossAttnUpBlock2D, UpBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from dq_kernels import ops
from dq_runtime.attention import Int8AttnProcessor, float_attention, in_int8
from dq_runtime.forward_state import ForwardState, LinearGroup, run_as_made, same_quantizer
from dq_runtime.layers import QuantConv2d, QuantizedLayer, QuantLinear, wants_gradient


def quantized(layer: Any) -> QuantizedLayer:
    """The layer itself, typed as quantized: diffusers annotates a block's layers as stock ones."""
    return layer


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
            and (block.conv_shortcut is None or block.conv_shortcut.kernel_size == (1, 1))
        )

    def _fused_now(self, x: torch.Tensor) -> bool:
        convolutions = (self.conv1, self.conv2, *((self.conv_shortcut,) if self.conv_shortcut is not None else ()))
        return (
            all(type(conv) is QuantConv2d for conv in convolutions)
            and run_as_made((*convolutions, self.norm1, self.norm2))
            and not self.training
            and not wants_gradient(x)
        )

    def forward(
        self, input_tensor: torch.Tensor, temb: Any, *args: Any, skip: Any = None, **kwargs: Any
    ) -> torch.Tensor:
        """As ``ResnetBlock2D.forward`` of the concat of ``input_tensor`` and ``skip``."""
        if skip is not None and skip.shape[1] % 2:
            input_tensor, skip = torch.cat([input_tensor, skip], dim=1), None
        if not self._fused_now(input_tensor):
            joined = input_tensor if skip is None else torch.cat([input_tensor, skip], dim=1)
            return super().forward(joined, temb, *args, **kwargs)
        dtype = input_tensor.dtype
        statistics, skip_statistics = self.state.recall(input_tensor), self.state.recall(skip)
        x = input_tensor.permute(0, 2, 3, 1)
        skip = None if skip is None else skip.permute(0, 2, 3, 1)
        channel_add = None
        if temb is not None and self.time_emb_proj is not None:
            group = self.state.groups.get("time_emb_proj")
            if group is not None and type(self.time_emb_proj) is QuantLinear:
                channel_add = group.result(self.time_emb_proj, temb)
            else:
                channel_add = self.time_emb_proj(self.nonlinearity(temb))
        q = self.conv1.group_norm_quantize(
            x, self.norm1, skip=skip, statistics=statistics, skip_statistics=skip_statistics,
            padding=self.conv1.padding,
        )  # fmt: skip
        h, statistics = self.conv1.convolve(q, dtype, channel_add=channel_add)
        q = self.conv2.group_norm_quantize(
            h, self.norm2, statistics=statistics if statistics.numel() else None, padding=self.conv2.padding
        )
        residual = x
        if self.conv_shortcut is not None:
            residual = self.conv_shortcut.multiply(self.conv_shortcut.quantize(x, skip=skip), dtype)
        y, statistics = self.conv2.convolve(q, dtype, residual=residual)
        return self.state.remember(y.permute(0, 3, 1, 2), statistics)


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
            and type(gate.proj) is QuantLinear
            and type(out) is QuantLinear
            and gate.proj.in_features % 2 == 0
            and gate.proj.in_features <= ops.MAX_LAYER_NORM_CHANNELS
            and out.in_features % 2 == 0
        )

    def _fused_now(self, x: torch.Tensor) -> bool:
        net: Any = self.ff.net
        layers: list[Any] = [net[0].proj, net[2]]
        others: list[Any] = [self.ff, net[0], self.norm1, self.norm3]
        for attention in (self.attn1, self.attn2):
            if attention is not None:
                layers += [attention.to_q, attention.to_k, attention.to_v, attention.to_out[0]]
                others.append(attention)
                if type(attention.processor) not in (AttnProcessor2_0, Int8AttnProcessor):
                    return False
        if self.attn2 is not None:
            others.append(self.norm2)
        return (
            all(type(layer) is QuantLinear for layer in layers)
            and run_as_made((*layers, *others))
            and not self.training
            and not wants_gradient(x)
        )

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
        if (
            attention_mask is not None
            or encoder_attention_mask is not None
            or cross_attention_kwargs
            or not self._fused_now(hidden_states)
            or not (encoder_hidden_states is None or _fits(encoder_hidden_states, hidden_states))
        ):
            return super().forward(
                hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep,
                cross_attention_kwargs, class_labels, added_cond_kwargs,
            )  # fmt: skip
        x, dtype = hidden_states, hidden_states.dtype
        q = quantized(self.attn1.to_q).layer_norm_quantize(x, layer_norm(self.norm1))
        query, key, value = self.self_attention.multiply(q, dtype).chunk(3, dim=-1)
        x = _attend(self.attn1, query, key, value, residual=x)
        if self.attn2 is not None:
            to_q = quantized(self.attn2.to_q)
            query = to_q.multiply(to_q.layer_norm_quantize(x, layer_norm(self.norm2)), dtype)
            if encoder_hidden_states is None:
                normed = self.norm2(x)
                key, value = self.attn2.to_k(normed), self.attn2.to_v(normed)
            else:
                key, value = (
                    self._of_encoder(layer, encoder_hidden_states) for layer in (self.attn2.to_k, self.attn2.to_v)
                )
            x = _attend(self.attn2, query, key, value, residual=x)
        net: Any = self.ff.net
        up, down = quantized(net[0].proj), quantized(net[2])
        q = up.geglu_quantize(up.layer_norm_quantize(x, layer_norm(self.norm3)), down)
        return down.multiply(q, dtype, residual=x)

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
        and type(attention.to_out[0]) is QuantLinear
        and type(attention.to_q) is QuantLinear
    )


def _attend(
    attention: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, residual: torch.Tensor
) -> torch.Tensor:
    """Attention over [B, tokens, heads x d], its output projection, and the residual."""
    out = quantized(attention.to_out[0])
    if in_int8(attention):
        mixed = ops.int8_attention_quantize(query, key, value, attention.heads, out.quantizer(query))
    else:
        mixed = out.quantize(float_attention(query, key, value, attention.heads))
    return out.multiply(mixed, query.dtype, residual=residual)


class FusedTransformer2DModel(Transformer2DModel):
    """Group norm + quantize + projection to tokens; projection back to the image with the residual; channels last."""

    state: ForwardState

    @staticmethod
    def can_fuse(block: Any) -> bool:
        """True if this forward supports the block's options."""
        norm = block.norm if block.is_input_continuous else None
        return isinstance(norm, nn.GroupNorm) and norm.num_channels % 2 == 0

    def _fused_now(self, x: torch.Tensor) -> bool:
        layers = (self.proj_in, self.proj_out)
        return (
            all(type(layer) in (QuantLinear, QuantConv2d) for layer in layers)
            and run_as_made((*layers, self.norm))
            and not wants_gradient(x)
        )

    def _operate_on_continuous_inputs(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, int]:
        if not self._fused_now(hidden_states):
            return super()._operate_on_continuous_inputs(hidden_states)
        statistics = self.state.recall(hidden_states)
        proj_in = quantized(self.proj_in)
        image = hidden_states.permute(0, 2, 3, 1)
        q = proj_in.group_norm_quantize(image, self.norm, silu=False, statistics=statistics)
        tokens = proj_in.multiply(q.flatten(1, 2), hidden_states.dtype)
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
        if not self._fused_now(hidden_states):
            return super()._get_output_for_continuous_inputs(
                hidden_states, residual, batch_size, height, width, inner_dim
            )
        proj_out = quantized(self.proj_out)
        q = proj_out.quantize(hidden_states).unflatten(1, (height, width))
        y, statistics = proj_out.convolve(q, hidden_states.dtype, residual=residual.permute(0, 2, 3, 1))
        return self.state.remember(y.permute(0, 3, 1, 2), statistics)


class FusedUpsample2D(Upsample2D):
    """Nearest doubling folded into the addressing of the convolution."""

    state: ForwardState

    @staticmethod
    def can_fuse(block: Any) -> bool:
        """True if this forward supports the block's options."""
        conv = block.conv if block.use_conv and block.name == "conv" else None
        return (
            type(conv) is QuantConv2d
            and block.interpolate
            and not block.use_conv_transpose
            and block.norm is None
            and (conv.kernel_size, conv.stride, conv.padding, conv.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
        )

    def forward(self, hidden_states: torch.Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As ``Upsample2D.forward``."""
        doubled = [2 * size for size in hidden_states.shape[2:]]
        conv: Any = self.conv
        if (output_size is not None and list(output_size) != doubled) or not _fused_conv(conv, hidden_states):
            return super().forward(hidden_states, output_size, *args, **kwargs)
        q = conv.quantize(hidden_states.permute(0, 2, 3, 1), (1, 1))
        y, statistics = conv.convolve(q, hidden_states.dtype, upsample=True)
        return self.state.remember(y.permute(0, 3, 1, 2), statistics)


class FusedDownsample2D(Downsample2D):
    """The strided convolution, with the next norm's statistics."""

    state: ForwardState

    @staticmethod
    def can_fuse(block: Any) -> bool:
        """True if this forward supports the block's options."""
        return bool(block.use_conv) and block.norm is None and block.padding > 0 and type(block.conv) is QuantConv2d

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As ``Downsample2D.forward``."""
        conv: Any = self.conv
        if not _fused_conv(conv, hidden_states):
            return super().forward(hidden_states, *args, **kwargs)
        q = conv.quantize(hidden_states.permute(0, 2, 3, 1), conv.padding)
        y, statistics = conv.convolve(q, hidden_states.dtype)
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


def _fused_conv(conv: Any, x: torch.Tensor) -> bool:
    return type(conv) is QuantConv2d and run_as_made((conv,)) and not wants_gradient(x)


def _hands_skips_over(block: Any) -> bool:
    """True if the resnets can take the skips as an argument, which a replaced ``forward`` does not have."""
    freeu = all(getattr(block, name, None) for name in ("s1", "s2", "b1", "b2"))
    return not (freeu or block.training or any("forward" in resnet.__dict__ for resnet in block.resnets))
