"""Fused blocks against the unfused UNet: what they compute, that they run, when they step aside, whose memory they use."""

import copy
import functools
import weakref
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode

import dq_runtime
from dq_kernels.ops import STATISTICS_ROWS
from dq_runtime import DilateQuantConfig
from dq_runtime.fused import LinearGroup, fuse

# The sums of a 1x1 convolution and of a linear layer are scaled in another order, which costs fp32's last bit. That can
# put an activation on the other side of a quantizer's step, and all that follows is rounded otherwise: see FLIPS.
TOLERANCE = 1e-6
# A step of 1/256 in a few activations. A wrong timestep's row, a lost skip or a lost residual costs 0.1 and more.
FLIPS = 5e-3
TIMESTEPS = (100, 500, 900)
MIXED = torch.tensor([900, 100, 500])
BATCH = len(MIXED)

CONDITION = {
    "sample_size": 16,
    "layers_per_block": 1,
    "block_out_channels": (32, 64),
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,  # which diffusers takes for the number of heads
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
    "no prompt": {"cross_attention_dim": None, "mid_block_type": None},
}
UNCONDITIONAL = {
    "sample_size": 16,
    "layers_per_block": 1,
    "block_out_channels": (32, 64),
    "norm_num_groups": 8,
    "attention_head_dim": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}


def new_unet(name, **options):
    torch.manual_seed(0)
    if name == "UNet2DModel":
        return UNet2DModel(**UNCONDITIONAL | options).eval()
    return UNet2DConditionModel(**CONDITION | UNETS[name] | options).eval()


def arguments_of(unet, seed=0):
    """Whatever the UNet takes besides sample and timestep, for the whole batch."""
    generator = torch.Generator().manual_seed(seed)
    arguments = {}
    if unet.config.get("cross_attention_dim"):
        arguments["encoder_hidden_states"] = torch.randn(BATCH, 5, 32, generator=generator)
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
    return dq_runtime.calibrate(unet, calibration_set, DilateQuantConfig(**config))


@functools.cache
def _calibrated(name):
    with torch.no_grad():
        unet = calibrate(new_unet(name))
    for layer in dq_runtime.convert.quantized_layers(unet).values():
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


@pytest.fixture(autouse=True)
def _contiguous_group_norm(monkeypatch):
    """On CPUs torch's group norm of channels-last images subtracts squares, an error of its own in the unfused UNet."""
    stock = F.group_norm
    monkeypatch.setattr(F, "group_norm", lambda x, *args, **kwargs: stock(x.contiguous(), *args, **kwargs))


@pytest.fixture
def assert_same_output(relative_rms):
    """Asserts that two UNets, one of them fused, compute the same."""

    def assert_same_output(actual, expected, tolerance=TOLERANCE, **arguments):
        assert relative_rms(call(actual, **arguments), call(expected, **arguments)) < tolerance

    return assert_same_output


class Operators(TorchDispatchMode):
    """The calls of torch operators, by name; what an operator of ours does inside is not seen."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((func.overloadpacket.__name__, args))
        return func(*args, **kwargs or {})

    def count(self):
        return Counter(name for name, _ in self.calls)

    def arguments(self, operator):
        return [args for name, args in self.calls if name == operator]


SIZES = {
    "whole runs of statistics": (16, 16),
    "at one level alone": (8, 8),
    "no whole runs": (6, 10),
}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("name", [*UNETS, "UNet2DModel"])
def test_fused_unet_computes_what_the_unfused_one_does(assert_same_output, name, size):
    if name == "three levels":
        size = tuple(2 * side for side in size)

    assert_same_output(fused(name), quantized(name), size=size)


@pytest.mark.parametrize(
    ("name", "size"), [("conv projections", (9, 9)), ("conv projections", (8, 9)), ("three levels", (10, 14))]
)
def test_sizes_that_no_doubling_reaches_are_upsampled_as_unfused(assert_same_output, name, size):
    """In the last one an upsampler is told a size that happens to be the doubled one."""
    assert_same_output(fused(name), quantized(name), size=size)


def test_neighbouring_timestep_would_be_noticed(relative_rms):
    """Or the tolerances above would be too wide."""
    assert relative_rms(call(fused(), MIXED.flip(0)), call(quantized())) > 10 * FLIPS


def test_every_kind_of_block_is_fused():
    unet = quantized("linear projections")
    kinds = {
        name: type(module).__name__
        for name, module in unet.named_modules()
        if isinstance(module, (ResnetBlock2D, BasicTransformerBlock, Transformer2DModel, Upsample2D, Downsample2D))
        or name in ("up_blocks.0", "up_blocks.1")
    }
    names = list(dict(unet.named_modules()))

    assert fuse(unet) == kinds
    assert list(dict(unet.named_modules())) == names


def test_no_float_norm_and_no_concat_is_left_in_the_blocks():
    unet = fused()
    with Operators() as operators:
        call(unet)

    assert operators.count()["native_group_norm"] == 1  # conv_norm_out
    assert operators.count()["native_layer_norm"] == 0
    assert not [args for args in operators.arguments("cat") if args[0][0].ndim == 4]


@pytest.mark.parametrize("name", ["conv projections", "linear projections", "SDXL"])
def test_each_input_is_multiplied_once(name):
    unet = fused(name)
    resnets, transformers = modules_of(unet, ResnetBlock2D), modules_of(unet, Transformer2DModel)
    blocks, resamplers = modules_of(unet, BasicTransformerBlock), modules_of(unet, (Upsample2D, Downsample2D))
    embeddings = 4 if name == "SDXL" else 2
    shortcuts = sum(resnet.conv_shortcut is not None for resnet in resnets)

    with Operators() as operators:
        call(unet)

    count = operators.count()
    # All time projections are one product, all keys and values of the prompt another; a block has q with k and v,
    # the prompt's q, two output projections and the feed forward's second layer.
    assert count["int4_linear"] == embeddings + 1 + 1 + shortcuts + len(transformers) + 5 * len(blocks)
    assert count["int4_linear_quantize"] == len(blocks)
    assert count["int4_conv2d"] == 2 * len(resnets) + len(transformers) + len(resamplers)
    assert count["group_norm_quantize"] == 2 * len(resnets) + len(transformers)
    assert count["layer_norm_quantize"] == 3 * len(blocks)
    # Embeddings, the two shared inputs, shortcuts, resamplers, two attentions a block and the way out of a transformer.
    assert count["quantize"] == embeddings + 2 + shortcuts + len(resamplers) + 2 * len(blocks) + len(transformers)


def test_norms_are_given_the_statistics_of_their_images():
    unet = fused()
    with Operators() as operators:
        call(unet, size=(16, 16))

    unknown = 0
    for x, skip, statistics, skip_statistics, *_ in operators.arguments("group_norm_quantize"):
        for image, given in ((x, statistics), (skip, skip_statistics)):
            if image is not None and given is None:
                unknown += 1
            elif image is not None:
                runs = image.reshape(BATCH, -1, STATISTICS_ROWS, image.shape[-1])
                torch.testing.assert_close(given[:, :, 0], runs.sum(2), atol=1e-3, rtol=1e-5)
    assert unknown == 2  # conv_in is not quantized: its image goes to the first norm, and to the last as a skip


def test_no_statistics_are_given_of_part_of_a_run():
    unet = fused()
    with Operators() as operators:
        call(unet, size=(6, 10))

    assert all(args[2] is None and args[3] is None for args in operators.arguments("group_norm_quantize"))
