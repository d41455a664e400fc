"""Replacing a UNet's layers by quantized ones, the layers that stay and the reasons, and dequantization."""

import copy
import json
import logging

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.downsampling import Downsample2D, FirDownsample2D
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

import dq_runtime
from dq_kernels import reference
from dq_runtime import DilateQuantConfig, QuantConv2d, QuantLinear
from dq_runtime.convert import insert_empty_layers, plan_conversion
from dq_runtime.layers import quantized_layers

GEOMETRY = (
    "in_features",
    "out_features",
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
)


def stock_layers(unet):
    return {name: module for name, module in unet.named_modules() if type(module) in (nn.Linear, nn.Conv2d)}


@pytest.fixture
def quantize(calibration_call):
    """Calibrates a UNet on one call."""

    def quantize(unet, **config):
        return dq_runtime.calibrate(
            unet, calibration_call(unet), DilateQuantConfig(**{"dilation": "weight"} | config), distillation=None
        )

    return quantize


def test_every_layer_is_replaced_but_the_kept_ones(subject):
    kept = {"conv_in", "conv_out"}

    assert stock_layers(subject.quantized).keys() == kept
    assert quantized_layers(subject.quantized).keys() == stock_layers(subject.stock).keys() - kept


def test_replaced_layers_keep_their_geometry_and_bias(subject):
    originals = stock_layers(subject.stock)
    for name, layer in quantized_layers(subject.quantized).items():
        original = originals[name]
        assert type(layer) is (QuantLinear if type(original) is nn.Linear else QuantConv2d)
        for attribute in (
            "in_features",
            "out_features",
            "in_channels",
            "out_channels",
            "kernel_size",
            "stride",
            "padding",
        ):
            assert getattr(layer, attribute, None) == getattr(original, attribute, None), (name, attribute)
        assert (layer.bias is None) == (original.bias is None), name
        if layer.bias is not None:
            assert torch.equal(layer.bias, original.bias), name


def test_nothing_else_is_changed(subject, assert_same_tensors):
    prefixes = tuple(f"{name}." for name in quantized_layers(subject.quantized))

    def others(unet):
        return {name: tensor for name, tensor in unet.state_dict().items() if not name.startswith(prefixes)}

    assert_same_tensors(others(subject.quantized), others(subject.stock))


