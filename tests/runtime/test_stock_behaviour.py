"""What users of ``nn.Conv2d`` and ``nn.Linear`` read from a quantized layer, and set on it."""

import copy
import gc
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, MotionAdapter, UNet2DModel, UNetMotionModel
from peft import LoHaConfig, LoKrConfig, LoraConfig
from torch import nn

import dq_runtime
from dq_kernels import reference
from dq_runtime.layers import quantized_layers

CONV = nn.Conv2d(6, 4, 3, padding=1)
LINEAR = nn.Linear(6, 4)


def values(layer):
    return reference.dequantize_weight(layer.packed_weight, layer.weight_scale, layer.weight_dilation).movedim(-1, 1)


@pytest.fixture(params=[LINEAR, CONV], ids=["linear", "conv"])
def layer(request, new_layer):
    layer = new_layer(request.param)
    layer.timestep_grid.index = torch.zeros(2, dtype=torch.int32)
    return layer


@pytest.fixture
def conv(new_layer):
    conv = new_layer(CONV)
    conv.timestep_grid.index = torch.zeros(2, dtype=torch.int32)
    return conv


def image():
    return torch.randn(2, 6, 8, 8, generator=torch.Generator().manual_seed(4))


# Reading.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weight_is_the_rounded_one_in_the_stock_shape_and_compute_dtype(layer, dtype):
    layer.to(dtype)

    assert isinstance(layer.weight, torch.Tensor)
    assert layer.weight.shape == values(layer).shape
    assert layer.weight.dtype == dtype
    assert not layer.weight.requires_grad
    assert torch.equal(layer.weight + 0, values(layer).to(dtype))
    assert type(layer.weight.double()) is torch.Tensor
    assert layer.weight.tolist() == values(layer).to(dtype).tolist()
    if dtype != torch.bfloat16:  # NumPy has none
        assert (layer.weight.detach().numpy() == values(layer).to(dtype).numpy()).all()
    assert torch.equal(layer.weight[1:].flatten(1).t() + 0, values(layer).to(dtype)[1:].flatten(1).t())


def test_weight_without_bias_follows_a_cast(new_layer):
    assert new_layer(nn.Linear(6, 4, bias=False)).half().weight.dtype == torch.float16


def test_properties_of_the_weight_compute_no_values(layer, monkeypatch):
    monkeypatch.setattr(type(layer), "stock_weight_values", lambda self: pytest.fail("dequantized"))

    assert layer.weight.dtype == torch.float32
    assert layer.weight.numel() == layer.weight.shape.numel()
    assert layer.weight.device == layer.packed_weight.device
    assert layer.weight.data.detach().ndim == layer.weight.ndim


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.weight.mul_(2),
        lambda layer: layer.weight.data.copy_(layer.weight + 1),
        lambda layer: nn.init.zeros_(layer.weight),
        lambda layer: setattr(layer.weight, "data", layer.weight + 1),
        lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight + 1)),
        lambda layer: setattr(layer, "weight", layer.weight + 1),
        lambda layer: layer.weight.__setitem__(0, 0.0),
        lambda layer: layer.weight.data[1:].fill_(0),
        lambda layer: layer.weight.view(-1).zero_(),
        lambda layer: layer.weight.flatten(1).t().mul_(2),
        lambda layer: layer.weight.unbind()[0].zero_(),
        lambda layer: torch.mul(layer.weight, 2, out=layer.weight),
        lambda layer: torch._foreach_mul_([layer.weight], 2),
    ],
    ids=[
        "in place",
        "data in place",
        "init",
        "set data",
        "set parameter",
        "set tensor",
        "item",
        "slice of data",
        "view",
        "view of a view",
        "one of several views",
        "out",
        "foreach",
    ],
)
def test_change_of_the_weight_is_refused_with_its_name(layer, change):
    before = layer.packed_weight.clone()

    with pytest.raises(ValueError, match=r"mid_block.layer.weight .*dequantize\(\)"):
        change(layer)
    assert torch.equal(layer.packed_weight, before)


