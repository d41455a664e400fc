"""Quantized layers: results, errors, and tables that casts, copies and adapters must not change."""

import copy
import io
import pickle

import pytest
import tiny_unets
import torch
from diffusers.hooks import apply_layerwise_casting
from peft import LoraConfig
from torch import nn

from dq_kernels import reference
from dq_kernels.ops import Quantizer
from dq_runtime import QuantConv2d, QuantLinear
from dq_runtime.layers import quantized_layers

# Integers are exact; the rest is fp32's error and, after it, one rounding to the dtype. A value half-way between two
# numbers of the dtype may be rounded to the other one: one of 48 values costs 7e-5 in fp16 and 6e-4 in bfloat16.
DTYPES = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 2e-4), (torch.bfloat16, 1e-3)], ids=str
)
LAYERS = {
    "linear": (nn.Linear(24, 16), (3, 5, 24)),
    "linear without bias": (nn.Linear(24, 16, bias=False), (3, 24)),
    "linear of odd channels": (nn.Linear(7, 5), (3, 2, 2, 7)),
    "conv 1x1": (nn.Conv2d(16, 8, 1), (3, 16, 4, 4)),
    "conv 3x3": (nn.Conv2d(16, 8, 3, padding=1), (3, 16, 5, 7)),
    "conv with stride": (nn.Conv2d(16, 8, 3, stride=2, padding=1), (3, 16, 7, 6)),
    "conv without bias or padding": (nn.Conv2d(16, 8, 3, bias=False), (3, 16, 5, 5)),
    "conv of odd channels": (nn.Conv2d(3, 5, 3, padding=1), (3, 3, 6, 6)),
    "conv with unequal sides": (
        nn.Conv2d(16, 8, (1, 5), stride=(2, 1), padding=(0, 3), dilation=(1, 2)),
        (3, 16, 4, 9),
    ),
}


@pytest.fixture(params=LAYERS)
def layer_and_input(request, new_layer):
    stock, shape = LAYERS[request.param]
    layer = new_layer(copy.deepcopy(stock))
    # About half of the quantizer's range at the largest scale, clipped at the smallest; dilation aside.
    return layer, 4 * torch.randn(shape, generator=torch.Generator().manual_seed(5))


@DTYPES
def test_integer_path_is_the_stock_layer_on_rounded_numbers(
    layer_and_input, dtype, tolerance, fake_quantized, relative_rms
):
    layer, x = layer_and_input
    x = x.to(dtype)
    rows = [2, 0, 1]
    layer.timestep_grid.index = torch.tensor(rows, dtype=torch.int32)

    y = layer(x)

    assert y.dtype == dtype
    assert relative_rms(y, fake_quantized(layer, x, rows).to(dtype)) < tolerance


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_activations_are_rounded_to_the_bits_of_the_config(new_layer, fake_quantized, relative_rms, bits):
    layer = new_layer(nn.Linear(24, 16), bits)
    layer.timestep_grid.index = torch.tensor([0, 1, 2], dtype=torch.int32)
    x = 4 * torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(5))

    y = layer(x)

    assert relative_rms(y, fake_quantized(layer, x, [0, 1, 2])) < 1e-6  # fp32's error
    q = layer.quantize(x)[0]
    assert (q.min(), q.max()) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)  # this input reaches both ends


@DTYPES
def test_every_layer_of_a_unet_is_its_stock_layer_on_rounded_numbers(
    subject, dtype, tolerance, fake_quantized, relative_rms
):
    rows, seen = [3, 0], {}
    unet = subject.copy().to(dtype)
    layers = quantized_layers(unet)
    for name, layer in layers.items():
        layer.register_forward_hook(lambda layer, args, y, name=name: seen.update({name: (args[0], y)}))

    result = subject.call(unet, torch.tensor([750, 0]), dtype)

    assert result.dtype == dtype
    assert seen.keys() == layers.keys()
    for name, (x, y) in seen.items():
        assert y.dtype == dtype, name
        assert relative_rms(y, fake_quantized(layers[name], x, rows).to(dtype)) < tolerance, name


@pytest.mark.parametrize("row", [0, 1, 2])
def test_conv_of_a_zero_image_is_its_bias_up_to_the_border(new_layer, row):
    layer = new_layer(nn.Conv2d(16, 8, 3, padding=2))
    layer.timestep_grid.index = torch.tensor([row], dtype=torch.int32)

    y = layer(torch.zeros(1, 16, 5, 5))

    assert layer.act_zero_point[row] != 0
    assert torch.equal(y, layer.bias.view(1, -1, 1, 1).expand(1, 8, 7, 7))