def test_no_floating_point_copy_of_a_weight_is_hidden(subject):
    subject.call(subject.quantized)
    originals = stock_layers(subject.stock)
    for name, layer in quantized_layers(subject.quantized).items():
        outputs, inputs, *taps = originals[name].weight.shape
        held = [*layer.parameters(), *layer.buffers(), *(v for v in vars(layer).values() if torch.is_tensor(v))]

        expected = outputs * torch.Size(taps).numel() * ((inputs + 1) // 2)  # two weights a byte
        expected += 4 * (2 * outputs + inputs + 2 * 4)  # weight_scale, weight_sum; dilation; two tables of 4 timesteps
        expected += 0 if layer.bias is None else 4 * outputs
        assert sum(t.numel() * t.element_size() for t in held) == expected, name
        assert all(t.numel() < originals[name].weight.numel() for t in held if t.is_floating_point()), name


def test_weights_are_rounded_to_four_bits_of_the_original(subject, relative_rms):
    originals = stock_layers(subject.stock)
    for name, layer in quantized_layers(subject.quantized).items():
        weight = reference.dequantize_weight(layer.packed_weight, layer.weight_scale, layer.weight_dilation)

        # Uniform weights, as stock layers start with: 15 steps over their range cost 1 / 15 of their RMS. Channels in
        # another order would cost 1.4.
        assert relative_rms(weight.movedim(-1, 1), originals[name].weight) < 0.1, name


@pytest.mark.parametrize(
    ("entry", "kept", "converted"),
    [
        ("mid_block.resnets.0.conv1", "mid_block.resnets.0.conv1", "mid_block.resnets.0.conv2"),
        ("mid_block", "mid_block.attentions.0.to_q", "up_blocks.0.attentions.0.to_q"),
        ("to_out.0", "mid_block.attentions.0.to_out.0", "mid_block.attentions.0.to_q"),
        ("resnets.1", "mid_block.resnets.1.conv1", "mid_block.resnets.0.conv1"),
        ("conv", "up_blocks.0.upsamplers.0.conv", "mid_block.resnets.0.conv1"),
    ],
)
def test_modules_are_kept_by_name_or_by_whole_parts_of_one(new_unet, entry, kept, converted):
    plan = plan_conversion(new_unet(), DilateQuantConfig(modules_to_not_convert=[entry]))

    assert kept in plan.kept
    assert kept not in plan.layers
    assert converted in plan.layers
    assert "conv_in" in plan.layers  # the default list is replaced, not added to
    assert all(f".{entry}." in f".{name}." for name in plan.kept)


def test_kept_modules_stay_the_same_objects(new_unet, quantize):
    unet = new_unet()
    kept = unet.mid_block.resnets[0].conv1

    quantize(unet, modules_to_not_convert=["mid_block", "conv_in", "conv_out"])

    assert unet.mid_block.resnets[0].conv1 is kept
    assert not any(name.startswith("mid_block") for name in quantized_layers(unet))
    assert unet.config.quantization_config.modules_to_not_convert == ["mid_block", "conv_in", "conv_out"]


def test_nothing_left_to_quantize_is_refused(new_unet):
    unet = new_unet()

    with pytest.raises(ValueError, match="No layer is left"):
        plan_conversion(unet, DilateQuantConfig(modules_to_not_convert=[name for name, _ in unet.named_children()]))


def test_grouped_convolution_stays_and_one_warning_says_so(new_unet, quantize, caplog):
    unet = new_unet()
    unet.mid_block.resnets[0].conv2 = nn.Conv2d(64, 64, 3, padding=1, groups=4)

    with caplog.at_level(logging.INFO, "dq_runtime"):
        quantize(unet)

    assert type(unet.mid_block.resnets[0].conv2) is nn.Conv2d
    (line,) = [r for r in caplog.records if "mid_block.resnets.0.conv2" in r.getMessage()]
    assert line.levelno == logging.WARNING
    assert "mid_block.resnets.0.conv2 (groups > 1)" in line.getMessage()
    assert "conv_in, conv_out (in modules_to_not_convert)" in line.getMessage()
    assert torch.isfinite(unet(torch.randn(1, 3, 8, 8), 500).sample).all()


@pytest.mark.supports("Models", "layers without an INT4 kernel", "stay in floating point; one log line lists them")
@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(64, 64, 3, padding="same"),
        type("WeightStandardizedConv2d", (nn.Conv2d,), {})(64, 64, 3, padding=1),
        nn.ConvTranspose2d(64, 64, 3, padding=1),
    ],
    ids=lambda module: type(module).__name__,
)
def test_layers_without_a_kernel_stay_and_are_listed(new_unet, module):
    unet = new_unet()
    unet.mid_block.resnets[0].conv2 = module

    plan = plan_conversion(unet, DilateQuantConfig())

    assert "mid_block.resnets.0.conv2" in plan.kept
    assert "mid_block.resnets.0.conv2" not in plan.layers


@pytest.mark.parametrize(
    ("layer", "is_kept"),
    [
        (nn.Linear(65792, 1, device="meta"), False),
        (nn.Linear(65793, 1, device="meta"), True),  # packed with one channel more
        (nn.Conv2d(7310, 1, 3, device="meta"), False),
        (nn.Conv2d(7312, 1, 3, device="meta"), True),
    ],
    ids=str,
)
def test_layers_whose_sums_may_exceed_int32_stay_and_are_listed(new_unet, layer, is_kept):
    unet = new_unet()
    unet.mid_block.resnets[0].conv2 = layer

    plan = plan_conversion(unet, DilateQuantConfig())

    assert ("mid_block.resnets.0.conv2" in plan.layers) is not is_kept
    assert "exceed int32" in plan.kept.get("mid_block.resnets.0.conv2", "") or not is_kept


def test_only_what_the_user_asked_for_is_no_warning(new_unet, quantize, caplog):
    with caplog.at_level(logging.INFO, "dq_runtime"):
        quantize(new_unet())

    (line,) = caplog.records
    assert line.levelno == logging.INFO
    assert line.getMessage() == "Kept in floating point: conv_in, conv_out (in modules_to_not_convert)"


