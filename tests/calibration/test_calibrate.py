"""Calibration end to end: tiny random UNets, and the trained digits UNet where accuracy is the claim."""

import copy
import logging
import math
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from accelerate import disk_offload
from diffusers import UNet2DConditionModel
from distilling import FEW_BLOCKS
from tiny_unets import unet2d, unet2d_condition
from torch import nn

import dq_runtime
from dq_kernels import reference
from dq_runtime import CalibrationSet, DilateQuantConfig, QuantConv2d, QuantLinear, calibrate, record
from dq_runtime.calibration.temporal import VALUES_PER_TIMESTEP
from examples.small_unets.digits import CLASS_CONDITIONAL

KEPT = {"conv_in", "conv_out"}
TIMESTEPS = [10.5, 250.0, 900.0]
SAMPLE_SIZES = (1, 5, 20)  # how large the samples are at each of them
LAST_LAYER = "up_blocks.1.resnets.1.conv2"  # its result reaches no quantized layer


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@dataclass(frozen=True)
class Subject:
    """A UNet before and after calibration."""

    stock: nn.Module
    quantized: nn.Module
    returned: nn.Module
    calibration_set: CalibrationSet
    config: DilateQuantConfig
    arguments: dict[str, Any]

    def call(self, unet, timestep, size):
        return unet(sample_for(unet) * size, timestep, **self.arguments).sample


def sample_for(unet, batch=2):
    shape = (batch, unet.config.in_channels, 8, 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(unet.dtype)


def recorded(unet, timesteps=(500,), **arguments):
    with record(unet) as calibration_set:
        for timestep in timesteps:
            unet(sample_for(unet), timestep, **arguments)
    return calibration_set


@pytest.fixture(scope="module", params=[unet2d, unet2d_condition])
def subject(request):
    """Calibrated on samples whose size depends on the timestep, two timesteps in some calls."""
    with torch.no_grad():
        unet = request.param()
        stock, sample = copy.deepcopy(unet), sample_for(unet)
        sizes = torch.tensor(SAMPLE_SIZES).view(3, 1, 1, 1)
        arguments = {}
        if request.param is unet2d_condition:
            arguments["encoder_hidden_states"] = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2))
        with record(unet) as calibration_set:
            unet(sample * sizes[1], 250, **arguments)
            unet(sample * sizes[[0, 2]], torch.tensor([10.5, 900.0]), **arguments)
            unet(sample * sizes[[2, 0]], torch.tensor([900.0, 10.5]), **arguments)
        config = DilateQuantConfig(dilation="weight")
        returned = calibrate(unet, calibration_set, config, distillation=None)
        return Subject(stock, unet, returned, calibration_set, config, arguments)


def quantized_layers(unet):
    return {name: module for name, module in unet.named_modules() if isinstance(module, (QuantLinear, QuantConv2d))}


def input_groups(layers):
    """Layers that see one tensor, as the architectures of diffusers have it; every other layer is alone."""
    groups = {}
    for name in layers:
        block, _, last = name.rpartition(".")
        if block.endswith("attn2") and last in ("to_k", "to_v"):
            groups.setdefault("encoder_hidden_states", []).append(name)
        elif last == "time_emb_proj":
            groups.setdefault("time embedding", []).append(name)
        elif last in ("to_q", "to_k", "to_v") and not block.endswith("attn2"):
            groups.setdefault(f"{block}, q k v", []).append(name)
        else:
            groups[name] = [name]
    return groups


def relative_rms(actual, expected):
    error = ((actual - expected).square().mean() / expected.square().mean()).sqrt().item()
    return math.inf if math.isnan(error) else error


def test_the_unet_itself_is_quantized_layer_by_layer(subject):
    stock = {name for name, module in subject.stock.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}

    assert subject.returned is subject.quantized
    assert quantized_layers(subject.quantized).keys() == stock - KEPT
    for name in KEPT:
        kept = subject.quantized.get_submodule(name)
        assert type(kept) is nn.Conv2d
        assert torch.equal(kept.weight, subject.stock.get_submodule(name).weight)


def test_the_config_records_the_calibrated_timesteps_and_leaves_the_users_alone(subject):
    stored = subject.quantized.config["quantization_config"]

    assert subject.calibration_set.timesteps == TIMESTEPS
    assert stored.timesteps == TIMESTEPS
    assert stored.modules_to_not_convert == ["conv_in", "conv_out"]
    assert subject.config == DilateQuantConfig(dilation="weight")
    for layer in quantized_layers(subject.quantized).values():
        assert layer.act_scale.shape == layer.act_zero_point.shape == (3,)


