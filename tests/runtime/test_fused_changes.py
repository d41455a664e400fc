"""Blocks that are changed after they were fused compute what diffusers' own forwards of them do."""

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import SinusoidalPositionalEmbedding, Timesteps
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from fused_unets import FLIPS, blocks_compared, call, fused, modules_of, no_block_may_step_aside, quantized
from torch import nn

from dq_runtime.layers import quantized_layers

pytestmark = pytest.mark.usefixtures("contiguous_group_norm")


class Halved(nn.Module):
    """Takes the place of a module; halves its result, or its input if there is none."""

    def __init__(self, inner=None):
        super().__init__()
        self.inner = inner

    def forward(self, x, *args):
        return 0.5 * (x if self.inner is None else self.inner(x, *args))


def halve_result(module):
    module.register_forward_hook(lambda module, args, result: 0.5 * result)


def replaced(parent, name):
    setattr(parent, name, Halved(getattr(parent, name)))


def swap_projections(attention):
    attention.to_q, attention.to_k = attention.to_k, attention.to_q


def share_projection(attention):
    attention.to_k = attention.to_q


OF_RESNETS = {
    "another scale": lambda resnet: setattr(resnet, "output_scale_factor", 2.0),
    "another activation": lambda resnet: setattr(resnet, "nonlinearity", nn.GELU()),
    "a hooked activation": lambda resnet: halve_result(resnet.nonlinearity),
    "a wrapped activation": lambda resnet: replaced(resnet, "nonlinearity"),
    "another dropout": lambda resnet: setattr(resnet, "dropout", Halved()),
    "a hooked dropout": lambda resnet: halve_result(resnet.dropout),
    "no activation of the time": lambda resnet: setattr(resnet, "skip_time_act", True),
    "another norm": lambda resnet: setattr(resnet, "norm2", nn.Identity()),
    "a wrapped convolution": lambda resnet: replaced(resnet, "conv1"),
}
OF_TRANSFORMERS = {
    "another scale": lambda block: setattr(block.attn1, "rescale_output_factor", 2.0),
    "a residual of its own": lambda block: setattr(block.attn2, "residual_connection", True),
    "another output": lambda block: block.attn1.to_out.__setitem__(1, Halved()),
    "a hooked output": lambda block: halve_result(block.attn2.to_out[1]),
    "swapped projections": lambda block: swap_projections(block.attn1),
    "one projection for two": lambda block: share_projection(block.attn1),
    "a wrapped projection": lambda block: replaced(block.attn1, "to_v"),
    "another gate": lambda block: block.ff.net.__setitem__(0, Halved(block.ff.net[0])),
    "another dropout": lambda block: block.ff.net.__setitem__(1, Halved()),
    "a hooked dropout": lambda block: halve_result(block.ff.net[1]),
    "no norm": lambda block: setattr(block, "norm1", nn.Identity()),
    "positions": lambda block: setattr(block, "pos_embed", SinusoidalPositionalEmbedding(block.dim, 64)),
    "no cross-attention": lambda block: setattr(block, "attn2", None),
}
OF_OTHERS = {
    "a transformer without a norm": (Transformer2DModel, lambda block: setattr(block, "norm", nn.Identity())),
    "a wrapped sampler": (Upsample2D, lambda block: replaced(block, "conv")),
}
CHANGES = [
    *[pytest.param(ResnetBlock2D, change, id=f"resnet, {name}") for name, change in OF_RESNETS.items()],
    *[pytest.param(BasicTransformerBlock, change, id=f"block, {name}") for name, change in OF_TRANSFORMERS.items()],
    *[pytest.param(stock, change, id=name) for name, (stock, change) in OF_OTHERS.items()],
]


@pytest.mark.supports("Models", "fused blocks that are changed later", "run unfused, and the others stay fused")
@pytest.mark.parametrize(("stock", "change"), CHANGES)
def test_changes_after_fusing_are_heeded(relative_rms, stock, change):
    unet = fused()
    before = call(unet)
    block = modules_of(unet, stock)[0]
    change(block)

    with blocks_compared(relative_rms):
        after = call(unet)

    assert relative_rms(after, before) > 1e-3


def test_dropout_that_is_switched_on_alone_drops(relative_rms):
    """Monte Carlo dropout."""
    unet = fused()
    before = call(unet)
    resnet, transformer = modules_of(unet, ResnetBlock2D)[0], modules_of(unet, BasicTransformerBlock)[0]
    for place, name in ((resnet, "dropout"), (transformer.ff.net, "1"), (transformer.attn1.to_out, "1")):
        place._modules[name].p = 0.5
        place._modules[name].train()
        assert relative_rms(call(unet), before) > 1e-3
        place._modules[name].eval()
        with no_block_may_step_aside():
            assert torch.equal(call(unet), before)


@pytest.mark.parametrize("setting", [("flip_sin_to_cos", False), ("downscale_freq_shift", 1), ("scale", 0.1)], ids=str)
def test_settings_of_the_embedding_of_timesteps_are_heeded(relative_rms, setting):
    unet, unfused = fused(), quantized()
    before = call(unet)
    for model in (unet, unfused):
        setattr(modules_of(model, Timesteps)[0], *setting)

    assert relative_rms(call(unet), before) > 2 * FLIPS
    assert relative_rms(call(unet), call(unfused)) < FLIPS


def test_a_resnet_that_is_not_fused_may_take_a_place_in_an_up_block(relative_rms):
    unet, unfused = fused(), quantized()
    for model in (unet, unfused):
        resnets = model.up_blocks[0].resnets
        torch.manual_seed(1)
        resnets[0] = ResnetBlock2D(in_channels=128, out_channels=64, temb_channels=128, groups=8).eval()

    assert relative_rms(call(unet), call(unfused)) < FLIPS


def test_a_layer_of_another_model_may_take_a_place_in_a_fused_block(relative_rms):
    unet, donor = fused(), quantized()
    name = next(name for name in quantized_layers(unet) if name.endswith("attn1.to_v"))
    before = call(unet)
    parent = unet.get_submodule(name.removesuffix(".to_v"))
    parent.to_v = donor.get_submodule(name.replace("to_v", "to_q"))
    parent.to_v.timestep_grid = parent.to_q.timestep_grid

    with blocks_compared(relative_rms):
        after = call(unet)

    assert relative_rms(after, before) > 1e-3
