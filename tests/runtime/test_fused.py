"""Fused blocks against unfused ones: what they compute, that they run, when they step aside, whose memory they use."""

import copy
import functools
import weakref
from collections import Counter
from contextlib import contextmanager

import pytest
import tiny_unets
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
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
from dq_runtime.convert import quantized_layers
from dq_runtime.fused import FUSED, LinearGroup, fuse

# Given one input, a fused block and diffusers' own forward of it differ by fp32's last bit, which now and then puts an
# activation on the other side of a quantizer's step: 4e-4 for one in a transformer here. A lost time embedding or
# residual costs 1e-2 and more.
BLOCK_TOLERANCE = 2e-3
# Over a whole UNet all that follows is rounded otherwise, 0.015 at most here. A wrong row or skip costs 0.1 and more.
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


@pytest.fixture(autouse=True)
def _contiguous_group_norm(monkeypatch):
    """On CPUs torch's group norm of channels-last images subtracts squares, an error of its own in the unfused UNet."""
    stock = F.group_norm
    monkeypatch.setattr(F, "group_norm", lambda x, *args, **kwargs: stock(x.contiguous(), *args, **kwargs))


@contextmanager
def unfused(block):
    """Gives a block and what is in it diffusers' forwards back."""
    classes = {module: type(module) for module in block.modules() if type(module) in FUSED.values()}
    for module, fused_class in classes.items():
        module.__class__ = fused_class.__base__
    yield
    for module, fused_class in classes.items():
        module.__class__ = fused_class


@pytest.fixture
def check_blocks(relative_rms):
    """Makes a fused UNet compare its every block with diffusers' forward of that block, on the same inputs."""

    def check(block, args, kwargs, y):
        skip = kwargs.pop("skip", None)
        args = args if skip is None else (torch.cat([args[0], skip], dim=1), *args[1:])
        with unfused(block):
            expected = block.forward(*args, **kwargs)
        if isinstance(y, (tuple, dict)):
            y, expected = y[0], expected[0]
        assert relative_rms(y, expected) < BLOCK_TOLERANCE, type(block)

    def check_blocks(unet):
        for block in modules_of(unet, (ResnetBlock2D, Transformer2DModel, Upsample2D, Downsample2D)):
            block.register_forward_hook(check, with_kwargs=True)

    return check_blocks


@pytest.fixture
def assert_same_output(relative_rms, check_blocks):
    """Asserts that a fused UNet computes what an unfused one does: block by block, and on the whole."""

    def assert_same_output(actual, expected, **arguments):
        check_blocks(actual)
        assert relative_rms(call(actual, **arguments), call(expected, **arguments)) < FLIPS

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


# Pixels in whole runs of statistics at every level, at one level, and at none.
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("conv projections", (16, 16)),
        *((name, (8, 8)) for name in (*UNETS, "UNet2DModel")),
        ("linear projections", (6, 10)),
        ("UNet2DModel", (6, 10)),
    ],
)
def test_fused_unet_computes_what_the_unfused_one_does(assert_same_output, name, size):
    assert_same_output(fused(name), quantized(name), size=size)


@pytest.mark.parametrize(
    ("name", "size"), [("conv projections", (9, 9)), ("conv projections", (8, 9)), ("three levels", (10, 14))]
)
def test_sizes_that_no_doubling_reaches_are_upsampled_as_unfused(assert_same_output, name, size):
    """In the last one an upsampler is told a size that happens to be the doubled one."""
    assert_same_output(fused(name), quantized(name), size=size)


def test_neighbouring_timestep_would_be_noticed(relative_rms):
    """Or the tolerance above would be too wide."""
    assert relative_rms(call(fused(), MIXED.flip(0)), call(quantized())) > 2 * FLIPS


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


def residuals(shapes):
    generator = torch.Generator().manual_seed(4)
    return [5 + torch.randn(BATCH, *shape, generator=generator) for shape in shapes]


