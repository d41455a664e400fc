"""Untrained UNets of two levels with attention, the same at every call: what most tests quantize."""

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor


def unet2d(**arguments):
    """A ``UNet2DModel``; the arguments take the place of its defaults."""
    torch.manual_seed(0)
    defaults = {
        "sample_size": 8,
        "layers_per_block": 1,
        "block_out_channels": (32, 64),
        "norm_num_groups": 8,
        "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return UNet2DModel(**defaults | arguments).eval()


def unet2d_condition(**arguments):
    """A ``UNet2DConditionModel``; the arguments take the place of its defaults."""
    torch.manual_seed(0)
    defaults = {
        "sample_size": 8,
        "layers_per_block": 1,
        "block_out_channels": (32, 64),
        "norm_num_groups": 8,
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    return UNet2DConditionModel(**defaults | arguments).eval()


class _Twice(AttnProcessor):
    def __call__(self, attn, hidden_states, *args, **kwargs):
        return super().__call__(attn, torch.cat([hidden_states] * 2), *args, **kwargs)[: len(hidden_states)]


def attend_twice(unet):
    """Has a UNet's self-attentions see a batch of twice the size, which changes no result."""
    for block in unet.modules():
        if isinstance(block, BasicTransformerBlock):
            block.attn1.set_processor(_Twice())
