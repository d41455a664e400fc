"""Fused blocks compared with unfused ones: results, operators that run, and cases that fall back to unfused."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from diffusers.hooks import apply_group_offloading
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import Timesteps
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import CrossAttnUpBlock2D, UpBlock2D
from diffusers.models.upsampling import Upsample2D
from fused_unets import (
    BATCH,
    FLIPS,
    MIXED,
    UNETS,
    arguments_of,
    blocks_compared,
    calibrate,
    call,
    fused,
    modules_of,
    new_unet,
    noise,
    quantized,
)
from operators import Operators
from tiny_unets import attend_twice

from dq_kernels import ops
from dq_kernels.cpu import onednn
from dq_kernels.ops import STATISTICS_ROWS
from dq_runtime import Int8AttnProcessor
from dq_runtime.fused import FUSED, fuse
from dq_runtime.layers import quantized_layers

pytestmark = pytest.mark.usefixtures("contiguous_group_norm")


@pytest.fixture
def assert_same_output(relative_rms):
    """Asserts that a fused and an unfused UNet compute the same: block by block, and as a whole."""

    def assert_same_output(actual, expected, **arguments):
        with blocks_compared(relative_rms):
            result = call(actual, **arguments)
        assert relative_rms(result, call(expected, **arguments)) < FLIPS

    return assert_same_output


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
    """In the last case an upsampler is given a size that equals the doubled one."""
    assert_same_output(fused(name), quantized(name), size=size)


def test_neighbouring_timestep_would_be_noticed(relative_rms):
    """The tolerance above is narrow enough to detect it."""
    assert relative_rms(call(fused(), MIXED.flip(0)), call(quantized())) > 2 * FLIPS


def test_every_kind_of_block_is_fused():
    unet = quantized("linear projections")
    kinds = {
        name: type(module).__name__
        for name, module in unet.named_modules()
        if (isinstance(module, tuple(FUSED)) and not isinstance(module, (UpBlock2D, CrossAttnUpBlock2D)))
        or name in ("up_blocks.0", "up_blocks.1")
    }
    names = list(dict(unet.named_modules()))

    assert fuse(unet) == kinds
    assert list(dict(unet.named_modules())) == names


@pytest.mark.parametrize("timestep", [torch.tensor([0, 500, 999]), torch.tensor([0.25, 999.0], dtype=torch.float64)])
@pytest.mark.parametrize("options", [(320, True, 0), (128, False, 1, 4)], ids=str)
def test_embedding_of_timesteps_is_diffusers(options, timestep):
    stock, fast = Timesteps(*options), Timesteps(*options)
    fast.__class__ = FUSED[Timesteps]
    fast.waves = fast.waves_on(timestep.device)

    embedding = fast(timestep)

    assert embedding.dtype == torch.float32
    # fp32 holds angles of up to 4 000 to 1/8192.
    torch.testing.assert_close(embedding, stock(timestep), rtol=0, atol=5e-4)


def test_no_float_norm_and_no_concat_is_left_in_the_blocks():
    unet = fused()
    with Operators() as operators:
        call(unet)

    assert operators.count()["native_group_norm"] == 1  # conv_norm_out
    assert operators.count()["native_layer_norm"] == 0
    assert not [arguments for arguments in operators.arguments("cat") if arguments["tensors"][0].ndim == 4]


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
    assert count["int4_geglu_quantize"] == len(blocks)
    assert count["int4_conv2d"] == 2 * len(resnets) + len(transformers) + len(resamplers)
    assert count["group_norm_quantize"] == 2 * len(resnets) + len(transformers)
    assert count["layer_norm_quantize"] == 3 * len(blocks)
    # Embeddings, the two shared inputs and resamplers.
    assert count["quantize"] == embeddings + 2 + len(resamplers)
    assert count["attention_quantize"] == 2 * len(blocks)


def residuals(shapes):
    generator = torch.Generator().manual_seed(4)
    return [5 + torch.randn(BATCH, *shape, generator=generator) for shape in shapes]


@pytest.fixture
def statistics_not_given():
    """Calls a fused UNet, checks the statistics that its norms get, and counts the images without statistics."""

    def statistics_not_given(unet, **arguments):
        with Operators() as operators:
            call(unet, size=(16, 16), **arguments)
        missing = 0
        for arguments in operators.arguments("group_norm_quantize"):
            for source, statistics in (("x", "statistics"), ("skip", "skip_statistics")):
                image, given = arguments[source], arguments[statistics]
                if image is not None and given is None:
                    missing += 1
                elif image is not None:
                    runs = image.reshape(BATCH, -1, STATISTICS_ROWS, image.shape[-1])
                    torch.testing.assert_close(given[:, :, 0], runs.sum(2), atol=1e-3, rtol=1e-5)
        return missing

    return statistics_not_given


def test_norms_are_given_the_statistics_of_their_images(statistics_not_given):
    """Except conv_in's image, read by the first norm and as the last skip: conv_in is not quantized."""
    assert statistics_not_given(fused()) == 2


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_norm_is_given_the_statistics_of_an_image_before_it_was_changed(statistics_not_given, mode):
    """diffusers adds a T2I-Adapter's features in place to a block's output."""
    features = residuals([(32, 16, 16), (64, 8, 8)])

    with mode():
        assert statistics_not_given(fused(), down_intrablock_additional_residuals=features) >= 2


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("block", ["down_blocks.0.resnets.0", "mid_block"])
def test_no_norm_is_given_the_statistics_of_an_image_that_a_hook_has_changed(statistics_not_given, block, mode):
    unet = fused()
    unet.get_submodule(block).register_forward_hook(lambda module, args, output: output.mul_(3))

    with mode():
        assert statistics_not_given(unet) > 2


