"""State of a fused UNet: memory, saved and moved weights, results within one forward pass; and unfusing."""

import copy
import weakref

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from fused_unets import (
    BATCH,
    FLIPS,
    MIXED,
    arguments_of,
    calibrate,
    call,
    fused,
    groups_of,
    modules_of,
    new_unet,
    noise,
    quantized,
)

from dq_kernels import ops, reference
from dq_runtime.fused import LinearGroup, fuse, unfuse
from dq_runtime.layers import quantized_layers

pytestmark = pytest.mark.usefixtures("contiguous_group_norm")


# Memory and weights after the model is saved, loaded, cast, copied or moved.


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
        for name in ("packed_weight", "weight_scale", "weight_sum", *(("bias",) if group.bias is not None else ())):
            held = {getattr(layer, name).untyped_storage().data_ptr() for layer in group.layers}
            assert held == {getattr(group, name).untyped_storage().data_ptr()}, name


@pytest.mark.parametrize("tokens", [128, 65])
def test_group_also_computes_the_statistics_of_its_result(tokens):
    unet = fused()
    group = modules_of(unet, BasicTransformerBlock)[0].self_attention
    group.layers[0].timestep_grid.index = torch.tensor([1, 0], dtype=torch.int32)
    q = torch.randint(-128, 128, (2, tokens, 32), generator=torch.Generator().manual_seed(0)).to(torch.int8)

    y, statistics = group.multiply_with_statistics(q, torch.float32)

    assert torch.equal(y, group.multiply(q, torch.float32))
    if tokens % ops.STATISTICS_ROWS:
        assert statistics is None
    else:
        torch.testing.assert_close(statistics, reference.channel_statistics(y[:, :, None]))


def test_fusing_takes_no_memory():
    unet = quantized()
    before = sum(storages(unet.state_dict().values()).values())

    fuse(unet)

    held = [*unet.state_dict().values(), *(tensor for group in groups_of(unet) for tensor in group_tensors(group))]
    assert sum(storages(held).values()) == before


def test_fused_unet_is_saved_as_the_unfused_one(tmp_path, assert_same_tensors):
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
        layer.packed_weight.copy_(layer.packed_weight.flip(0))
        layer.weight_sum.copy_(layer.weight_sum.flip(0))
        layer.weight_scale.copy_(2 * layer.weight_scale)
    if has_run:
        call(unet)

    unet.load_state_dict({name: tensor.clone() for name, tensor in other.state_dict().items()}, assign=assign)

    fuse(other)
    assert torch.equal(call(unet), call(other))


@pytest.mark.parametrize("move", [lambda unet: unet.to("meta"), lambda unet: unet.half()], ids=["moved", "cast"])
def test_what_was_merged_goes_with_the_unet_at_once(move):
    """No memory stays behind, and code that is compiled next reads the moved tensors."""
    unet = fused()
    groups = groups_of(unet)
    old = [weakref.ref(group.bias) for group in groups if group.bias is not None]
    assert old

    move(unet)

    layers = [layer for group in groups for layer in group.layers]
    assert len(layers) > 6
    for group in groups:
        assert {group.packed_weight.device} == {layer.packed_weight.device for layer in group.layers}
        assert group.packed_weight.shape[0] == sum(layer.packed_weight.shape[0] for layer in group.layers)
        for layer in group.layers:
            assert group.bias is None or group.bias.dtype == layer.bias.dtype == unet.dtype
    assert not any(reference() is not None for reference in old)
    unfuse(unet)
    assert not any("after_move" in vars(layer) for layer in layers)


@pytest.mark.parametrize("part", ["down_blocks", "mid_block", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"])
def test_weights_loaded_into_a_part_of_a_fused_unet_are_used(part):
    unet, other = fused(), quantized()
    call(unet)
    for layer in quantized_layers(other.get_submodule(part)).values() or [other.get_submodule(part)]:
        layer.packed_weight.copy_(layer.packed_weight.flip(0))
        layer.weight_sum.copy_(layer.weight_sum.flip(0))

    unet.get_submodule(part).load_state_dict(other.get_submodule(part).state_dict())

    fuse(other)
    assert torch.equal(call(unet), call(other))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_fused_unet_may_be_cast(relative_rms, dtype):
    """A fused block rounds to the dtype less often than the unfused one, whose norms compute in half precision."""
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

    holder = torch.nn.ModuleList(layers)
    group = LinearGroup([(holder, name) for name in "012"], F.silu)

    for layer, result in zip(reversed(layers), reversed(expected), strict=True):
        assert torch.equal(group.result(layer, x), result)
        assert torch.equal(layer(F.silu(x)), result)


@pytest.mark.parametrize("table", ["weight_dilation", "act_scale", "act_zero_point"])
def test_layers_of_unlike_quantizers_are_no_group(table):
    unet = quantized()
    changed = getattr(modules_of(unet, BasicTransformerBlock)[0].attn2.to_k, table)
    changed.copy_(changed + 1)

    fuse(unet)

    assert "encoder_hidden_states" not in modules_of(unet, ResnetBlock2D)[0].state.groups


# State that blocks share lasts for one forward pass.


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
    """The output of the middle block is read by the next block, and freed during the pass."""
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
    """Its quantizer depends on the timestep, even if the embedding is the same object."""
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


# Errors and dequantization.


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


@pytest.mark.parametrize("stock", [torch.nn.Linear(16, 16), torch.nn.Conv2d(16, 16, 3)], ids=["linear", "conv"])
def test_result_for_an_input_with_a_gradient_may_be_changed_in_place(new_layer, stock):
    """An attention processor with a parameter of its own may do so; the gradient still passes the layer."""
    layer = new_layer(stock)
    layer.timestep_grid.index = torch.tensor([0, 1], dtype=torch.int32)
    x = torch.randn(2, 16, 16) if isinstance(stock, torch.nn.Linear) else torch.randn(2, 16, 4, 4)
    expected = layer(x) + 1

    with torch.enable_grad():
        y = layer(x.requires_grad_())
        y += 1

        assert torch.equal(y.detach(), expected)
        y.sum().backward()
    assert x.grad.any()