@pytest.mark.supports("Casting", "`_keep_in_fp32_modules`", "stay in fp32, unquantized")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_modules_that_diffusers_keeps_in_fp32_stay_in_fp32(new_unet, calibration_call, tmp_path, dtype):
    UNet = type("UNet", (UNet2DModel,), {"_keep_in_fp32_modules": ["time_embedding", "norm1"]})
    stock = UNet.from_config(new_unet().config)
    stock.save_pretrained(tmp_path / "stock")
    dq_runtime.calibrate(stock, calibration_call(stock), distillation=None).save_pretrained(tmp_path / "packed")
    packed = UNet.from_pretrained(tmp_path / "packed", torch_dtype=dtype)
    config = DilateQuantConfig()

    for unet in (packed, UNet.from_pretrained(tmp_path / "stock", torch_dtype=dtype, quantization_config=config)):
        assert not any(name.startswith("time_embedding") for name in quantized_layers(unet))
        kept = (unet.time_embedding.linear_1.weight, unet.mid_block.resnets[0].norm1.weight)
        assert [tensor.dtype for tensor in kept] == [torch.float32] * 2
        assert unet.mid_block.resnets[0].norm2.weight.dtype == dtype


def test_the_default_bits_of_shortcuts_are_no_warning_where_none_is_quantized(new_unet):
    shortcuts = ["conv_in", "conv_out", "conv_shortcut"]
    assert plan_conversion(new_unet(), DilateQuantConfig(modules_to_not_convert=shortcuts)).unmatched == []
    config = DilateQuantConfig(modules_to_not_convert=shortcuts, layer_activation_bits={"conv_shortcut": 6})
    assert plan_conversion(new_unet(), config).unmatched == ["layer_activation_bits: 'conv_shortcut'"]


def test_layer_that_calibration_never_reached_stays_and_a_warning_says_so(new_unet, quantize, caplog):
    unet = new_unet()
    unet.mid_block.spare = nn.Linear(8, 8)

    with caplog.at_level(logging.WARNING, "dq_runtime"):
        quantize(unet)

    assert type(unet.mid_block.spare) is nn.Linear
    assert any("mid_block.spare" in r.getMessage() and "never reached" in r.getMessage() for r in caplog.records)
    assert "mid_block.spare" in unet.config.quantization_config.modules_to_not_convert


def test_fir_resampler_keeps_its_convolution(new_unet, quantize, caplog):
    unet = new_unet()
    unet.down_blocks[0].downsamplers[0] = FirDownsample2D(32, 32, use_conv=True)

    quantize(unet)

    assert type(unet.down_blocks[0].downsamplers[0].Conv2d_0) is nn.Conv2d
    assert "down_blocks.0.downsamplers.0.Conv2d_0 (a FIR resampler reads its weight directly)" in caplog.text
    assert isinstance(unet.down_blocks[0].resnets[0].conv1, QuantConv2d)
    assert torch.isfinite(unet(torch.randn(1, 3, 8, 8), 500).sample).all()


def test_unet_of_fir_blocks_is_quantized(new_unet, quantize, relative_rms):
    unet = new_unet(
        down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"),
    )
    sample = torch.randn(1, 3, 8, 8)
    expected = unet(sample, 500).sample

    quantize(unet)

    assert isinstance(unet.down_blocks[0].skip_conv, QuantConv2d)
    assert (
        0 < (unet(sample, 500).sample - expected).norm() < 0.5 * expected.norm()
    )  # INT4, uncalibrated for this sample


def test_layer_under_two_names_is_converted_once(new_unet, quantize):
    unet = new_unet()
    downsampler = Downsample2D(32, use_conv=True, out_channels=32, name="conv")
    assert downsampler.Conv2d_0 is downsampler.conv
    unet.down_blocks[0].downsamplers[0] = downsampler

    quantize(unet)

    assert isinstance(downsampler.conv, QuantConv2d)
    assert downsampler.Conv2d_0 is downsampler.conv
    assert torch.isfinite(unet(torch.randn(1, 3, 8, 8), 500).sample).all()

    dq_runtime.dequantize(unet)

    assert type(downsampler.conv) is nn.Conv2d
    assert downsampler.Conv2d_0 is downsampler.conv