def test_norms_are_given_statistics_in_inference_mode(statistics_not_given):
    with torch.inference_mode():
        assert statistics_not_given(fused()) == 2


def test_hooks_on_all_modules_see_every_layer():
    """torch's profilers and trackers register them globally."""
    unet, seen = fused(), []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(module))
    try:
        call(unet)
    finally:
        handle.remove()

    assert set(quantized_layers(unet).values()) <= set(seen)


@pytest.mark.parametrize("name", ["conv projections", "linear projections"])
def test_weights_are_prepacked_once(monkeypatch, name):
    unet = fused(name)
    call(unet)
    monkeypatch.setattr(onednn, "unpack_int4", lambda values: pytest.fail(f"{list(values.shape)} is unpacked again"))

    call(unet)


def test_no_statistics_are_given_of_part_of_a_run():
    unet = fused()
    with Operators() as operators:
        call(unet, size=(6, 10))

    for arguments in operators.arguments("group_norm_quantize"):
        assert arguments["statistics"] is arguments["skip_statistics"] is None


# Cases that fused forwards do not support, so that diffusers' own forward must run.


MASK = torch.tensor([[1, 1, 1, 1, 0], [1, 0, 0, 0, 0], [0, 1, 1, 0, 1]])


@pytest.mark.supports("Adapters and attention", "masks of the prompt", "heeded, and the fused attention steps aside")
def test_mask_of_the_prompt_is_heeded(assert_same_output, relative_rms):
    actual, expected = fused(), quantized()

    assert_same_output(actual, expected, encoder_attention_mask=MASK)
    assert relative_rms(call(expected), call(expected, encoder_attention_mask=MASK)) > 0.001  # it changes something


@pytest.mark.supports("Adapters and attention", "own attention processors", "run, and the fused attention steps aside")
def test_other_attention_processors_are_called(assert_same_output):
    actual, expected = fused(), quantized()

    class Doubling(AttnProcessor):
        def __call__(self, *args, **kwargs):
            return 2 * super().__call__(*args, **kwargs)

    for unet in (actual, expected):
        unet.set_attn_processor(Doubling())

    assert_same_output(actual, expected)


@pytest.mark.parametrize(
    "layer",
    [
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_v",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v",
        "down_blocks.0.attentions.0.transformer_blocks.0.norm3",
        "down_blocks.0.attentions.0.transformer_blocks.0.ff",
        "down_blocks.0.attentions.0.proj_out",
        "mid_block.resnets.0.norm2",
        "mid_block.resnets.0.conv1",
        "mid_block.resnets.0.time_emb_proj",
        "up_blocks.0.upsamplers.0.conv",
        "down_blocks.0.downsamplers.0.conv",
    ],
)
@pytest.mark.parametrize("how", ["hook", "another forward"])
def test_whoever_changes_what_a_module_returns_is_heeded(assert_same_output, relative_rms, layer, how):
    actual, expected = fused(), quantized()
    without = call(expected)

    for unet in (actual, expected):
        module = unet.get_submodule(layer)
        if how == "hook":
            module.register_forward_hook(lambda module, args, output: output * 3)
        else:
            module.forward = lambda *args, own=module.forward, **kwargs: own(*args, **kwargs) * 3

    assert relative_rms(call(expected), without) > 2 * FLIPS
    assert_same_output(actual, expected)