@pytest.mark.parametrize(("timestep", "size"), [*zip(TIMESTEPS, SAMPLE_SIZES, strict=True), (300, 5)])
def test_the_result_stays_close(subject, timestep, size):
    expected = subject.call(subject.stock, timestep, size)

    # Random weights are uniform: each layer's 4 bits cost 6 to 7 %, and the layers add up.
    assert 0 < relative_rms(subject.call(subject.quantized, timestep, size), expected) < 0.25


@pytest.mark.parametrize(("timestep", "size"), [*zip(TIMESTEPS, SAMPLE_SIZES, strict=True)])
def test_activations_of_eight_bits_cost_little(subject, timestep, size):
    rounded = copy.deepcopy(subject.stock)
    for name, layer in quantized_layers(subject.quantized).items():
        weight = reference.dequantize_weight(layer.packed_weight, layer.weight_scale, layer.weight_dilation)
        rounded.get_submodule(name).weight.copy_(weight.movedim(-1, 1))
    expected = subject.call(rounded, timestep, size)

    assert 0 < relative_rms(subject.call(subject.quantized, timestep, size), expected) < 0.05


def test_weights_are_the_rounded_dilated_ones(subject):
    for name, layer in quantized_layers(subject.quantized).items():
        original = subject.stock.get_submodule(name)
        restored = reference.dequantize_weight(layer.packed_weight, layer.weight_scale, layer.weight_dilation)
        assert relative_rms(restored, original.weight.movedim(1, -1)) < 0.12, name
        if original.bias is None:
            assert layer.bias is None, name
        else:
            assert torch.equal(layer.bias, original.bias), name


def test_layers_that_see_one_tensor_share_dilation_and_tables(subject):
    groups = input_groups(quantized_layers(subject.quantized))

    assert sum(len(names) == 3 for names in groups.values()) >= 3
    for names in groups.values():
        first, *others = (subject.quantized.get_submodule(name) for name in names)
        for name, other in zip(names[1:], others, strict=True):
            assert torch.equal(other.weight_dilation, first.weight_dilation), name
            assert torch.equal(other.act_scale, first.act_scale), name
            assert torch.equal(other.act_zero_point, first.act_zero_point), name


def test_the_shared_dilation_is_the_smallest_of_its_layers(subject):
    dilated = 0
    for names in input_groups(quantized_layers(subject.quantized)).values():
        per_layer = []
        for name in names:
            magnitude = subject.stock.get_submodule(name).weight.abs().flatten(2 if "conv" in name else 1)
            magnitude = magnitude.view(*subject.stock.get_submodule(name).weight.shape[:2], -1)
            per_layer.append((magnitude.amax((1, 2))[:, None] / magnitude.amax(2)).amin(0))
        expected = torch.stack(per_layer).amin(0).clamp(max=8)
        torch.testing.assert_close(subject.quantized.get_submodule(names[0]).weight_dilation, expected)
        dilated += int((expected > 1).sum())
    assert dilated > 0


def test_each_row_of_the_tables_fits_its_own_timestep(subject):
    """On what a layer sees at a timestep, its row must do as well as the range of just that would."""
    seen = {}

    def keep(name):
        def hook(layer, args):
            x = args[0].detach()
            seen.setdefault(name, []).append(x.movedim(1, -1) if isinstance(layer, nn.Conv2d) else x)

        return hook

    layers = quantized_layers(subject.quantized)
    stock = copy.deepcopy(subject.stock)
    for name in layers:
        stock.get_submodule(name).register_forward_pre_hook(keep(name))
    for call in subject.calibration_set.calls:
        call.run(stock)

    compared = 0
    for name, layer in layers.items():
        whole, mixed, swapped = seen[name]
        at_timestep = torch.cat([mixed[:1], swapped[1:]]), whole, torch.cat([mixed[1:], swapped[:1]])
        for t, x in enumerate(at_timestep):
            x = (x / layer.weight_dilation).double()
            low, high = x.min().clamp(max=0), x.max().clamp(min=0)
            plain_scale = (high - low) / 255
            plain_error = (torch.floor(x / plain_scale + 0.5) * plain_scale - x).square().sum()
            scale, zero_point = layer.act_scale[t].double(), layer.act_zero_point[t]
            q = (torch.floor(x / scale + 0.5) + zero_point).clamp(-128, 127)
            error = ((q - zero_point) * scale - x).square().sum()
            if x.numel() <= VALUES_PER_TIMESTEP:  # of more, the search saw a part
                assert error <= (1 + 1e-3) * plain_error, (name, t)
                compared += 1
    assert compared > 2 * len(layers)
    shortcut = "up_blocks.0.resnets.0.conv_shortcut"  # sees a sum with the sample, which no norm has scaled yet
    rows = layers[shortcut].act_scale
    assert rows[0] < rows[1] < rows[2]