def test_quantized_unet_cannot_be_calibrated_again(unet2d):
    with pytest.raises(ValueError, match=r"quantized already.*dequantize\(\)"):
        dq_runtime.calibrate(unet2d.quantized, unet2d.calibration_set, distillation=None)


def test_adapters_must_be_fused_before_calibration(unet2d_condition):
    """Their matrices would be quantized as layers of their own, under names that no stock UNet has."""
    unet = copy.deepcopy(unet2d_condition.stock)
    unet.add_adapter(LoraConfig(target_modules=["to_q"]))

    with pytest.raises(ValueError, match="adapter"):
        dq_runtime.calibrate(unet, unet2d_condition.calibration_set, distillation=None)


@pytest.mark.supports("Adapters and attention", "calibration with an IP-Adapter", "refused: load it after quantization")
def test_layers_of_an_ip_adapter_are_refused(unet2d_condition):
    unet = copy.deepcopy(unet2d_condition.stock)
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn2
    attention.set_processor(IPAdapterAttnProcessor2_0(64, 32))

    with pytest.raises(ValueError, match=r"unload_ip_adapter\(\)"):
        dq_runtime.calibrate(unet, unet2d_condition.calibration_set, distillation=None)


def test_an_adapter_that_peft_put_in_by_itself_is_refused(unet2d_condition):
    unet = copy.deepcopy(unet2d_condition.stock)
    inject_adapter_in_model(LoraConfig(target_modules=["to_q"]), unet)

    with pytest.raises(ValueError, match="adapter"):
        dq_runtime.calibrate(unet, unet2d_condition.calibration_set, distillation=None)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_failed_calibration_leaves_the_unet_unchanged(unet2d, calibration_call, assert_same_tensors, bad):
    unet = copy.deepcopy(unet2d.stock)
    calibration_set = calibration_call(unet)
    unet.up_blocks[1].resnets[0].conv2.weight[3, 0, 0, 0] = bad
    before = {name: tensor.clone().nan_to_num(7) for name, tensor in unet.state_dict().items()}

    with pytest.raises(ValueError, match=r"up_blocks\.1\.resnets\.\d\..*NaN or infinity"):
        dq_runtime.calibrate(unet, calibration_set, distillation=None)

    assert_same_tensors({n: t.nan_to_num(7) for n, t in unet.state_dict().items()}, before)
    assert not quantized_layers(unet)
    assert not any(module._forward_pre_hooks for module in unet.modules())


def test_empty_calibration_set_is_refused(unet2d):
    with pytest.raises(ValueError, match=r"empty.*record"):
        dq_runtime.calibrate(copy.deepcopy(unet2d.stock), dq_runtime.CalibrationSet(), distillation=None)


def test_layers_without_timesteps_have_no_tables_of_scales(new_unet):
    unet = new_unet()

    insert_empty_layers(unet, DilateQuantConfig())

    assert all(layer.act_scale is None and layer.is_dynamic for layer in quantized_layers(unet).values())
    assert not hasattr(unet, "timestep_grid")


def test_calibration_leaves_the_caller_s_config_alone(new_unet, calibration_call):
    unet, config = new_unet(), DilateQuantConfig(activation_bits=6)
    unet.mid_block.spare = nn.Linear(8, 8)

    dq_runtime.calibrate(unet, calibration_call(unet), config, distillation=None)

    assert config == DilateQuantConfig(activation_bits=6)
    assert unet.config.quantization_config.activation_bits == 6
    assert unet.config.quantization_config.timesteps == [500.0]


def test_quantized_unet_stays_near_the_original(new_unet, calibration_call, relative_rms):
    unet = new_unet()
    calibration_set = calibration_call(unet)
    expected = calibration_set.calls[0].run(unet).sample

    dq_runtime.calibrate(unet, calibration_set, distillation=None)

    # Four bits of every random weight cost 0.14 here, and activations are quantized for this very sample. Broken
    # wiring would cost 1.
    assert 0 < relative_rms(calibration_set.calls[0].run(unet).sample, expected) < 0.3


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_is_kept(new_unet, quantize, training):
    unet = new_unet().train(training)

    quantize(unet)
    assert {module.training for module in unet.modules()} == {training}

    dq_runtime.dequantize(unet)
    assert {module.training for module in unet.modules()} == {training}