@pytest.mark.parametrize("resnet", ["up_blocks.0.resnets.0", "up_blocks.1.resnets.1"])
@pytest.mark.parametrize("of", ["the module", "all modules"])
def test_hook_on_a_resnet_of_an_up_block_sees_the_concat(assert_same_output, resnet, of):
    """A hook on all modules acts on one here."""
    actual, expected = fused(), quantized()
    seen, handles = [], []
    for unet in (actual, expected):
        module = unet.get_submodule(resnet)

        def halve(called, args, hooked=module):
            if called is hooked:
                seen.append(args[0].shape[1])
                return (args[0] / 2, *args[1:])
            return None

        if of == "the module":
            module.register_forward_pre_hook(halve)
        else:
            handles.append(torch.nn.modules.module.register_module_forward_pre_hook(halve))
    try:
        assert_same_output(actual, expected)
    finally:
        for handle in handles:
            handle.remove()

    assert len(seen) == 2
    assert seen[0] == seen[1]


def test_convolutions_may_be_dilated_after_fusing(assert_same_output, relative_rms):
    """Sampling above the trained resolution does so."""
    actual, expected = fused(), quantized()
    without = call(expected)
    for unet in (actual, expected):
        for name, module in unet.named_modules():
            if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3) and "downsamplers" not in name:
                module.dilation = module.padding = (2, 2)

    assert relative_rms(call(expected), without) > 2 * FLIPS
    assert_same_output(actual, expected)


@pytest.mark.supports("Offloading", "sequential CPU offload", "fused blocks step aside")
@pytest.mark.parametrize("offloaded_first", [False, True])
def test_weights_that_are_loaded_when_they_are_needed_are_loaded(assert_same_output, offloaded_first):
    """Sequential CPU offload leaves the weights of all modules on the meta device between their calls."""
    expected, actual = quantized(), quantized()
    for change in (fuse, cpu_offload)[:: -1 if offloaded_first else 1]:
        change(actual, *(() if change is fuse else ("cpu",)))

    assert all(parameter.is_meta for parameter in actual.parameters())
    assert_same_output(actual, expected)


@pytest.mark.supports("Offloading", "group offload, to disk, too", "block and leaf level")
@pytest.mark.parametrize("make", [quantized, fused])
@pytest.mark.parametrize(
    "level", [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}]
)
def test_tensors_that_lie_on_disk_are_read_after_they_were_loaded(assert_same_output, make, level, tmp_path):
    expected, actual = quantized(), make()
    apply_group_offloading(actual, torch.device("cpu"), offload_to_disk_path=str(tmp_path / "offloaded"), **level)

    assert list((tmp_path / "offloaded").iterdir())
    assert_same_output(actual, expected)


@pytest.mark.supports("Training and gradients", "fused UNets", "the gradient of the unfused one")
@pytest.mark.parametrize("towards", ["sample", "prompt"])
def test_a_gradient_passes_a_fused_unet_as_the_unfused_one(towards):
    gradients = []
    for unet in (fused(), quantized()):
        sample, arguments = noise(unet), arguments_of(unet)
        source = (sample if towards == "sample" else arguments["encoder_hidden_states"]).requires_grad_()
        with torch.enable_grad():
            result = unet(sample, MIXED, **arguments).sample
            gradients += torch.autograd.grad(result.sum(), source)

    assert torch.equal(*gradients)


def test_a_changed_batch_inside_of_an_attention_computes_as_unfused(assert_same_output):
    actual, expected = fused(), quantized()
    for unet in (actual, expected):
        attend_twice(unet)

    assert_same_output(actual, expected, timestep=500)


@pytest.mark.supports("Adapters and attention", "FreeU", "heeded, and the fused block steps aside")
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
        {"mid_block_scale_factor": 2.0},
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