def test_two_calibrations_agree_bit_by_bit():
    unet = unet2d()
    calibration_set = recorded(unet, (3, 400))
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append(calibrate(copy.deepcopy(unet), calibration_set, distillation=None).state_dict())

    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


def test_without_dilation_all_factors_are_one():
    unet = unet2d()
    calibrate(unet, recorded(unet), DilateQuantConfig(dilation="none"), distillation=None)

    assert all(bool((layer.weight_dilation == 1).all()) for layer in quantized_layers(unet).values())


def test_the_configs_cap_limits_the_dilation():
    unet = unet2d()
    calibrate(unet, recorded(unet), DilateQuantConfig(dilation="weight", max_dilation=1.0625), distillation=None)

    dilation = torch.cat([layer.weight_dilation for layer in quantized_layers(unet).values()])
    assert dilation.max() == 1.0625
    assert dilation.min() == 1


@pytest.mark.parametrize(
    ("groups", "timesteps"), [(1, [200.0]), (2, [1.5, 400.0]), (3, [0.0, 3.0, 400.0]), (9, [0.0, 3.0, 400.0])]
)
def test_timesteps_share_scales_in_groups_of_neighbours(groups, timesteps):
    unet = unet2d()
    calibrate(
        unet, recorded(unet, (3, 0, 400)), DilateQuantConfig(dilation="none", timestep_groups=groups), distillation=None
    )

    assert unet.config["quantization_config"].timesteps == timesteps
    assert all(len(layer.act_scale) == len(timesteps) for layer in quantized_layers(unet).values())


@pytest.mark.parametrize("bits", [6, 4])
def test_the_configs_activation_bits_reach_every_layer(bits):
    unet = unet2d()
    calibrate(
        unet, recorded(unet), DilateQuantConfig(activation_bits=bits, layer_activation_bits={}), distillation=None
    )

    layers = quantized_layers(unet).values()
    limit = 2 ** (bits - 1)
    assert {layer.activation_bits for layer in layers} == {bits}
    assert all(bool(((-limit <= layer.act_zero_point) & (layer.act_zero_point < limit)).all()) for layer in layers)
    assert max(layer.act_zero_point.min().item() for layer in layers) > -limit  # not all inputs are positive


def test_single_layers_can_have_other_activation_bits():
    unet = unet2d()
    wanted = {"conv_shortcut": 8, "up_blocks.1.resnets.0.conv_shortcut": 6}
    config = DilateQuantConfig(activation_bits=4, layer_activation_bits=wanted, dilation="weight")
    calibrate(unet, recorded(unet), config, dq_runtime.Distillation(samples=2, batch_size=2, iterations=1))

    bits = {name: layer.activation_bits for name, layer in quantized_layers(unet).items()}
    assert {bits[name] for name in bits if "conv_shortcut" not in name} == {4}
    assert bits["up_blocks.0.resnets.0.conv_shortcut"] == 8
    assert bits["up_blocks.1.resnets.0.conv_shortcut"] == 6
    layer = unet.get_submodule("up_blocks.0.resnets.0.conv_shortcut")
    unet.timestep_grid.index = torch.zeros(2, dtype=torch.int32)
    q = layer.quantize(torch.linspace(-100, 100, layer.in_channels).expand(2, 1, 1, -1))
    assert (q.min(), q.max()) == (-128, 127)


def test_layers_that_see_one_tensor_need_the_same_bits():
    unet = unet2d()
    calibration_set, before = recorded(unet), snapshot(unet)

    with pytest.raises(ValueError, match=r"down_blocks\.1\.attentions\.0\.to_q.*Give them the same"):
        calibrate(unet, calibration_set, DilateQuantConfig(layer_activation_bits={"to_q": 4}), distillation=None)
    assert_unchanged(unet, before)


def test_a_bf16_unet_gets_fp32_tables_and_stays_bf16():
    unet = unet2d().to(torch.bfloat16)
    stock = copy.deepcopy(unet)
    calibrate(unet, recorded(unet), distillation=None)

    output = unet(sample_for(unet), 500).sample
    layers = quantized_layers(unet).values()
    assert output.dtype == torch.bfloat16
    assert relative_rms(output.float(), stock(sample_for(stock), 500).sample.float()) < 0.15
    assert {layer.act_scale.dtype for layer in layers} == {torch.float32}
    assert {layer.bias.dtype for layer in layers if layer.bias is not None} == {torch.bfloat16}