@pytest.mark.parametrize("name", ["in_channels", "out_channels", "kernel_size", "groups"])
def test_change_of_the_shape_is_refused_with_its_name(conv, name):
    with pytest.raises(ValueError, match=rf"mid_block\.layer\.{name} cannot be changed"):
        setattr(conv, name, 2)


@pytest.mark.supports("Adapters and attention", "LoHa, LoKr, DoRA", "change the UNet as its rounded stock form")
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["to_q", "conv1"], use_dora=True, init_lora_weights=False),
        LoHaConfig(alpha=256, target_modules=["to_q", "conv1"], init_weights=False),
        LoKrConfig(target_modules=["to_q", "conv1"], init_weights=False),
    ],
    ids=["DoRA", "LoHa", "LoKr"],
)
def test_adapters_that_read_the_weight_change_a_quantized_unet_as_its_stock_form(unet2d_condition, config):
    """Their random weights are drawn from the seed in the same order."""
    quantized, dequantized = unet2d_condition.copy(), unet2d_condition.copy().dequantize()
    plain = unet2d_condition.call(dequantized, 0)
    for unet in (quantized, dequantized):
        torch.manual_seed(0)
        unet.add_adapter(copy.deepcopy(config))
        unet.eval()
    expected = unet2d_condition.call(dequantized, 0)
    error = unet2d_condition.call(quantized, 0) - expected

    assert (expected - plain).norm() > 2 * error.norm()
    assert error.norm() < 1.25 * (unet2d_condition.call(unet2d_condition.quantized, 0) - plain).norm()


def test_adapters_get_the_dtype_of_their_unet(unet2d_condition):
    unet = unet2d_condition.copy().to(torch.bfloat16)
    unet.add_adapter(LoraConfig(target_modules=["to_q"]))

    (down,) = {m.weight.dtype for n, m in unet.named_modules() if n.endswith("lora_A.default")}
    assert down == torch.bfloat16


def test_number_of_parameters_is_that_of_the_stock_unet(subject):
    assert subject.quantized.num_parameters() == subject.stock.num_parameters()
    assert subject.quantized.num_parameters(only_trainable=True) == 0


def test_models_are_made_of_the_layers_of_a_quantized_unet(unet2d_condition):
    unet = unet2d_condition.quantized
    motion = MotionAdapter(
        block_out_channels=unet.config.block_out_channels, motion_layers_per_block=1,
        motion_mid_block_layers_per_block=1, motion_num_attention_heads=2, motion_norm_num_groups=4,
    )  # fmt: skip
    dequantized = unet2d_condition.copy().dequantize()

    controlnet, video = ControlNetModel.from_unet(unet), UNetMotionModel.from_unet2d(unet, motion)

    name = "mid_block.resnets.0.conv1.weight"
    for made in (controlnet, video):
        assert torch.equal(made.state_dict()[name], dequantized.state_dict()[name])
    assert quantized_layers(unet)


# Setting.


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_padding_mode_is_heeded(conv, mode):
    x = image()
    conv.padding_mode = mode
    padded = F.pad(x, (1, 1, 1, 1), mode=mode)

    y = conv(x)

    conv.padding_mode, conv.padding = "zeros", 0
    assert torch.equal(y, conv(padded))


@pytest.mark.parametrize("owner", ["layer", "class"])
def test_own_conv_forward_is_heeded(conv, owner, monkeypatch):
    """Seamless tiling in one direction is done so."""
    x = image()

    def tiled(self, x, weight, bias):
        x = F.pad(F.pad(x, (1, 1, 0, 0), mode="circular"), (0, 0, 1, 1))
        return F.conv2d(x, weight, bias, self.stride, 0, self.dilation)

    if owner == "layer":
        conv._conv_forward = tiled.__get__(conv)
    else:
        monkeypatch.setattr(nn.Conv2d, "_conv_forward", tiled)

    torch.testing.assert_close(conv(x), tiled(conv, x, values(conv), conv.bias))