def test_layers_of_other_bits_compute_as_unfused(assert_same_output):
    """The gates' GEMM rounds to the bits of the layer that follows it, not to its own."""
    expected = calibrate(new_unet("conv projections"), layer_activation_bits={"ff.net.2": 4})
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


# Attention in int8.


def in_int8(unet):
    for attention in modules_of(unet, Attention):
        attention.set_processor(Int8AttnProcessor())
    return unet


def attention_operators(unet, **arguments):
    """Number of attentions that run fused with quantization, in int8 alone, and in floating point."""
    with Operators() as operators:
        call(unet, **arguments)
    count = operators.count()
    return (
        count["int8_attention_quantize"],
        count["int8_attention"],
        sum(count[name] for name in count if name.startswith(("_scaled_dot_product", "attention_quantize"))),
    )


@pytest.mark.parametrize("name", ["conv projections", "linear projections", "prompt left out", "UNet2DModel"])
def test_int8_attention_computes_as_unfused(assert_same_output, name):
    assert_same_output(in_int8(fused(name)), in_int8(quantized(name)))


def test_int8_attention_is_quantized_in_the_same_pass():
    unet = fused()
    blocks = len(modules_of(unet, BasicTransformerBlock))
    assert attention_operators(unet) == (0, 0, 2 * blocks)
    with Operators() as operators:
        call(unet)
    before = operators.count()["quantize"]  # none is of an attention: all have few keys here

    in_int8(unet)

    assert attention_operators(unet) == (2 * blocks, 0, 0)
    with Operators() as operators:
        call(unet)
    assert operators.count()["quantize"] == before


def test_int8_attention_to_many_tokens_gets_the_statistics_of_its_keys_and_values(monkeypatch):
    """On a GPU, of which the meta device takes the place; those of the queries come before them in memory."""
    unet, given = in_int8(fused()).to("meta"), []
    attend = ops.int8_attention_quantize

    def recorded(query, key, value, heads, quantizer, statistics):
        given.append((key, statistics))
        return attend(query, key, value, heads, quantizer, statistics)

    monkeypatch.setattr(ops, "int8_attention_quantize", recorded)

    unet(noise(unet, (16, 16)).to("meta"), 500, torch.empty(BATCH, 5, 32, device="meta"))

    many = [(key, statistics) for key, statistics in given if key.shape[1] == 256]
    assert len(many) > 2
    for key, statistics in many:
        assert statistics.shape == (BATCH, 4, 2, 2 * key.shape[2])
        assert statistics.storage_offset() == key.storage_offset() == key.shape[2]
    assert all(statistics is None for key, statistics in given if key.shape[1] < 256)


def test_attention_in_int8_and_one_in_floating_point_share_a_fused_block(assert_same_output):
    actual, expected = fused(), quantized()
    for unet in (actual, expected):
        for block in modules_of(unet, BasicTransformerBlock):
            block.attn2.set_processor(Int8AttnProcessor())
    blocks = len(modules_of(actual, BasicTransformerBlock))

    assert attention_operators(actual) == (blocks, 0, blocks)
    assert_same_output(actual, expected)


def test_attention_processors_may_be_set_before_and_after_fusing():
    before = in_int8(quantized())
    fuse(before)
    after = in_int8(fused())

    assert torch.equal(call(before), call(after))
    after.set_attn_processor(AttnProcessor2_0())
    assert torch.equal(call(after), call(fused()))


def test_mask_of_the_prompt_is_heeded_by_int8_attention(assert_same_output, relative_rms):
    actual, expected = in_int8(fused()), in_int8(quantized())
    blocks = len(modules_of(actual, BasicTransformerBlock))

    assert attention_operators(actual, encoder_attention_mask=MASK) == (0, blocks, blocks)
    assert relative_rms(call(expected), call(expected, encoder_attention_mask=MASK)) > 0.001  # it changes something
    assert_same_output(actual, expected, encoder_attention_mask=MASK)


def test_heads_too_large_for_int8_stay_in_floating_point_in_fused_blocks(assert_same_output, monkeypatch):
    monkeypatch.setattr(ops, "MAX_HEAD_CHANNELS", 8)  # those of the middle block have 16
    actual = in_int8(fused())

    assert attention_operators(actual) == (6, 0, 2)
    assert_same_output(actual, in_int8(quantized()))