def snapshot(unet):
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in unet.modules()]
    return [type(m) for m in unet.modules()], hooks, copy.deepcopy(unet.state_dict()), dict(unet.config)


def assert_unchanged(unet, before):
    types, hooks, state, config = snapshot(unet)
    assert types == before[0]
    assert hooks == before[1]
    assert config == before[3]
    assert state.keys() == before[2].keys()
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, before[2][name], rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize(
    ("tensor", "value"),
    [
        ("down_blocks.0.resnets.0.conv1.weight", math.nan),
        ("mid_block.attentions.0.to_q.weight", math.inf),
        ("mid_block.attentions.0.to_k.bias", math.nan),
        (f"{LAST_LAYER}.weight", math.nan),
        (f"{LAST_LAYER}.bias", -math.inf),
    ],
)
def test_weights_that_are_not_finite_are_named_and_leave_the_unet_unchanged(tensor, value):
    unet = unet2d()
    calibration_set = recorded(unet)
    unet.get_parameter(tensor).view(-1)[1] = value
    before = snapshot(unet)

    with pytest.raises(ValueError, match=rf"^{tensor}\b.*NaN or infinity"):
        calibrate(unet, calibration_set, distillation=None)
    assert_unchanged(unet, before)


@pytest.mark.supports(
    "Offloading",
    "calibration of an offloaded or float8 model",
    "refused: load in 16 or 32 bits, calibrate, then offload or cast",
)
@pytest.mark.parametrize(
    ("store", "message"),
    [
        (lambda unet, _: unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32), "is stored in .*float8"),
        (lambda unet, folder: disk_offload(unet, folder), "is offloaded: calibrate before"),
    ],
)
def test_weights_that_are_not_there_in_full_are_refused_with_the_remedy(store, message, tmp_path):
    unet = unet2d()
    calibration_set = recorded(unet)
    store(unet, tmp_path)

    with pytest.raises(ValueError, match=rf"^\S+\.weight {message}"):
        calibrate(unet, calibration_set, distillation=None)


def test_activations_that_are_not_finite_name_the_layer_and_leave_the_unet_unchanged():
    unet = unet2d()
    with record(unet) as calibration_set:
        unet(sample_for(unet), 500)
        unet(sample_for(unet) * float("inf"), 500)
    expected, before = unet(sample_for(unet), 3).sample, snapshot(unet)

    with pytest.raises(ValueError, match=r"^down_blocks\.0\.resnets\.0\.conv1: its input holds NaN or infinity"):
        calibrate(unet, calibration_set, distillation=None)
    assert_unchanged(unet, before)
    assert torch.equal(unet(sample_for(unet), 3).sample, expected)


def test_an_output_channel_of_subnormal_weights_is_no_reason_to_fail():
    unet = unet2d()
    calibration_set = recorded(unet)
    weight = unet.get_submodule(LAST_LAYER).weight
    weight[3] = 0
    weight[3, 0, 1, 1] = 2.0**-149
    expected = unet(sample_for(unet), 500).sample

    calibrate(unet, calibration_set, distillation=None)
    assert relative_rms(unet(sample_for(unet), 500).sample, expected) < 0.15


def test_an_empty_calibration_set_names_the_remedy_and_leaves_the_unet_unchanged():
    unet = unet2d()
    before = snapshot(unet)

    with pytest.raises(ValueError, match=r"dq_runtime\.record"):
        calibrate(unet, CalibrationSet(), distillation=None)
    assert_unchanged(unet, before)


def test_a_quantized_unet_is_refused():
    unet = unet2d()
    calibration_set = recorded(unet)
    calibrate(unet, calibration_set, distillation=None)
    state = copy.deepcopy(unet.state_dict())

    with pytest.raises(ValueError, match="quantized already"):
        calibrate(unet, calibration_set, distillation=None)
    assert all(torch.equal(tensor, state[name]) for name, tensor in unet.state_dict().items())


UNREACHED = "time_embedding.cond_proj"  # a linear that only calls with timestep_cond use


@pytest.fixture
def unet_with_unreached_layer():
    return unet2d_condition(time_cond_proj_dim=16)