@pytest.fixture
def statistics_not_given():
    """Calls a fused UNet, checks the statistics that its norms are given, and counts the images that come without."""

    def statistics_not_given(unet, **arguments):
        with Operators() as operators:
            call(unet, size=(16, 16), **arguments)
        missing = 0
        for x, skip, statistics, skip_statistics, *_ in operators.arguments("group_norm_quantize"):
            for image, given in ((x, statistics), (skip, skip_statistics)):
                if image is not None and given is None:
                    missing += 1
                elif image is not None:
                    runs = image.reshape(BATCH, -1, STATISTICS_ROWS, image.shape[-1])
                    torch.testing.assert_close(given[:, :, 0], runs.sum(2), atol=1e-3, rtol=1e-5)
        return missing

    return statistics_not_given


def test_norms_are_given_the_statistics_of_their_images(statistics_not_given):
    """But for conv_in's image, the first norm's and the last one's skip: that layer is not quantized."""
    assert statistics_not_given(fused()) == 2


def test_no_norm_is_given_the_statistics_of_an_image_before_it_was_changed(statistics_not_given):
    """diffusers adds a T2I-Adapter's features in place to what a block returned."""
    features = residuals([(32, 16, 16), (64, 8, 8)])

    assert statistics_not_given(fused(), down_intrablock_additional_residuals=features) >= 2


def test_no_statistics_are_given_of_part_of_a_run():
    unet = fused()
    with Operators() as operators:
        call(unet, size=(6, 10))

    assert all(args[2] is None and args[3] is None for args in operators.arguments("group_norm_quantize"))


# What diffusers' own forward must do, since no fused one knows it.


def add_lora(unet, target_modules):
    torch.manual_seed(0)
    unet.add_adapter(LoraConfig(r=4, target_modules=target_modules))
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.5)


@pytest.mark.parametrize(
    "target_modules",
    [
        ["to_q", "to_k", "to_v", "to_out.0"],
        ["down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"],
        ["proj_in", "proj_out"],
        ["ff.net.0.proj"],
        ["ff.net.2"],
        ["time_emb_proj"],
        ["mid_block.resnets.0.time_emb_proj"],
        ["conv1"],
        ["conv_shortcut"],
        ["upsamplers.0.conv", "downsamplers.0.conv"],
    ],
    ids=", ".join,
)
def test_adapter_works_on_a_fused_unet(assert_same_output, relative_rms, target_modules):
    actual, expected = fused(), quantized()
    without = call(expected)

    for unet in (actual, expected):
        add_lora(unet, target_modules)

    assert relative_rms(call(expected), without) > 2 * FLIPS
    assert_same_output(actual, expected)
    actual.disable_adapters()
    assert relative_rms(call(actual), without) < FLIPS


def test_scale_of_an_adapter_is_heeded(assert_same_output):
    actual, expected = fused(), quantized()
    for unet in (actual, expected):
        add_lora(unet, ["to_q", "conv1"])

    assert_same_output(actual, expected, cross_attention_kwargs={"scale": 0.5})


MASK = torch.tensor([[1, 1, 1, 1, 0], [1, 0, 0, 0, 0], [0, 1, 1, 0, 1]])


def test_mask_of_the_prompt_is_heeded(assert_same_output, relative_rms):
    actual, expected = fused(), quantized()

    assert_same_output(actual, expected, encoder_attention_mask=MASK)
    assert relative_rms(call(expected), call(expected, encoder_attention_mask=MASK)) > 0.001  # it changes something


def test_other_attention_processors_are_called(assert_same_output):
    actual, expected = fused(), quantized()

    class Doubling(AttnProcessor):
        def __call__(self, *args, **kwargs):
            return 2 * super().__call__(*args, **kwargs)

    for unet in (actual, expected):
        unet.set_attn_processor(Doubling())

    assert_same_output(actual, expected)


def test_freeu_is_heeded(assert_same_output, relative_rms):
    actual, expected = fused(), quantized()
    without = call(expected)

    for unet in (actual, expected):
        for block in unet.up_blocks:
            block.s1, block.s2, block.b1, block.b2 = 0.9, 0.2, 1.2, 1.4

    assert relative_rms(call(expected), without) > 2 * FLIPS
    assert_same_output(actual, expected)


def test_dropout_drops_in_train_mode(relative_rms):
    expected = calibrate(new_unet("conv projections", dropout=0.5))
    actual = copy.deepcopy(expected)
    fuse(actual)
    without = call(expected)
    outputs = []

    for unet in (actual, expected):
        unet.train()
        torch.manual_seed(3)
        outputs.append(call(unet))

    assert relative_rms(outputs[1], without) > 0.1
    assert relative_rms(*outputs) < FLIPS