def test_dilation_leaves_a_layer_as_it_was_but_for_rounding(new_layer, relative_rms):
    """Powers of two: weights times s and activations divided by s are then exact."""
    layer = new_layer(nn.Linear(24, 16))
    layer.timestep_grid.index = torch.zeros(3, dtype=torch.int32)
    layer.weight_dilation.fill_(1)
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(5))
    expected = layer(x)

    layer.weight_dilation.copy_(2.0 ** torch.arange(24).remainder(3))

    assert torch.equal(layer(x * layer.weight_dilation), expected)


def test_conv_returns_channels_last(new_layer):
    layer = new_layer(nn.Conv2d(16, 8, 3, padding=1))
    layer.timestep_grid.index = torch.zeros(2, dtype=torch.int32)

    y = layer(torch.randn(2, 16, 6, 6))

    assert y.is_contiguous(memory_format=torch.channels_last)


def test_result_does_not_depend_on_the_strides_of_the_input(new_layer):
    layer = new_layer(nn.Conv2d(16, 8, 3, padding=1))
    layer.timestep_grid.index = torch.tensor([0, 2], dtype=torch.int32)
    x = torch.randn(2, 16, 6, 6)

    assert torch.equal(layer(x.contiguous(memory_format=torch.channels_last)), layer(x))
    assert torch.equal(layer(x.transpose(2, 3).contiguous().transpose(2, 3)), layer(x))


CASTS = {
    "half": lambda unet: unet.half(),
    "bfloat16": lambda unet: unet.bfloat16(),
    "to(float16)": lambda unet: unet.to(torch.float16),
    "to('cpu', bfloat16)": lambda unet: unet.to("cpu", torch.bfloat16),
    "half().float()": lambda unet: unet.half().float(),
    "double": lambda unet: unet.double(),
    "type(float16)": lambda unet: unet.type(torch.float16),
    "to(channels_last)": lambda unet: unet.to(memory_format=torch.channels_last),
    "layerwise casting": lambda unet: apply_layerwise_casting(unet, torch.float8_e4m3fn, torch.float32),
}


@pytest.mark.supports(
    "Casting", "`half()`, `to(dtype)`, layerwise casting", "tables and packed weights stay as they are"
)
@pytest.mark.parametrize("cast", CASTS)
def test_no_cast_touches_tables_and_packed_weights(subject, tables, assert_same_tensors, cast):
    unet = subject.copy()

    CASTS[cast](unet)

    assert_same_tensors(tables(unet), tables(subject.quantized))
    layers = quantized_layers(subject.quantized)
    for name, layer in quantized_layers(unet).items():
        assert layer.packed_weight.dtype == torch.uint8, name
        assert layer.packed_weight.is_contiguous(), name
        assert torch.equal(layer.packed_weight, layers[name].packed_weight), name


def test_casts_reach_what_is_not_quantized(subject):
    unet = subject.copy().half()

    assert unet.conv_in.weight.dtype == torch.float16
    assert all(layer.bias.dtype == torch.float16 for layer in quantized_layers(unet).values() if layer.bias is not None)
    assert unet.dtype == torch.float16


def test_channels_last_unet_gives_the_same_result(subject, relative_rms):
    unet = subject.copy().to(memory_format=torch.channels_last)

    # The layers that stay in floating point sum in another order; that flips a few quantized values.
    assert relative_rms(subject.call(unet), subject.call(subject.quantized)) < 1e-3


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda unet: pickle.loads(pickle.dumps(unet)),
    "torch.save": lambda unet: torch.load(_saved(unet), weights_only=False),
}