def test_an_unreached_layer_stays_as_it_is_in_one_line_of_the_log(unet_with_unreached_layer, caplog, tmp_path):
    unet, tokens = unet_with_unreached_layer, torch.randn(2, 5, 32)
    original, config = unet.get_submodule(UNREACHED).weight.clone(), DilateQuantConfig(dilation="weight")
    with caplog.at_level(logging.WARNING, logger="dq_runtime"):
        calibrate(unet, recorded(unet, encoder_hidden_states=tokens), config, distillation=None)

    assert type(unet.get_submodule(UNREACHED)) is nn.Linear
    assert torch.equal(unet.get_submodule(UNREACHED).weight, original)
    assert unet.config["quantization_config"].modules_to_not_convert == ["conv_in", "conv_out", UNREACHED]
    assert config.modules_to_not_convert == ["conv_in", "conv_out"]
    (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert UNREACHED in line
    assert "never reached" in line

    unet.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path)
    assert type(loaded.get_submodule(UNREACHED)) is nn.Linear
    for condition in ({}, {"timestep_cond": torch.randn(2, 16)}):
        arguments = {"encoder_hidden_states": tokens} | condition
        expected = unet(sample_for(unet), 500, **arguments).sample
        assert torch.equal(loaded(sample_for(unet), 500, **arguments).sample, expected)


def test_a_layer_reached_at_some_timesteps_only_is_named_and_the_unet_unchanged(unet_with_unreached_layer):
    unet, tokens = unet_with_unreached_layer, torch.randn(2, 5, 32)
    with record(unet) as calibration_set:
        unet(sample_for(unet), 500, tokens)
        unet(sample_for(unet), 10, tokens, timestep_cond=torch.randn(2, 16))
    before = snapshot(unet)

    with pytest.raises(ValueError, match=UNREACHED):
        calibrate(unet, calibration_set, distillation=None)
    assert_unchanged(unet, before)


def test_more_activation_bits_come_closer_to_a_trained_unet():
    digits = CLASS_CONDITIONAL
    unet, condition = digits.unet(), digits.condition(digits.labels(10))
    scheduler, noise = digits.noise_scheduler(), digits.noise(10, seed=1)
    calibration_set = dq_runtime.collect_from_scheduler(unet, scheduler, noise, 2, condition)
    fresh = digits.noise(10, seed=2)

    errors = {}
    for bits in (8, 4):
        config = DilateQuantConfig(activation_bits=bits, dilation="weight")
        quantized = calibrate(copy.deepcopy(unet), calibration_set, config, distillation=None)
        expected = unet(fresh, 500, **condition).sample
        errors[bits] = relative_rms(quantized(fresh, 500, **condition).sample, expected)

    assert errors[8] < 0.06
    assert errors[8] < 0.7 * errors[4]
    assert errors[4] < 0.2


INFERENCE = """
import sys
import torch, dq_runtime
from diffusers import UNet2DModel

unet = UNet2DModel.from_pretrained(sys.argv[1])
output = unet(torch.zeros(1, 3, 8, 8), 500).sample
assert any(isinstance(module, dq_runtime.QuantConv2d) for module in unet.modules())
assert bool(output.isfinite().all())
unexpected = [name for name in sys.modules if name.startswith(("dq_runtime.calibration", "dq_runtime.evaluation"))]
assert not unexpected, unexpected
dq_runtime.calibrate
assert "dq_runtime.calibration.calibrate" in sys.modules
"""


def test_loading_and_running_a_checkpoint_imports_no_calibration(tmp_path):
    unet = unet2d()
    calibrate(unet, recorded(unet), distillation=None).save_pretrained(tmp_path)

    run = subprocess.run(
        [sys.executable, "-c", INFERENCE, str(tmp_path)], capture_output=True, text=True, timeout=240, check=False
    )
    assert run.returncode == 0, run.stderr


def test_by_default_weights_are_rounded_with_error_feedback():
    unet = unet2d()
    calls, config = recorded(unet, (3, 400)), DilateQuantConfig(**FEW_BLOCKS | {"dilation": "none"})
    chosen, feedback, nearest = (
        calibrate(copy.deepcopy(unet), calls, config, *settings)
        for settings in ((), (dq_runtime.Distillation(iterations=0),), (None,))
    )

    def same(a, b):
        pairs = zip(quantized_layers(a).values(), quantized_layers(b).values(), strict=True)
        return all(torch.equal(one.packed_weight, other.packed_weight) for one, other in pairs)

    assert same(chosen, feedback)
    assert not same(chosen, nearest)
    assert "error feedback" in chosen.hf_quantizer.quantization_config.calibration["method"]
