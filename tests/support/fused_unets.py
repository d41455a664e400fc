"""Tiny random UNets, quantized and fused, and how they are called."""

import copy
import functools
from contextlib import ExitStack, contextmanager
from unittest import mock

import tiny_unets
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D

import dq_runtime
from dq_runtime import DilateQuantConfig
from dq_runtime.fused import FUSED, fuse
from dq_runtime.layers import quantized_layers

# How far fused and unfused may be apart: what follows the first difference is rounded otherwise, which makes 0.015 at
# most here. A wrong row or skip costs 0.1 and more.
FLIPS = 0.03
# Given one input, a fused block and diffusers' own forward of it differ by fp32's last bit, which now and then puts an
# activation on the other side of a quantizer's step: 4e-4 for one in a transformer here. A lost time embedding or
# residual costs 1e-2 and more.
BLOCK_TOLERANCE = 2e-3
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
    return dq_runtime.calibrate(
        unet, calibration_set, DilateQuantConfig(**{"dilation": "weight"} | config), distillation=None
    )


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


@contextmanager
def unfused(block):
    """Restores diffusers' forwards in a block and its submodules."""
    classes = {module: type(module) for module in block.modules() if type(module) in FUSED.values()}
    for module, fused_class in classes.items():
        module.__class__ = fused_class.__base__
    yield
    for module, fused_class in classes.items():
        module.__class__ = fused_class


@contextmanager
def blocks_compared(distance):
    """Compares each call of a fused block with diffusers' forward of the block, on the same inputs."""

    def compared(forward):
        def new_forward(block, *args, skip=None, **kwargs):
            y = forward(block, *args, **({} if skip is None else {"skip": skip}), **kwargs)
            if skip is not None:
                args = (torch.cat([args[0], skip], dim=1), *args[1:])
            with unfused(block):
                expected = block.forward(*args, **kwargs)
            actual, expected = (result if torch.is_tensor(result) else result[0] for result in (y, expected))
            assert distance(actual, expected) < BLOCK_TOLERANCE, (type(block), distance(actual, expected))
            return y

        return new_forward

    with ExitStack() as stack:
        for stock in (ResnetBlock2D, Transformer2DModel, Upsample2D, Downsample2D):
            # On the class: a hook on a block changes how it is called.
            stack.enter_context(mock.patch.object(FUSED[stock], "forward", compared(FUSED[stock].forward)))
        yield


@contextmanager
def no_block_may_step_aside():
    """Raises if a fused block runs diffusers' own forward."""

    def fail(block, *args, **kwargs):
        raise AssertionError(f"{type(block)} runs unfused")

    with ExitStack() as stack:
        for stock in FUSED:
            method = "_operate_on_continuous_inputs" if stock is Transformer2DModel else "forward"
            stack.enter_context(mock.patch.object(stock, method, fail))
        yield
