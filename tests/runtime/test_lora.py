"""LoRA adapters on fused UNets: results, launches, changes of adapters, and adapters that need PEFT's own forward."""

import copy
import gc
import weakref

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from fused_unets import (
    FLIPS,
    MIXED,
    arguments_of,
    blocks_compared,
    calibrate,
    call,
    fused,
    groups_of,
    modules_of,
    new_unet,
    no_block_may_step_aside,
    noise,
    quantized,
)
from operators import Operators
from peft import LoraConfig

from dq_kernels.cpu import compiled
from dq_runtime import Int8AttnProcessor
from dq_runtime.adapters import stacked
from dq_runtime.fused import fuse, unfuse

pytestmark = pytest.mark.usefixtures("contiguous_group_norm")

ATTENTIONS = ["to_q", "to_k", "to_v", "to_out.0"]
TARGETS = [
    ATTENTIONS,
    ["to_q", "to_v"],
    ["down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"],
    ["proj_in", "proj_out"],
    ["ff.net.0.proj"],
    ["ff.net.2"],
    ["time_emb_proj"],
    ["mid_block.resnets.0.time_emb_proj"],
    ["conv1"],
    ["conv2"],
    ["conv_shortcut"],
    ["upsamplers.0.conv", "downsamplers.0.conv"],
]


def add_lora(unet, target_modules=ATTENTIONS, name="default", seed=0, std=0.5, **options):
    """Adds an adapter whose B is random, so that it changes the result."""
    torch.manual_seed(seed)
    unet.add_adapter(LoraConfig(**{"r": 4, "target_modules": target_modules} | options), adapter_name=name)
    for parameter in weights_of(unet, f"lora_B.{name}."):
        parameter.normal_(std=std)
    return unet


def weights_of(unet, part="lora_"):
    return [parameter for name, parameter in unet.named_parameters() if part in name]


@pytest.fixture
def pair():
    """A fused and an unfused UNet."""
    return fused(), quantized()


@pytest.fixture
def assert_fused_alike(relative_rms):
    """Asserts that no block of a fused UNet steps aside, and that blocks and UNet compute as unfused ones."""

    def assert_fused_alike(pair, **arguments):
        actual, expected = pair
        with no_block_may_step_aside():
            result = call(actual, **arguments)
        assert relative_rms(result, call(expected, **arguments)) < FLIPS
        with blocks_compared(relative_rms):
            call(actual, **arguments)

    return assert_fused_alike


@pytest.mark.supports(
    "Adapters and attention",
    "LoRA",
    "runs inside fused blocks; several at once, scales, switches",
    "with biases, active dropout, gradients or hooks: unfused",
)
@pytest.mark.parametrize("target_modules", TARGETS, ids=", ".join)
def test_adapter_works_inside_of_fused_blocks(assert_fused_alike, relative_rms, pair, target_modules):
    without = call(pair[1])

    for unet in pair:
        add_lora(unet, target_modules)

    assert relative_rms(call(pair[1]), without) > 2 * FLIPS
    assert_fused_alike(pair)
    pair[0].disable_adapters()
    assert torch.equal(call(pair[0]), call(fused()))


@pytest.mark.parametrize("target_modules", [ATTENTIONS, ["proj_in", "proj_out"]], ids=", ".join)
def test_adapter_works_where_all_projections_are_linear(assert_fused_alike, target_modules):
    assert_fused_alike([add_lora(make("linear projections"), target_modules) for make in (fused, quantized)])


def test_adapter_works_with_int8_attention(assert_fused_alike, relative_rms, pair, monkeypatch):
    # Both forwards compute norms in PyTorch: last bits that differ would be rounded to other integers, several times.
    monkeypatch.setattr(compiled, "library", lambda: None)
    for unet in pair:
        for attention in modules_of(unet, Attention):
            attention.set_processor(Int8AttnProcessor())
    without = call(pair[1])

    for unet in pair:
        add_lora(unet)

    assert relative_rms(call(pair[1]), without) > 2 * FLIPS
    assert_fused_alike(pair)


def test_adapter_works_where_hidden_states_attend_to_themselves(assert_fused_alike):
    assert_fused_alike([add_lora(make("prompt left out"), ["to_k", "to_v"]) for make in (fused, quantized)])


@pytest.mark.parametrize("activation_bits", [8, 4])
@pytest.mark.parametrize(
    "target_modules", [ATTENTIONS, ["conv1", "conv2", "conv_shortcut"], ["ff.net.0.proj", "ff.net.2"]], ids=str
)
def test_error_against_the_floating_point_unet_is_that_of_the_unfused_one(
    relative_rms, target_modules, activation_bits
):
    reference = new_unet("conv projections")
    expected = calibrate(copy.deepcopy(reference), activation_bits=activation_bits)
    actual = copy.deepcopy(expected)
    fuse(actual)
    target, result, fused_result = (call(add_lora(unet, target_modules)) for unet in (reference, expected, actual))

    assert relative_rms(result, target) > 0.01
    assert relative_rms(fused_result, target) < 1.05 * relative_rms(result, target)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_adapter_works_in_half_precision(relative_rms, dtype):
    """Weights of the adapter in fp32 are rounded to the dtype of the UNet."""
    target = call(add_lora(quantized()))
    errors = []
    for unet in (fused(), quantized()):
        add_lora(unet.to(dtype))
        arguments = {"encoder_hidden_states": arguments_of(unet)["encoder_hidden_states"].to(dtype)}
        result = unet(noise(unet).to(dtype), MIXED, **arguments).sample
        assert result.dtype == dtype
        errors.append(relative_rms(result, target))

    assert errors[0] < 1.2 * errors[1]