def test_half_precision_unet_is_quantized_with_fp32_tables(new_unet, quantize, tables):
    unet = quantize(new_unet().half())

    assert all(table.dtype in (torch.float32, torch.int32) for table in tables(unet).values())
    assert unet.mid_block.resnets[0].conv1.bias.dtype == torch.float16
    assert unet(torch.randn(1, 3, 8, 8).half(), 500).sample.dtype == torch.float16


@pytest.mark.supports(
    "Adapters and attention",
    "`fuse_lora()`, `fuse_qkv_projections()`",
    "refused with the remedy",
    "merge before quantization; `dq_runtime.fuse` joins q, k and v",
)
@pytest.mark.parametrize("method", ["fuse_lora", "fuse_qkv_projections"])
def test_what_would_write_into_the_weights_is_refused(unet2d_condition, method):
    unet = unet2d_condition.copy()
    unet.add_adapter(LoraConfig(target_modules=["to_q"]))

    with pytest.raises(ValueError, match="Packed INT4 weights"):
        getattr(unet, method)()

    unet.delete_adapters("default")
    getattr(unet2d_condition.copy().dequantize(), method)()


# PyTorch sums a 1x1 convolution in another order when its weight's strides differ in a dimension of size 1. In fp32.
ORDER_OF_SUMS = 1e-5

WAYS_BACK = pytest.mark.parametrize(
    "dequantize", [dq_runtime.dequantize, lambda unet: unet.dequantize()], ids=["function", "method"]
)


@pytest.mark.supports("Saving and loading", "`dequantize()`", "a stock UNet with the rounded weights")
@WAYS_BACK
def test_dequantized_unet_is_stock_with_the_rounded_weights(subject, dequantize, assert_same_tensors, relative_rms):
    expected = copy.deepcopy(subject.stock)
    for name, layer in quantized_layers(subject.quantized).items():
        weight = reference.dequantize_weight(layer.packed_weight, layer.weight_scale, layer.weight_dilation)
        expected.get_submodule(name).weight.copy_(weight.movedim(-1, 1))
    unet = subject.copy()

    assert dequantize(unet) is unet

    assert [(n, type(m)) for n, m in unet.named_modules()] == [(n, type(m)) for n, m in expected.named_modules()]
    assert_same_tensors(unet.state_dict(), expected.state_dict())
    assert (
        subject.call(unet) - subject.call(expected)
    ).abs().max() < 1e-5  # strides of size 1 may differ, and sums with them


@WAYS_BACK
def test_nothing_of_the_quantization_is_left_behind(subject, dequantize):
    unet = subject.copy()

    dequantize(unet)

    assert vars(unet).keys() == vars(subject.stock).keys()
    assert not unet._forward_pre_hooks
    assert not unet._forward_hooks
    assert "quantization_config" not in unet.config
    assert getattr(unet, "hf_quantizer", None) is None
    with pytest.raises(ValueError, match="not quantized"):
        dq_runtime.dequantize(unet)


@WAYS_BACK
def test_dequantized_unet_is_saved_as_a_plain_one_and_can_be_quantized_again(
    unet2d, dequantize, quantize, tmp_path, relative_rms
):
    unet = unet2d.copy()
    dequantize(unet)
    unet.save_pretrained(tmp_path)

    loaded = type(unet).from_pretrained(tmp_path)

    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert not quantized_layers(loaded)
    assert relative_rms(unet2d.call(loaded), unet2d.call(unet)) < ORDER_OF_SUMS
    again = quantize(loaded)
    assert quantized_layers(again).keys() == quantized_layers(unet2d.quantized).keys()
    assert torch.isfinite(unet2d.call(again)).all()


def test_dequantized_half_precision_unet_stays_in_half_precision(unet2d):
    unet = unet2d.copy().half().dequantize()

    assert {parameter.dtype for parameter in unet.parameters()} == {torch.float16}


def test_stock_unet_cannot_be_dequantized(unet2d):
    with pytest.raises(ValueError, match="not quantized"):
        dq_runtime.dequantize(copy.deepcopy(unet2d.stock))


def test_config_of_a_quantized_unet_still_makes_a_stock_one(subject):
    unet = type(subject.quantized).from_config(subject.quantized.config)

    assert not quantized_layers(unet)
    assert stock_layers(unet).keys() == stock_layers(subject.stock).keys()