@pytest.mark.parametrize(
    ("setting", "value", "same"),
    [("padding", 2, (2, 2)), ("padding", "same", (1, 1)), ("padding", "valid", (0, 0)), ("dilation", [2, 1], (2, 1))],
)
def test_settings_are_heeded_in_every_form_of_the_stock_layer(conv, setting, value, same):
    setattr(conv, setting, value)

    stock = nn.Conv2d(6, 4, 3, **{"padding": 1, setting: value})
    assert getattr(conv, setting) == same
    assert conv(image()).shape == stock(image()).shape


@pytest.mark.parametrize("value", [-1, 1.5, (1, 2, 3), "reflect", None, (1, -1)])
def test_settings_that_the_stock_layer_refuses_are_refused(conv, value):
    with pytest.raises(ValueError, match=r"mid_block\.layer\.padding must be"):
        conv.padding = value
    assert conv.padding == (1, 1)


def tile(unet):
    for module in unet.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "circular"
    return unet


@pytest.mark.supports("Pipelines", "seamless tiling", "`padding_mode` is heeded before and after quantization")
@pytest.mark.parametrize("fuse", [False, True], ids=["unfused", "fused"])
def test_seamless_tiling_of_a_unet(unet2d_condition, fuse):
    subject, unet = unet2d_condition, unet2d_condition.copy()
    plain = (subject.call(unet) - subject.call(subject.copy().dequantize())).norm()
    if fuse:
        dq_runtime.fuse(unet)
    tile(unet)

    error = subject.call(unet) - subject.call(tile(subject.copy().dequantize()))

    assert error.norm() < 1.25 * plain


def test_tiled_unet_is_calibrated_tiled(new_unet, calibration_call):
    unet = tile(new_unet())
    stock = copy.deepcopy(unet)
    dq_runtime.calibrate(
        unet, calibration_call(unet), dq_runtime.DilateQuantConfig(dilation="weight"), distillation=None
    )
    sample = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))

    assert len(quantized_layers(unet)) > 20
    assert all(layer.padding_mode == "circular" for n, layer in quantized_layers(unet).items() if "conv" in n)
    expected = stock(sample, 500).sample
    assert (unet(sample, 500).sample - expected).norm() < 0.2 * expected.norm()


# Threads.


@pytest.mark.supports(
    "Compiling, exporting, graphs", "threads", "may share a model", "one at a time if it has compiled code"
)
@pytest.mark.parametrize("fuse", [False, True], ids=["unfused", "fused"])
def test_threads_share_a_unet(subject, fuse):
    unet = subject.copy()
    if fuse:
        dq_runtime.fuse(unet)
    timesteps = [750, 500, 250, 0]
    expected = [subject.call(unet, timestep) for timestep in timesteps]
    differing = []

    def sample(number):
        for i in range(6):
            at = (number + i) % len(timesteps)
            with torch.no_grad():
                if not torch.equal(subject.call(unet, timesteps[at]), expected[at]):
                    differing.append(timesteps[at])

    threads = [threading.Thread(target=sample, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not differing


# Gradients.


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_is_trained_on_the_packed_weights(unet2d_condition, checkpointing):
    """Its gradients are near those on the stock UNet, also if the blocks run again in the backward pass."""
    subject, gradients = unet2d_condition, []
    for unet in (subject.copy(), copy.deepcopy(subject.stock)):
        torch.manual_seed(0)
        unet.requires_grad_(False).add_adapter(
            LoraConfig(r=4, target_modules=["to_q", "to_v", "conv1", "time_emb_proj"], init_lora_weights=False)
        )
        unet.train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        trained = [p for p in unet.parameters() if p.requires_grad]
        with torch.enable_grad():
            loss = sum(unet(subject.sample, t, **subject.arguments).sample.square().sum() for t in (0, 100))
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)]))
    assert len(trained) > 20
    assert torch.cosine_similarity(*gradients, dim=0) > 0.9


