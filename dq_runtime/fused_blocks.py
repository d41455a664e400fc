"""Fused forwards of diffusers' resnets, samplers and up blocks: subclasses that change nothing but ``forward``.

Activations stay int8 between kernels: a norm writes the next layer's quantized input, a GEMM's epilogue adds time
embedding and residual or applies GEGLU, an up block reads its two sources without a concat. LoRA adapters read the
floating-point input of their layer, computed again if need be. ``can_fuse`` is True if the fused forward supports a
block's options; it is asked again at each call, since options and modules may change. A block that cannot run fused in
a call (other options or attention processor, mask, hook, offloaded weights, gradient) runs diffusers' own forward.
``fused.fuse`` installs these classes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import Timesteps
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import CrossAttnUpBlock2D, UpBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from dq_runtime.adapters import (
    Adapter,
    Adapters,
    active_adapters,
    adapters_of,
    add_adapters,
    is_dropout,
    residual_with_adapters,
    run_as_made,
    unwrapped,
)
from dq_runtime.forward_state import ForwardState
from dq_runtime.gradients import wants_gradient
from dq_runtime.layers import QuantConv2d


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
            and is_dropout(block.dropout)
        )

    def _adapters_now(self, x: torch.Tensor) -> Adapters | None:
        """The adapters to add; None if the block cannot run fused in this call."""
        convolutions = [self.conv1, self.conv2]
        if self.conv_shortcut is not None:
            convolutions.append(self.conv_shortcut)
        others = (self.norm1, self.norm2, self.nonlinearity, self.dropout)
        if self.training or self.dropout.training or wants_gradient(x):
            return None
        if not (self.can_fuse(self) and run_as_made((*convolutions, *others))):
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


class FusedTimesteps(Timesteps):
    """The sinusoids of all channels at once: sin(t frequency + phase), with frequencies that are computed once."""

    # Frequencies and phases, [2, channels] fp32, and their settings; no buffer, which a cast of the model would change.
    waves: tuple[torch.Tensor, tuple[float, ...]]

    @staticmethod
    def can_fuse(block: Any) -> bool:
        """True if this forward supports the block's options."""
        return bool(block.num_channels % 2 == 0)

    def settings(self) -> tuple[float, ...]:
        """The numbers that decide the waves."""
        return self.num_channels, self.flip_sin_to_cos, self.downscale_freq_shift, self.scale

    def waves_on(self, device: torch.device) -> tuple[torch.Tensor, tuple[float, ...]]:
        """The waves of ``diffusers.models.embeddings.get_timestep_embedding``, and their settings."""
        half = self.num_channels // 2
        exponent = (
            -math.log(10000)
            / (half - self.downscale_freq_shift)
            * torch.arange(half, dtype=torch.float32, device=device)
        )
        sine = torch.zeros(half, dtype=torch.float32, device=device)
        phases = [sine + math.pi / 2, sine] if self.flip_sin_to_cos else [sine, sine + math.pi / 2]
        return torch.stack([self.scale * exponent.exp().repeat(2), torch.cat(phases)]), self.settings()

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        """As ``Timesteps.forward``."""
        if not self.can_fuse(self):
            return super().forward(timesteps)
        waves, settings = self.waves
        if waves.device != timesteps.device or settings != self.settings():
            self.waves = self.waves_on(timesteps.device)
        frequency, phase = self.waves[0]
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
        adapters = _adapters_of_conv(self, hidden_states)
        if adapters is None or (output_size is not None and list(output_size) != doubled):
            return super().forward(hidden_states, output_size, *args, **kwargs)
        conv: Any = unwrapped(self.conv)
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
        adapters = _adapters_of_conv(self, hidden_states)
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


def _adapters_of_conv(sampler: Any, x: torch.Tensor) -> list[Adapter] | None:
    """The active adapters of a sampler's convolution; None if the sampler cannot run fused in this call."""
    if wants_gradient(x) or not sampler.can_fuse(sampler) or not run_as_made((sampler.conv,)):
        return None
    return active_adapters(sampler.conv)


def _hands_skips_over(block: Any) -> bool:
    """True if the resnets can take the skips as an argument: hooks and a replaced ``forward`` expect the concat."""
    freeu = all(getattr(block, name, None) for name in ("s1", "s2", "b1", "b2"))
    return not (freeu or block.training) and block.can_fuse(block) and run_as_made(block.resnets)