def _saved(unet):
    file = io.BytesIO()
    torch.save(unet, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
def test_copy_has_one_grid_of_its_own_and_the_same_outputs(subject, make_copy):
    unet = subject.quantized
    expected = subject.call(unet, torch.tensor([0, 750]))

    duplicate = make_copy(unet)

    assert duplicate.timestep_grid is not unet.timestep_grid
    for name, layer in quantized_layers(duplicate).items():
        assert layer.timestep_grid is duplicate.timestep_grid, name
    assert torch.equal(subject.call(duplicate, torch.tensor([0, 750])), expected)

    unet.timestep_grid.index = None  # the copy's layers must read the copy's own grid
    assert torch.equal(subject.call(duplicate, torch.tensor([0, 750])), expected)


@pytest.mark.parametrize("part", ["down_blocks.0.resnets.0.conv1", "mid_block"])
def test_copy_of_a_part_follows_the_timesteps_of_its_unet(unet2d, part):
    unet = unet2d.copy()
    expected = unet2d.call(unet, torch.tensor([0, 750]))

    duplicate = copy.deepcopy(unet.get_submodule(part))
    for layer in quantized_layers(duplicate).values() or [duplicate]:
        assert layer.timestep_grid is unet.timestep_grid
    unet.set_submodule(part, duplicate)

    assert torch.equal(unet2d.call(unet, torch.tensor([0, 750])), expected)


def test_dequantizing_a_copy_leaves_the_original_quantized(unet2d):
    expected = unet2d.call(unet2d.quantized)

    unet2d.copy().dequantize()

    assert torch.equal(unet2d.call(unet2d.quantized), expected)


def test_weights_loaded_in_place_are_used(unet2d, relative_rms):
    """Also in the CPU kernels, which cache each weight in another layout."""
    unet = unet2d.copy()
    expected = unet2d.call(unet)
    state = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    for layer in quantized_layers(unet).values():
        layer.packed_weight.fill_(0)
    assert relative_rms(unet2d.call(unet), expected) > 0.1

    unet.load_state_dict(state)

    assert torch.equal(unet2d.call(unet), expected)


def test_unet_runs_in_inference_mode(unet2d):
    expected = unet2d.call(unet2d.quantized)

    with torch.inference_mode():
        assert torch.equal(unet2d.call(unet2d.quantized), expected)


def test_unet_made_in_inference_mode_runs(unet2d):
    with torch.inference_mode():
        unet = unet2d.copy()
        assert next(iter(quantized_layers(unet).values())).packed_weight.is_inference()

        assert torch.equal(unet2d.call(unet), unet2d.call(unet2d.quantized))


@pytest.mark.parametrize(
    ("stock", "shape", "message"),
    [
        (nn.Linear(24, 16), (2, 5, 23), "24 channels, got 23"),
        (nn.Conv2d(16, 8, 3), (2, 15, 6, 6), "16 channels, got 15"),
    ],
    ids=["linear", "conv"],
)
def test_wrong_channel_count_is_refused_by_the_layer_s_name(new_layer, stock, shape, message):
    layer = new_layer(stock)
    layer.timestep_grid.index = torch.zeros(2, dtype=torch.int32)

    with pytest.raises(ValueError, match=rf"mid_block\.layer: .*{message}"):
        layer(torch.randn(shape))


@pytest.mark.parametrize(
    ("stock", "shape"), [(nn.Linear(24, 16), (3, 5, 24)), (nn.Conv2d(16, 8, 3), (3, 16, 6, 6))], ids=["linear", "conv"]
)
def test_wrong_batch_is_refused_by_the_layer_s_name(new_layer, stock, shape):
    layer = new_layer(stock)
    layer.timestep_grid.index = torch.zeros(2, dtype=torch.int32)

    with pytest.raises(ValueError, match=r"mid_block\.layer: .*2 samples.*got 3"):
        layer(torch.randn(shape))


def test_layer_without_a_timestep_is_refused_by_its_name(new_layer):
    with pytest.raises(RuntimeError, match=r"mid_block\.layer: .*timestep.*Call the UNet"):
        new_layer(nn.Linear(24, 16))(torch.randn(2, 24))


def test_a_forward_past_the_hooks_does_not_use_the_timestep_of_the_last_call(unet2d):
    unet = unet2d.copy()
    unet2d.call(unet, 500)

    with pytest.raises(RuntimeError, match="Call the UNet"):
        unet.forward(torch.zeros(1, 3, 8, 8), 500)


def test_prompt_of_another_batch_is_refused_by_the_layer_s_name(unet2d_condition):
    prompt = unet2d_condition.arguments["encoder_hidden_states"][:1]
    with pytest.raises(ValueError, match=r"attn2\.to_[kv]: .*2 samples.*got 1.*modules_to_not_convert"):
        unet2d_condition.quantized(unet2d_condition.sample, torch.tensor([500, 20]), encoder_hidden_states=prompt)


def test_layer_that_sees_another_batch_uses_the_one_timestep_of_all_samples(unet2d_condition):
    """An attention processor may change the batch, as that of perturbed-attention guidance does."""
    changed = unet2d_condition.copy()
    tiny_unets.attend_twice(changed)

    call = unet2d_condition.call
    torch.testing.assert_close(call(changed, 500), call(unet2d_condition.quantized, 500), rtol=0, atol=2e-2)
    for timestep in (torch.tensor(500), torch.tensor([500])):
        assert torch.equal(call(changed, timestep), call(changed, 500))
    with pytest.raises(ValueError, match=r"to_q: .*2 samples.*got 4"):
        call(changed, torch.tensor([500, 500]))


@pytest.mark.parametrize("stock", [nn.Linear(6, 5), nn.Conv2d(6, 5, 3, stride=2, padding=(1, 2), dilation=2)])
def test_gradient_of_an_input_is_that_of_the_rounded_weights(new_layer, stock):
    layer = new_layer(stock)
    layer.timestep_grid.index = torch.zeros(2, dtype=torch.int32)
    x = torch.randn(2, 6, 9, 9) if isinstance(stock, nn.Conv2d) else torch.randn(2, 4, 6)
    with torch.enable_grad():
        x.requires_grad_()
        y = layer(x)
        factors = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        (gradient,) = torch.autograd.grad((y * factors).sum(), x)
        stock = copy.deepcopy(stock)
        stock.weight = nn.Parameter(layer.weight + 0)
        (expected,) = torch.autograd.grad((stock(x) * factors).sum(), x)

    channels_last = x.detach().movedim(1, -1) if isinstance(stock, nn.Conv2d) else x.detach()
    index = torch.zeros(2, dtype=torch.int32)
    tables = layer.weight_dilation, layer.act_scale, layer.act_zero_point
    q = reference.quantize(channels_last, Quantizer(*tables, index, layer.activation_bits))
    inside = (q > -128) & (q < 127)
    assert inside.any()
    assert not inside.all()
    torch.testing.assert_close(gradient, expected * (inside.movedim(-1, 1) if isinstance(stock, nn.Conv2d) else inside))
    assert torch.equal(y.detach(), layer(x.detach()))


@pytest.mark.supports(
    "Training and gradients", "guidance by gradients", "gradients reach the latents", "compiled code passes none"
)
def test_gradient_reaches_the_sample_of_a_unet(subject):
    """As through the stock UNet, up to the rounding: for sampling that is guided by gradients."""
    gradients = []
    for unet in (subject.quantized, subject.stock):
        sample = subject.sample.clone().requires_grad_()
        with torch.enable_grad():
            unet(sample, 0, **subject.arguments).sample.square().sum().backward()
        gradients.append(sample.grad.flatten())

    assert torch.cosine_similarity(*gradients, dim=0) > 0.9


def test_a_quantized_unet_asks_for_no_gradient(subject):
    with torch.enable_grad():
        assert not subject.call(subject.quantized).requires_grad
    assert not any(parameter.requires_grad for parameter in subject.quantized.parameters())
    assert all(parameter.requires_grad for parameter in subject.copy().dequantize().parameters())


def test_quantized_layers_are_linears_and_convolutions(subject):
    """PEFT, layerwise casting and offloading choose modules by these classes."""
    for layer in quantized_layers(subject.quantized).values():
        assert type(layer) in (QuantLinear, QuantConv2d)
        assert isinstance(layer, nn.Linear if isinstance(layer, QuantLinear) else nn.Conv2d)
        assert not any(parameter.requires_grad for parameter in layer.parameters())


def add_lora(unet, target_modules):
    unet.add_adapter(LoraConfig(r=4, target_modules=target_modules))
    return [parameter for name, parameter in unet.named_parameters() if "lora_B" in name]


# conv1 is in the resnets (LoCon); proj_in, the entry of SD 1.x's transformers, is a 1x1 convolution.
@pytest.mark.parametrize("target_modules", [["to_q", "to_k", "to_v"], ["to_out.0"], ["proj_in"], ["conv1"]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_lora_adds_its_product_to_the_quantized_layer(unet2d_condition, relative_rms, target_modules, dtype):
    unet = unet2d_condition.copy().to(dtype)
    expected = unet2d_condition.call(unet, dtype=dtype)

    lora_b = add_lora(unet, target_modules)

    assert lora_b
    assert torch.equal(unet2d_condition.call(unet, dtype=dtype), expected)  # lora_B is initialised with zeros
    for parameter in lora_b:
        parameter.normal_(std=0.1)
    with_lora = unet2d_condition.call(unet, dtype=dtype)
    assert with_lora.dtype == dtype
    assert relative_rms(with_lora, expected) > 0.01
    unet.disable_adapters()
    assert torch.equal(unet2d_condition.call(unet, dtype=dtype), expected)


@pytest.mark.parametrize("target_modules", [["to_q"], ["conv1"]], ids=str)
def test_lora_is_never_lost_in_a_fused_weight(unet2d_condition, target_modules):
    unet = unet2d_condition.copy()
    for parameter in add_lora(unet, target_modules):
        parameter.normal_(std=0.1)
    expected = unet2d_condition.call(unet)

    with pytest.raises(ValueError, match="leave it loaded"):
        unet.fuse_lora(lora_scale=0.5)

    assert torch.equal(unet2d_condition.call(unet), expected)
