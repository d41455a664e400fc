"""The quantization config: refused values, and that storing and loading do not change it."""

import json

import pytest
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, DiffusersAutoQuantizer

import dq_runtime
from dq_runtime import DilateQuantConfig

CONFIGS = pytest.mark.parametrize(
    "config",
    [
        DilateQuantConfig(),
        DilateQuantConfig(activation_bits=4, dilation="none", modules_to_not_convert=[]),
        DilateQuantConfig(activation_bits=6, max_dilation=2.5, modules_to_not_convert=["mid_block", "to_out.0"]),
        DilateQuantConfig(timesteps=[0.0, 0.1, 1 / 3, 499.5, 999.0]),
        DilateQuantConfig(int8_attention=["attn1", "mid_block"]),
    ],
    ids=["default", "w4a4", "kept", "timesteps", "int8 attention"],
)


@CONFIGS
def test_config_survives_json(config):
    assert DilateQuantConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@CONFIGS
def test_config_survives_as_its_differences_from_the_default(config):
    assert DilateQuantConfig.from_dict(json.loads(config.to_json_string(use_diff=True))) == config


@CONFIGS
def test_diffusers_finds_the_class_of_a_stored_config(config):
    assert DiffusersAutoQuantizer.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_only_fields_that_differ_are_in_the_diff_dict():
    assert DilateQuantConfig().to_diff_dict() == {}
    assert DilateQuantConfig(activation_bits=4).to_diff_dict() == {"activation_bits": 4}
    assert DilateQuantConfig(layer_activation_bits={}).to_diff_dict() == {"layer_activation_bits": {}}


@pytest.mark.parametrize("nothing", [{}, None])
def test_only_shortcuts_have_other_bits_by_default(nothing):
    config = DilateQuantConfig(activation_bits=4)
    assert config.activation_bits_of("up_blocks.0.resnets.0.conv_shortcut") == 8
    assert config.activation_bits_of("up_blocks.0.resnets.0.conv1") == 4
    strict = DilateQuantConfig(activation_bits=4, layer_activation_bits=nothing)
    assert strict.activation_bits_of("up_blocks.0.resnets.0.conv_shortcut") == 4
    config.layer_activation_bits["conv1"] = 6
    assert DilateQuantConfig().layer_activation_bits == {"conv_shortcut": 8}


def test_config_survives_in_the_config_file_of_a_unet(subject, tmp_path):
    subject.quantized.save_config(tmp_path)

    stored = type(subject.quantized).load_config(tmp_path)["quantization_config"]

    assert DiffusersAutoQuantizer.from_dict(stored) == subject.quantized.config.quantization_config
    assert stored["timesteps"] == [0.0, 250.0, 500.0, 750.0]
    assert stored["quant_method"] == "dilatequant"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("weight_bits", 8),
        ("weight_bits", 3),
        ("activation_bits", 16),
        ("activation_bits", 5),
        ("activation_bits", "8"),
        ("dilation", "paper"),
        ("dilation", None),
        ("max_dilation", 0.99),
        ("max_dilation", float("nan")),
        ("modules_to_not_convert", "conv_in"),
        ("int8_attention", "attn1"),
        ("int8_attention", True),
    ],
)
def test_unsupported_values_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=rf"(?s){field}.*{value}"):
        DilateQuantConfig(**{field: value})


def test_method_is_dilatequant_and_no_other():
    assert DilateQuantConfig(quant_method="dilatequant") == DilateQuantConfig()
    assert DilateQuantConfig().quant_method.value == "dilatequant"
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["dilatequant"] is DilateQuantConfig
    with pytest.raises(ValueError, match="bitsandbytes"):
        DilateQuantConfig(quant_method="bitsandbytes")


def test_unknown_fields_are_refused_by_name():
    with pytest.raises(TypeError, match="activation_bit"):
        DilateQuantConfig.from_dict({"activation_bit": 4})


def test_configs_do_not_share_their_list_of_kept_modules():
    DilateQuantConfig().modules_to_not_convert.append("mid_block")

    assert DilateQuantConfig().modules_to_not_convert == ["conv_in", "conv_out"]


def test_every_public_name_exists():
    for name in dq_runtime.__all__:
        assert getattr(dq_runtime, name).__name__ == name