@pytest.mark.parametrize(
    "kept",
    [
        ["conv1"],
        ["conv_shortcut"],
        ["time_emb_proj"],
        ["mid_block.resnets.0.time_emb_proj"],
        ["attn1.to_v"],
        ["mid_block.attentions.0.transformer_blocks.0.attn2.to_k"],
        ["to_out"],
        ["ff"],
        ["proj_in"],
        ["upsamplers", "downsamplers"],
        ["up_blocks.0.resnets.1"],
    ],
    ids=", ".join,
)
def test_blocks_with_layers_in_floating_point_compute_as_unfused(assert_same_output, kept):
    expected = calibrate(new_unet("conv projections"), modules_to_not_convert=["conv_in", "conv_out", *kept])
    actual = copy.deepcopy(expected)

    fuse(actual)

    assert_same_output(actual, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"resnet_time_scale_shift": "scale_shift"},
        {"resnet_out_scale_factor": 2.0},
        {"act_fn": "gelu"},
        {"only_cross_attention": (True, False)},
        {"downsample_padding": 0},
        {"block_out_channels": (9, 18), "norm_num_groups": 3, "attention_head_dim": 3},
    ],
    ids=str,
)
def test_blocks_of_other_kinds_compute_as_unfused(assert_same_output, options):
    expected = calibrate(new_unet("conv projections", **options))
    actual = copy.deepcopy(expected)

    fuse(actual)

    assert_same_output(actual, expected)


def test_four_bit_activations_compute_as_unfused(assert_same_output):
    expected = calibrate(new_unet("conv projections"), activation_bits=4)
    actual = copy.deepcopy(expected)

    fuse(actual)

    assert_same_output(actual, expected)


def test_residuals_of_a_controlnet_are_added(assert_same_output):
    assert_same_output(
        fused(),
        quantized(),
        size=(16, 16),
        down_block_additional_residuals=residuals([(32, 16, 16), (32, 16, 16), (32, 8, 8), (64, 8, 8)]),
        mid_block_additional_residual=residuals([(64, 8, 8)])[0],
    )


# Memory, and what becomes of it when the model is saved, loaded, cast, copied or moved.


def storages(tensors):
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def group_tensors(group):
    return [tensor for tensor in vars(group).values() if isinstance(tensor, torch.Tensor)]


@pytest.mark.parametrize(
    "prepare", [lambda unet: unet, copy.deepcopy, lambda unet: unet.double().float()], ids=["fused", "copied", "cast"]
)
def test_members_of_a_group_are_views_of_its_tensors(prepare):
    unet = prepare(fused())
    call(unet)

    assert len(groups_of(unet)) == 2 + len(modules_of(unet, BasicTransformerBlock))
    for group in groups_of(unet):
        for name in ("weight", "weight_scale", "weight_sum", *(("bias",) if group.bias is not None else ())):
            held = {getattr(layer, name).untyped_storage().data_ptr() for layer in group.layers}
            assert held == {getattr(group, name).untyped_storage().data_ptr()}, name


def test_fusing_takes_no_memory():
    unet = quantized()
    before = sum(storages(unet.state_dict().values()).values())

    fuse(unet)

    held = [*unet.state_dict().values(), *(tensor for group in groups_of(unet) for tensor in group_tensors(group))]
    assert sum(storages(held).values()) == before


def test_fused_unet_is_saved_as_the_unfused_one(tmp_path, assert_same_tensors, assert_same_output):
    unet = fused()

    unet.save_pretrained(tmp_path)

    loaded = UNet2DConditionModel.from_pretrained(tmp_path)
    assert_same_tensors(loaded.state_dict(), quantized().state_dict())
    fuse(loaded)
    assert torch.equal(call(loaded), call(unet))


