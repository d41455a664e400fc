"""Tiny random UNets, quantized and fused, and how they are called."""

import copy
import functools

import tiny_unets
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D

import dq_runtime
from dq_runtime import DilateQuantConfig
from dq_runtime.fused import fuse
from dq_runtime.layers import quantized_layers

# How far fused and unfused may be apart: what follows the first difference is rounded otherwise, which makes 0.015 at
# most here. A wrong row or skip costs 0.1 and more.
FLIPS = 0.03
TIMESTEPS = (100, 500, 900)
MIXED = torch.tensor([900, 100, 500])
BATCH = len(MIXED)

CONDITION = {
    "sample_size": 16,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
THREE_LEVELS = {
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}
TEXT_TIME = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 16 + 6 * 4,
}
UNETS = {
    "conv projections": {},
    "linear projections": {"use_linear_projection": True, "layers_per_block": 2},
    "three levels": THREE_LEVELS,
    "SDXL": TEXT_TIME | {"use_linear_projection": True, "transformer_layers_per_block": (1, 2)},
    "class labels": {"num_class_embeds": 4},
    "prompt left out": {"mid_block_type": None},
}


def new_unet(name, **options):
    if name == "UNet2DModel":
        return tiny_unets.unet2d(**{"sample_size": 16} | options)
    return tiny_unets.unet2d_condition(**CONDITION | UNETS[name] | options)


def arguments_of(unet, seed=0):
    """Whatever the UNet takes besides sample and timestep, for the whole batch."""
    generator = torch.Generator().manual_seed(seed)
    arguments = {}
    if isinstance(unet, UNet2DConditionModel):
        prompt = torch.randn(BATCH, 5, 32, generator=generator)
        arguments["encoder_hidden_states"] = None if unet.mid_block is None else prompt
    if unet.config.get("addition_embed_type"):
        text_embeds = torch.randn(BATCH, 16, generator=generator)
        arguments["added_cond_kwargs"] = {"text_embeds": text_embeds, "time_ids": torch.full((BATCH, 6), 64.0)}
    if unet.config.get("num_class_embeds"):
        arguments["class_labels"] = torch.tensor([3, 0, 1])
    return arguments


def noise(unet, size=(8, 8), seed=0):
    return torch.randn(BATCH, unet.config.in_channels, *size, generator=torch.Generator().manual_seed(seed))


def call(unet, timestep=MIXED, size=(8, 8), seed=0, **arguments):
    return unet(noise(unet, size, seed), timestep, **arguments_of(unet, seed) | arguments).sample


def calibrate(unet, **config):
    with dq_runtime.record(unet) as calibration_set:
        for timestep in TIMESTEPS:
            call(unet, timestep)
    return dq_runtime.calibrate(unet, calibration_set, DilateQuantConfig(**{"dilation": "weight"} | config))


@functools.cache
def _calibrated(name):
    with torch.no_grad():
        unet = calibrate(new_unet(name))
    for layer in quantized_layers(unet).values():
        layer.act_scale *= torch.tensor([1.0, 0.5, 0.25])  # so that a wrong timestep's row shows
    return unet


def quantized(name="conv projections"):
    return copy.deepcopy(_calibrated(name))


def fused(name="conv projections"):
    unet = quantized(name)
    fuse(unet)
    return unet


def modules_of(unet, stock):
    return [module for module in unet.modules() if isinstance(module, stock)]


def groups_of(unet):
    """Every group of a fused UNet."""
    shared = modules_of(unet, ResnetBlock2D)[0].state.groups.values()
    return [*shared, *(block.self_attention for block in modules_of(unet, BasicTransformerBlock))]