# Launches: SD1.5's topology, narrow.
SD15 = {
    "block_out_channels": (8, 16, 16, 16),
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}


def kernels(unet):
    """Kernels of a call at SD1.5's image size, at which self-attention has many keys and cross-attention few."""
    call(unet, size=(64, 64))
    with Operators() as operators:
        call(unet, size=(64, 64))
    return operators.kernels


def test_adapter_on_all_attentions_launches_half_as_many_kernels_more_at_most():
    unet = calibrate(new_unet("conv projections", **SD15))
    fuse(unet)
    without = kernels(unet)

    add_lora(unet, r=16)

    assert len(modules_of(unet, BasicTransformerBlock)) == 16
    assert without < kernels(unet) <= 1.5 * without


def test_weights_are_stacked_once_and_take_no_memory():
    unet = add_lora(fused())
    before = sum(parameter.nbytes for parameter in weights_of(unet))
    call(unet)
    with Operators() as operators:
        call(unet)
    other = fused()
    with Operators() as without:
        call(other)

    assert operators.count()["cat"] == without.count()["cat"]
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in weights_of(unet)}
    assert sum(storages.values()) == before
    blocks = len(modules_of(unet, BasicTransformerBlock))
    # A and B: of to_out, to_q and to_out; of q, k, v as one; of all keys and values, in one A and a B for each width.
    assert len(storages) == 6 * blocks + 2 * blocks + 3


def test_stacked_weights_are_views_of_one():
    parts = [torch.nn.Parameter(torch.randn(rows, 5), requires_grad=False) for rows in (2, 3, 4)]
    expected = torch.cat(parts)

    for _ in range(2):
        assert torch.equal(stacked(parts), expected)
    parts[1].data.copy_(torch.ones(3, 5))
    parts[2].data = torch.zeros(4, 5)
    assert torch.equal(stacked(parts), torch.cat(parts))
    assert torch.equal(stacked(parts[1:]), torch.cat(parts[1:]))
    assert torch.equal(stacked(parts[::-1]), torch.cat(parts[::-1]))
    assert torch.equal(stacked([parts[0], parts[1].half()]), torch.cat(parts[:2]))


# Changes between calls, which need no further call.


def two_adapters(unet):
    add_lora(unet, name="first")
    add_lora(unet, ["to_q", "to_v", "conv1"], name="second", seed=1, r=2)
    return unet


CHANGES = {
    "both": lambda unet: unet.set_adapters(["first", "second"]),
    "weights": lambda unet: unet.set_adapters(["first", "second"], [0.5, -1.0]),
    "weights by block": lambda unet: unet.set_adapters("first", {"down": 0.5, "mid": 2.0, "up": 0.1}),
    "other": lambda unet: unet.set_adapters("first"),
    "off": lambda unet: unet.disable_adapters(),
    "deleted": lambda unet: unet.delete_adapters("second"),
    "all deleted": lambda unet: unet.delete_adapters(["first", "second"]),
    "in place": lambda unet: [parameter.mul_(-1) for parameter in weights_of(unet, "lora_A")],
    "through data": lambda unet: [parameter.data.mul_(-1) for parameter in weights_of(unet, "lora_A")],
    "loaded": lambda unet: unet.load_state_dict(
        {name: -tensor for name, tensor in unet.state_dict().items() if "lora_B" in name}, strict=False
    ),
    "swapped": lambda unet: [torch.utils.swap_tensors(p, torch.nn.Parameter(-p)) for p in weights_of(unet, "lora_B")],
    "replaced": lambda unet: [setattr(p, "data", -p) for p in weights_of(unet, "lora_B")],
    "scalings on the device": lambda unet: [
        module.scaling.update({name: torch.tensor(0.7 * scaling) for name, scaling in module.scaling.items()})
        for module in unet.modules()
        if hasattr(module, "scaling")
    ],
}  # fmt: skip


@pytest.mark.supports(
    "Adapters and attention",
    "LoRA",
    "runs inside fused blocks; several at once, scales, switches",
    "with biases, active dropout, gradients or hooks: unfused",
)
@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_adapters_are_seen(assert_fused_alike, relative_rms, pair, change):
    for unet in pair:
        two_adapters(unet)
    before = call(pair[0])

    for unet in pair:
        CHANGES[change](unet)

    assert relative_rms(call(pair[0]), before) > 2 * FLIPS
    assert_fused_alike(pair)