@pytest.mark.parametrize("has_run", [False, True], ids=["before the first call", "after a call"])
@pytest.mark.parametrize("assign", [False, True], ids=["in place", "assigned"])
def test_weights_loaded_into_a_fused_unet_are_used(assign, has_run):
    unet, other = fused(), calibrate(new_unet("conv projections"))
    for parameter in other.parameters():
        if parameter.is_floating_point():
            parameter *= 1.1
    for layer in quantized_layers(other).values():
        layer.weight.copy_(layer.weight.flip(0))
        layer.weight_sum.copy_(layer.weight_sum.flip(0))
        layer.weight_scale.copy_(2 * layer.weight_scale)
    if has_run:
        call(unet)

    unet.load_state_dict({name: tensor.clone() for name, tensor in other.state_dict().items()}, assign=assign)

    fuse(other)
    assert torch.equal(call(unet), call(other))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_fused_unet_may_be_cast(relative_rms, dtype):
    """A fused block rounds to the dtype less often than the unfused one, and torch's own norms in half precision."""
    unet, reference = fused().to(dtype), quantized()
    arguments = {"encoder_hidden_states": arguments_of(unet)["encoder_hidden_states"].to(dtype)}

    result = unet(noise(unet).to(dtype), MIXED, **arguments).sample

    assert result.dtype == dtype
    unfused_error = relative_rms(
        reference.to(dtype)(noise(unet).to(dtype), MIXED, **arguments).sample, call(quantized())
    )
    assert relative_rms(result, call(quantized())) < 1.2 * unfused_error


def test_copy_of_a_fused_unet_is_on_its_own():
    unet = fused()
    expected = call(unet)

    duplicate = copy.deepcopy(unet)

    state = modules_of(duplicate, ResnetBlock2D)[0].state
    assert state is not modules_of(unet, ResnetBlock2D)[0].state
    assert all(resnet.state is state for resnet in modules_of(duplicate, ResnetBlock2D))
    for tensor in unet.state_dict().values():
        tensor.zero_()
    assert torch.equal(call(duplicate), expected)


def test_groups_follow_their_layers_to_another_device():
    unet = fused().to("meta")
    sample, arguments = noise(unet).to("meta"), {"encoder_hidden_states": torch.empty(BATCH, 5, 32, device="meta")}

    result = unet(sample, MIXED.to("meta"), **arguments).sample

    assert result.shape == sample.shape
    for group in groups_of(unet):
        assert {tensor.device.type for tensor in group_tensors(group)} == {"meta"}


def test_group_applies_what_its_layers_do(new_layer):
    layers = [new_layer(torch.nn.Linear(24, size, bias=size != 6)) for size in (16, 6, 10)]
    grid = layers[0].timestep_grid
    for layer in layers:
        layer.timestep_grid = grid
        layer.weight_dilation = layers[0].weight_dilation
    grid.index = torch.tensor([2, 0, 1], dtype=torch.int32)
    x = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(5))
    expected = [layer(F.silu(x)) for layer in layers]

    group = LinearGroup(layers, F.silu)

    for layer, result in zip(reversed(layers), reversed(expected), strict=True):
        assert torch.equal(group.result(layer, x), result)
        assert torch.equal(layer(F.silu(x)), result)


# What the blocks tell each other lasts for one forward pass.


def test_nothing_of_a_forward_pass_stays_in_memory():
    unet = fused()
    prompt, alive = arguments_of(unet)["encoder_hidden_states"], []
    for module in modules_of(unet, (ResnetBlock2D, Transformer2DModel)):
        module.register_forward_hook(
            lambda module, args, y: alive.append(weakref.ref(y if torch.is_tensor(y) else y[0]))
        )
    unet.time_embedding.register_forward_hook(lambda module, args, y: alive.append(weakref.ref(y)))

    call(unet, size=(16, 16), encoder_hidden_states=prompt)
    alive.append(weakref.ref(prompt))
    del prompt

    assert len(alive) > 2
    assert not [ref for ref in alive if ref() is not None]


def test_images_live_no_longer_for_being_known():
    """What the middle block makes is read by the next block, and freed while the pass goes on."""
    unet = fused()
    made, alive = [], []
    for module in modules_of(unet.mid_block, (ResnetBlock2D, Transformer2DModel)):
        module.register_forward_hook(
            lambda module, args, y: made.append(weakref.ref(y if torch.is_tensor(y) else y[0]))
        )
    unet.conv_norm_out.register_forward_hook(lambda *_: alive.extend(image for image in made if image() is not None))

    call(unet, size=(16, 16))

    assert made
    assert not alive