def losses_of_training(unet, subject, steps=8):
    """Trains a LoRA, at two timesteps, towards other images than the stock UNet's: the loss before each step."""
    torch.manual_seed(0)
    unet.requires_grad_(False).add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v", "to_out.0", "conv1"]))
    unet.train()
    trained = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    timesteps = (0, 100)
    targets = [0.5 * subject.call(subject.stock, timestep) for timestep in timesteps]
    losses = []
    for step in range(steps):
        at = step % len(timesteps)
        with torch.enable_grad():
            loss = F.mse_loss(subject.call(unet, timesteps[at]), targets[at])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


@pytest.mark.supports(
    "Training and gradients",
    "LoRA training",
    "loss within 1.1 of that on stock weights, with gradient checkpointing",
    "packed weights and tables are not trained",
)
def test_lora_learns_on_the_packed_weights_what_it_learns_on_the_stock_ones(unet2d_condition):
    """The packed UNet also with gradient checkpointing."""
    subject = unet2d_condition
    expected = losses_of_training(copy.deepcopy(subject.stock), subject)
    unet = subject.copy()
    unet.enable_gradient_checkpointing()
    losses = losses_of_training(unet, subject)

    assert expected[-1] < 0.4 * expected[0]
    assert losses[-1] < 1.1 * expected[-1]


def test_gradient_checkpointing_changes_no_gradient(unet2d_condition):
    subject, gradients = unet2d_condition, []
    for checkpointing in (False, True):
        unet = subject.copy().train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        sample = subject.sample.clone().requires_grad_()
        with torch.enable_grad():
            loss = sum(unet(sample, torch.tensor([t, 20]), **subject.arguments).sample.sum() for t in (750, 0))
        gradients += torch.autograd.grad(loss, sample)
    torch.testing.assert_close(*gradients)


@pytest.mark.supports("Casting", "`torch.set_default_dtype`", "changes no table")
def test_default_dtype_changes_no_table(new_unet, calibration_call):
    unet, other = new_unet(), new_unet()
    calls = calibration_call(unet)
    config = dq_runtime.DilateQuantConfig(dilation="none")
    dq_runtime.calibrate(unet, calls, config, distillation=None)
    torch.set_default_dtype(torch.bfloat16)
    try:
        dq_runtime.calibrate(other, calls, config, distillation=None)
    finally:
        torch.set_default_dtype(torch.float32)
    for (name, expected), tensor in zip(unet.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(tensor, expected), name


def test_compiled_unet_is_recorded_calibrated_and_fused(new_unet):
    unet = new_unet(block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    compiled = torch.compile(unet, backend="eager")
    sample = torch.randn(1, 3, 8, 8)
    expected = compiled(sample, 500).sample
    with dq_runtime.record(compiled) as calls:
        compiled(sample, 500)

    assert (
        dq_runtime.calibrate(compiled, calls, dq_runtime.DilateQuantConfig(dilation="weight"), distillation=None)
        is compiled
    )
    dq_runtime.fuse(compiled)

    result = compiled(sample, 500).sample
    assert 0 < (result - expected).norm() < 0.2 * expected.norm()
    torch.testing.assert_close(result, unet(sample, 500).sample, rtol=0, atol=1e-2)


def test_fuse_lora_without_an_adapter_in_the_unet_does_nothing(unet2d_condition):
    unet = unet2d_condition.copy()

    unet.fuse_lora()
    assert torch.equal(unet2d_condition.call(unet), unet2d_condition.call(unet2d_condition.quantized))


@pytest.mark.parametrize("fused", [False, True])
def test_a_model_is_freed_with_its_last_reference(unet2d, tmp_path, fused):
    """Not when the garbage collector runs: a GPU's memory would wait for it."""
    unet2d.quantized.save_pretrained(tmp_path)
    gc.collect()
    gc.disable()
    try:
        unet = UNet2DModel.from_pretrained(tmp_path)
        if fused:
            dq_runtime.fuse(unet)
        unet2d.call(unet)
        watched = weakref.ref(unet)
        del unet
        assert watched() is None
    finally:
        gc.enable()