def test_scale_of_one_call_is_heeded(assert_fused_alike, relative_rms, pair):
    for unet in pair:
        add_lora(unet, ["to_q", "to_v", "conv1"])

    scaled = call(pair[0], cross_attention_kwargs={"scale": 0.2})

    assert relative_rms(scaled, call(pair[0])) > 2 * FLIPS
    assert_fused_alike(pair, cross_attention_kwargs={"scale": 0.2})


def test_adapters_of_several_shapes_and_scalings_share_a_group(assert_fused_alike, pair):
    for unet in pair:
        add_lora(unet, ATTENTIONS, rank_pattern={"to_v": 2}, alpha_pattern={"attn1.to_k": 3, "attn2.to_k": 5})

    assert_fused_alike(pair)


def test_unet_may_be_fused_with_an_adapter_and_unfused(assert_fused_alike):
    unet = add_lora(quantized())
    expected = call(unet)

    fuse(unet)

    assert torch.equal(call(unet), call(add_lora(fused())))
    assert_fused_alike((unet, add_lora(quantized())))
    unfuse(unet)
    assert torch.equal(call(unet), expected)


@pytest.mark.parametrize("fused_first", [True, False])
def test_without_the_adapter_results_are_what_they_were(fused_first):
    unet = fused() if fused_first else quantized()
    add_lora(unet, [*ATTENTIONS, "conv1", "time_emb_proj"])
    if not fused_first:
        fuse(unet)
    call(unet)

    unet.unload_lora()

    assert torch.equal(call(unet), call(fused()))
    assert not weights_of(unet)


def test_deleted_adapter_is_freed():
    unet = two_adapters(fused())
    unet.set_adapters("first")
    call(unet)
    storages = [weakref.ref(parameter.untyped_storage()) for parameter in weights_of(unet, "first")]

    unet.delete_adapters("first")

    gc.collect()
    assert storages
    assert not [storage for storage in storages if storage() is not None]


def test_copy_of_a_unet_with_an_adapter_is_on_its_own():
    unet = add_lora(fused())
    expected = call(unet)

    duplicate = copy.deepcopy(unet)
    for parameter in weights_of(unet):
        parameter.zero_()

    assert torch.equal(call(duplicate), expected)
    assert {group.places[0][0] for group in groups_of(duplicate)} <= set(duplicate.modules())


def test_adapter_of_a_fused_unet_is_saved_and_loaded(tmp_path):
    unet = add_lora(fused())
    expected = call(unet)

    unet.save_lora_adapter(tmp_path)

    loaded = fused()
    loaded.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    assert torch.equal(call(loaded), expected)


# Adapters that need PEFT's own forward.


def first_wrapper(unet):
    return unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q


def in_training_with_dropout(unet):
    add_lora(unet, lora_dropout=0.5)
    for module in unet.modules():
        if type(module) is torch.nn.Dropout and module.p == 0.5:
            module.train()


def hooked(part):
    def add(unet):
        add_lora(unet)
        part(first_wrapper(unet)).register_forward_hook(lambda module, args, output: 3 * output)

    return add


UNUSUAL = {
    "bias": lambda unet: [p.normal_() for p in weights_of(add_lora(unet, lora_bias=True), "lora_B") if p.ndim == 1],
    "dropout": in_training_with_dropout,
    "hook on the adapter": hooked(lambda wrapper: wrapper),
    "hook on its first layer": hooked(lambda wrapper: wrapper.lora_A["default"]),
    "hook on its second layer": hooked(lambda wrapper: wrapper.lora_B["default"]),
    "hook on the quantized layer": hooked(lambda wrapper: wrapper.base_layer),
    "other forward": lambda unet: setattr(first_wrapper(add_lora(unet)), "forward", lambda x: 2 * x),
}


@pytest.mark.supports("Adapters and attention", "LoRA with biases, dropout or hooks", "runs unfused")
@pytest.mark.parametrize("unusual", UNUSUAL)
def test_unusual_adapters_run_unfused(relative_rms, pair, unusual):
    for unet in pair:
        UNUSUAL[unusual](unet)
    torch.manual_seed(1)
    expected = call(pair[1])
    torch.manual_seed(1)

    assert relative_rms(call(pair[0]), expected) < FLIPS
    with no_block_may_step_aside(), pytest.raises(AssertionError, match=r"FusedBasicTransformerBlock.* runs unfused"):
        call(pair[0])


def test_gradients_of_an_adapter_are_those_of_the_unfused_unet(pair):
    """Of the last quantized layer: no gradient passes through those behind another one."""
    gradients = []
    for unet in pair:
        add_lora(unet, ["up_blocks.1.attentions.1.proj_out"])
        with torch.enable_grad():
            call(unet).square().sum().backward()
        gradients.append([parameter.grad for parameter in weights_of(unet)])

    assert len(gradients[0]) == 2
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=FLIPS, atol=FLIPS * expected.abs().max().item())