def test_prompt_changed_in_place_is_read_anew():
    unet = fused()
    prompt = arguments_of(unet)["encoder_hidden_states"]
    call(unet, encoder_hidden_states=prompt)

    prompt.copy_(10 * prompt.flip(0))

    assert torch.equal(call(unet, encoder_hidden_states=prompt), call(fused(), encoder_hidden_states=prompt.clone()))


def test_one_prompt_is_quantized_anew_for_each_timestep():
    unet = fused()
    prompt = arguments_of(unet)["encoder_hidden_states"]

    for timestep in (900, 100, 900):
        assert torch.equal(call(unet, timestep, encoder_hidden_states=prompt), call(fused(), timestep))


def test_one_time_embedding_for_all_calls_is_projected_anew():
    """Its quantizer is that of the timestep, even if the embedding is one object."""
    unet = fused()
    embedding = torch.randn(BATCH, 128, generator=torch.Generator().manual_seed(6))
    unet.time_embedding.forward = lambda *args: embedding
    first = call(unet, 900)

    second = call(unet, 100)

    assert not torch.equal(first, second)
    other = fused()
    other.time_embedding.forward = unet.time_embedding.forward
    assert torch.equal(second, call(other, 100))


def test_failed_forward_pass_leaves_nothing_to_the_next():
    unet = fused()
    prompt = arguments_of(unet)["encoder_hidden_states"]

    def fail(*args):
        raise KeyboardInterrupt

    handle = unet.conv_out.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        call(unet, 900, encoder_hidden_states=prompt)
    handle.remove()

    assert torch.equal(call(unet, 100, encoder_hidden_states=prompt), call(fused(), 100))


# Errors, the way back, and torch.compile.


def test_stock_unet_cannot_be_fused():
    with pytest.raises(ValueError, match=r"not quantized.*before fuse"):
        fuse(new_unet("conv projections"))


def test_unet_cannot_be_fused_twice():
    with pytest.raises(ValueError, match="fused already"):
        fuse(fused())


def test_fused_unet_cannot_be_calibrated_again():
    unet = fused()
    expected = call(unet)

    with pytest.raises(ValueError, match=r"quantized already.*dequantize"):
        calibrate(unet)

    assert torch.equal(call(unet), expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"encoder_hidden_states": torch.zeros(1, 5, 32)}, ValueError, r"attn2\.to_[kv]: .*3 samples.*got 1"),
        ({"encoder_hidden_states": torch.zeros(3, 5, 31)}, ValueError, r"attn2\.to_[kv]: .*32 channels.*got 31"),
    ],
    ids=["batch", "channels"],
)
def test_wrong_prompt_is_refused_by_the_layer_s_name(arguments, error, message):
    with pytest.raises(error, match=message):
        call(fused(), **arguments)


def test_dequantized_fused_unet_is_a_stock_one(assert_same_tensors, relative_rms):
    unet, expected = fused(), quantized().dequantize()
    packed = weakref.ref(unet.mid_block.resnets[0].time_emb_proj)

    unet.dequantize()

    assert_same_tensors(unet.state_dict(), expected.state_dict())
    assert relative_rms(call(unet), call(expected)) < 1e-5  # strides of size 1 may differ, and sums with them
    assert packed() is None  # the groups would hold the packed weights


def test_dequantized_fused_unet_can_be_quantized_and_fused_again(relative_rms):
    unet, expected = fused().dequantize(), quantized().dequantize()
    calibrate(unet)
    calibrate(expected)
    assert relative_rms(call(unet), call(expected)) < FLIPS

    fuse(unet)

    assert relative_rms(call(unet), call(expected)) < FLIPS


def test_compiled_fused_unet_has_no_graph_break_and_computes_the_same(relative_rms):
    unet, compiled = fused(), fused()
    torch._dynamo.reset()
    compiled.compile(fullgraph=True, backend="aot_eager")

    for timestep, seed in ((MIXED, 0), (MIXED.flip(0), 1)):
        actual = call(compiled, timestep, seed=seed)
        assert relative_rms(actual, call(unet, timestep, seed=seed)) < FLIPS  # no statistics are handed on here
