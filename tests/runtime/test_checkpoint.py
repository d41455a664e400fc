"""Packed checkpoints: stock ``save_pretrained`` and ``from_pretrained`` keep every bit; damage is refused by name."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DConditionModel, UNet2DModel
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from dq_runtime import digest
from dq_runtime.layers import quantized_layers

WEIGHTS = "diffusion_pytorch_model.safetensors"
CONV, LINEAR = "mid_block.resnets.0.conv1", "time_embedding.linear_1"


@pytest.fixture(scope="module")
def saved(unet2d_condition, tmp_path_factory):
    """The folder of a saved ``UNet2DConditionModel``."""
    folder = tmp_path_factory.mktemp("saved")
    unet2d_condition.quantized.save_pretrained(folder)
    return folder


@pytest.fixture
def damaged(saved, tmp_path):
    """Copies the saved UNet, with its tensors and its quantization config changed by functions, in place."""

    def damaged(change_tensors=lambda tensors: None, change_config=lambda config: None):
        tensors = load_file(saved / WEIGHTS)
        change_tensors(tensors)
        save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
        config = json.loads((saved / "config.json").read_text())
        change_config(config["quantization_config"])
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return damaged


def test_saved_files_are_safetensors_and_a_config(saved, unet2d_condition):
    calibration = unet2d_condition.quantized.hf_quantizer.quantization_config.calibration
    assert sorted(path.name for path in saved.iterdir()) == ["README.md", "config.json", WEIGHTS]
    assert json.loads((saved / "config.json").read_text())["quantization_config"] == {
        "quant_method": "dilatequant",
        "weight_bits": 4,
        "activation_bits": 8,
        "layer_activation_bits": {"conv_shortcut": 8},
        "dilation": "weight",
        "max_dilation": 8.0,
        "timestep_groups": None,
        "modules_to_not_convert": ["conv_in", "conv_out"],
        "int8_attention": [],
        "timesteps": [0.0, 250.0, 500.0, 750.0],
        "calibration": {
            "samples": 8,
            "scheduler": "DDIMScheduler",
            "method": "rounded to nearest",
            "prediction_snr_db": calibration["prediction_snr_db"],
        },
        "format_version": 1,
    }


def test_file_holds_what_the_unet_holds_and_no_more(saved, unet2d_condition, assert_same_tensors):
    tensors = load_file(saved / WEIGHTS)
    digests = [name for name in tensors if name.endswith(digest.NAME)]
    assert len(digests) == 1
    config = json.loads((saved / "config.json").read_text())
    fields = [name for name in config if not name.startswith("_")]  # the quantization config is one
    assert len(fields) > 40
    assert tensors.pop(digests[0]).shape == (len(tensors) + len(fields),)
    assert_same_tensors(tensors, unet2d_condition.quantized.state_dict())


def test_quantized_weights_take_a_quarter_of_fp16(unet2d, tmp_path):
    """Weights, their scales and sums: 8 bytes an output channel, on top of 0.5 a weight. Its few hundred inputs, taps
    included, make that 27 % here, and less in any UNet of practical width."""
    unet2d.quantized.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    packed = fp16 = 0
    for name in quantized_layers(unet2d.quantized):
        packed += sum(tensors[f"{name}.{t}"].nbytes for t in ("packed_weight", "weight_scale", "weight_sum"))
        fp16 += 2 * unet2d.stock.get_submodule(name).weight.numel()

    assert 0.25 * fp16 < packed <= 0.27 * fp16


@pytest.mark.supports("Saving and loading", "`save_pretrained`, `from_pretrained`", "every bit is kept")
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"device_map": "cpu"},
        {"device_map": {"": "cpu"}},
        {"device_map": "auto", "max_memory": {"cpu": "1GB"}},
        {"device_map": "balanced", "max_memory": {"cpu": "1GB"}},
        {"device_map": "auto", "max_memory": {"cpu": "1GB"}, "torch_dtype": torch.float32},
        {"torch_dtype": torch.float32},
        {"disable_mmap": True},
    ],
    ids=str,
)
def test_loaded_unet_has_the_same_bits(saved, unet2d_condition, assert_same_tensors, arguments):
    unet = UNet2DConditionModel.from_pretrained(saved, **arguments)

    assert_same_tensors(unet.state_dict(), unet2d_condition.quantized.state_dict())
    assert not any(tensor.is_meta for tensor in [*unet.parameters(), *unet.buffers()])
    assert not unet.training
    timestep = torch.tensor([3, 999])
    expected = unet2d_condition.call(unet2d_condition.quantized, timestep)
    assert torch.equal(unet2d_condition.call(unet, timestep), expected)


def test_layers_of_a_loaded_unet_share_its_grid(saved):
    unet = UNet2DConditionModel.from_pretrained(saved)

    for name, layer in quantized_layers(unet).items():
        assert layer.timestep_grid is unet.timestep_grid
        assert layer.name == name


def test_saving_a_loaded_unet_writes_the_same_file(saved, tmp_path):
    UNet2DConditionModel.from_pretrained(saved).save_pretrained(tmp_path)

    assert (tmp_path / WEIGHTS).read_bytes() == (saved / WEIGHTS).read_bytes()
    configs = [json.loads((folder / "config.json").read_text()) for folder in (saved, tmp_path)]
    assert configs[0] == {name: value for name, value in configs[1].items() if name != "_name_or_path"}


@pytest.mark.supports("Saving and loading", "shards", "load as one")
def test_shards_load_as_one(unet2d_condition, tmp_path, assert_same_tensors):
    unet2d_condition.quantized.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2

    unet = UNet2DConditionModel.from_pretrained(tmp_path)

    assert_same_tensors(unet.state_dict(), unet2d_condition.quantized.state_dict())
    assert torch.equal(unet2d_condition.call(unet), unet2d_condition.call(unet2d_condition.quantized))


@pytest.mark.supports("Saving and loading", "variants", "are loaded")
def test_variants_are_loaded(unet2d_condition, tmp_path, assert_same_tensors):
    unet2d_condition.quantized.save_pretrained(tmp_path, variant="int4")

    unet = UNet2DConditionModel.from_pretrained(tmp_path, variant="int4")

    assert_same_tensors(unet.state_dict(), unet2d_condition.quantized.state_dict())


@pytest.mark.supports("Casting", "`torch_dtype`", "float16, bfloat16, float32", "others are refused")
@pytest.mark.parametrize("arguments", [{}, {"device_map": "auto", "max_memory": {"cpu": "1GB"}}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_torch_dtype_casts_all_but_the_tables(
    saved, unet2d_condition, tables, assert_same_tensors, relative_rms, dtype, arguments
):
    unet = UNet2DConditionModel.from_pretrained(saved, torch_dtype=dtype, **arguments)

    assert unet.dtype == dtype
    assert unet.conv_in.weight.dtype == dtype
    assert unet.get_submodule(CONV).bias.dtype == dtype
    assert unet.timestep_grid.boundaries.dtype == torch.float32
    assert_same_tensors(tables(unet), tables(unet2d_condition.quantized))
    expected = unet2d_condition.call(unet2d_condition.copy().to(dtype), 500, dtype)
    assert torch.equal(unet2d_condition.call(unet, 500, dtype), expected)


def test_half_precision_unet_is_saved_and_loaded(unet2d_condition, tmp_path, assert_same_tensors):
    half = unet2d_condition.copy().half()
    half.save_pretrained(tmp_path)

    unet = UNet2DConditionModel.from_pretrained(tmp_path, torch_dtype=torch.float16)

    assert_same_tensors(unet.state_dict(), half.state_dict())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.int8], ids=str)
def test_dtypes_that_the_kernels_do_not_know_are_refused(saved, dtype):
    with pytest.raises(ValueError, match=f"torch_dtype must be float16, bfloat16 or float32.*{dtype}"):
        UNet2DConditionModel.from_pretrained(saved, torch_dtype=dtype)


def test_loaded_unet_can_be_cast(saved, unet2d_condition, tables, assert_same_tensors):
    """diffusers refuses these for most quantization methods."""
    expected = tables(unet2d_condition.quantized)

    unet = UNet2DConditionModel.from_pretrained(saved).half()

    assert unet2d_condition.call(unet, dtype=torch.float16).dtype == torch.float16
    assert_same_tensors(tables(unet), expected)
    unet.to(torch.bfloat16)
    assert unet2d_condition.call(unet, dtype=torch.bfloat16).dtype == torch.bfloat16
    unet.float()
    assert_same_tensors(tables(unet), expected)


def test_loaded_unet_can_be_dequantized(saved, unet2d_condition, assert_same_tensors):
    unet = UNet2DConditionModel.from_pretrained(saved).dequantize()

    assert not quantized_layers(unet)
    assert_same_tensors(unet.state_dict(), unet2d_condition.copy().dequantize().state_dict())


@pytest.mark.supports("Pipelines", "save and load", "draws the same image")
def test_pipeline_saves_loads_and_draws_the_same_image(unet2d, tmp_path):
    def draw(pipeline):
        pipeline.set_progress_bar_config(disable=True)
        return pipeline(generator=torch.Generator().manual_seed(0), num_inference_steps=3, output_type="np").images

    pipeline = DDIMPipeline(unet2d.quantized, DDIMScheduler())
    expected = draw(pipeline)
    pipeline.save_pretrained(tmp_path)

    loaded = DDIMPipeline.from_pretrained(tmp_path)

    assert isinstance(loaded.unet, UNet2DModel)
    assert quantized_layers(loaded.unet)
    assert (draw(loaded) == expected).all()
    assert expected.std() > 0.1  # or images of one colour would pass


def test_pipeline_in_half_precision_keeps_the_tables(unet2d, tmp_path, tables, assert_same_tensors):
    DDIMPipeline(unet2d.quantized, DDIMScheduler()).save_pretrained(tmp_path)

    loaded = DDIMPipeline.from_pretrained(tmp_path, torch_dtype=torch.float16)
    moved = DDIMPipeline.from_pretrained(tmp_path).to(torch.float16)

    for pipeline in (loaded, moved):
        assert pipeline.unet.dtype == torch.float16
        assert_same_tensors(tables(pipeline.unet), tables(unet2d.quantized))


@pytest.mark.parametrize(
    "name",
    [f"{CONV}.{t}" for t in ("packed_weight", "weight_scale", "weight_sum", "act_scale", "bias")] + ["conv_in.weight"],
)
def test_missing_tensor_is_refused_by_name(damaged, name):
    path = damaged(lambda tensors: tensors.pop(name))

    with pytest.raises(ValueError, match=rf"missing tensors: {name}\. .*save it again"):
        UNet2DConditionModel.from_pretrained(path)


@pytest.mark.parametrize("name", [f"{CONV}.zero_point", "lora.weight", "timestep_grid.boundaries"])
def test_unexpected_tensor_is_refused_by_name(damaged, name):
    path = damaged(lambda tensors: tensors.update({name: torch.zeros(1)}))

    with pytest.raises(ValueError, match=rf"unexpected tensors: {name}\. .*save it again"):
        UNet2DConditionModel.from_pretrained(path)


def test_long_lists_of_tensors_are_cut_short(damaged):
    def change(tensors):
        for name in [name for name in tensors if name.endswith("act_scale")]:
            del tensors[name]

    with pytest.raises(ValueError, match=r"missing tensors: .* and \d+ more") as error:
        UNet2DConditionModel.from_pretrained(damaged(change))
    assert str(error.value).count("act_scale") == 10


@pytest.mark.parametrize(
    "name", [f"{CONV}.packed_weight", f"{CONV}.weight_dilation", f"{LINEAR}.packed_weight", f"{LINEAR}.bias"]
)
def test_tensor_of_another_shape_is_refused_by_name(damaged, name):
    path = damaged(lambda tensors: tensors.update({name: tensors[name][1:].clone()}))

    with pytest.raises(ValueError, match=rf"{name}.*expected shape"):
        UNet2DConditionModel.from_pretrained(path)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (f"{CONV}.packed_weight", torch.int8),
        (f"{CONV}.weight_scale", torch.float16),
        (f"{CONV}.weight_sum", torch.int64),
        (f"{LINEAR}.act_scale", torch.bfloat16),
        (f"{LINEAR}.act_zero_point", torch.float32),
    ],
)
@pytest.mark.parametrize("torch_dtype", [None, torch.float16], ids=str)
def test_tensor_of_another_dtype_is_refused_by_name(damaged, name, dtype, torch_dtype):
    path = damaged(lambda tensors: tensors.update({name: tensors[name].to(dtype)}))

    with pytest.raises(ValueError, match=rf"{name}: .*{dtype}.*save it again"):
        UNet2DConditionModel.from_pretrained(path, torch_dtype=torch_dtype)


def flip_bits(mask):
    def change(tensor):
        tensor.view(-1)[7] ^= mask

    return change


def put(value):
    def change(tensor):
        tensor[1] = value

    return change


@pytest.mark.parametrize(
    ("tensor", "change"),
    [
        ("packed_weight", flip_bits(0x01)),
        ("packed_weight", flip_bits(0x80)),
        ("packed_weight", flip_bits(0xFF)),
        ("packed_weight", lambda tensor: tensor.zero_()),
        ("weight_sum", flip_bits(0x01)),
        ("weight_scale", put(-0.01)),
        ("weight_scale", put(0.0)),
        ("weight_scale", put(float("nan"))),
        ("weight_dilation", put(float("inf"))),
        ("weight_dilation", put(0.0)),
        ("weight_dilation", put(1e6)),
        ("act_scale", put(1e30)),
        ("act_scale", put(float("nan"))),
        ("act_scale", put(-1.0)),
        ("act_zero_point", put(128)),
        ("act_zero_point", put(-129)),
    ],
)
@pytest.mark.parametrize("layer", [CONV, LINEAR])
def test_corrupt_values_are_refused_by_the_layer_s_name(damaged, layer, tensor, change):
    path = damaged(lambda tensors: change(tensors[f"{layer}.{tensor}"]))

    with pytest.raises(ValueError, match=rf"{layer}\.{tensor}.*corrupt: download or save it again"):
        UNet2DConditionModel.from_pretrained(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["conv_in.weight", "mid_block.resnets.0.norm1.bias", f"{CONV}.bias"])
def test_values_that_are_not_finite_are_refused_by_name(damaged, name, value):
    path = damaged(lambda tensors: tensors[name].view(-1)[1:2].fill_(value))

    with pytest.raises(ValueError, match=rf"{name} must be finite"):
        UNet2DConditionModel.from_pretrained(path)


def test_values_that_overflow_in_the_requested_dtype_are_refused_by_name(damaged):
    path = damaged(lambda tensors: tensors["conv_out.bias"].fill_(1e6))

    with pytest.raises(ValueError, match=r"conv_out\.bias must be finite in torch\.float16"):
        UNet2DConditionModel.from_pretrained(path, torch_dtype=torch.float16)


def swap(a, b):
    def change(tensors):
        tensors[a], tensors[b] = tensors[b], tensors[a]

    return change


def exchange_nibbles(tensors):
    """Two weights of one output channel change places, so that their sum stays."""
    row = tensors[f"{LINEAR}.packed_weight"][0]
    place = int((row & 0x0F != row >> 4).nonzero()[0])
    row[place] = row[place] >> 4 | (row[place] & 0x0F) << 4


def shift(name):
    return lambda tensors: tensors[name].view(-1)[3:4].add_(0.01)


@pytest.mark.supports("Saving and loading", "damaged or exchanged tensors", "refused by name, by the digest")
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (exchange_nibbles, f"{LINEAR}.packed_weight"),
        (swap("mid_block.resnets.0.conv1.act_scale", "mid_block.resnets.1.conv1.act_scale"), f"{CONV}.act_scale"),
        *(
            (shift(name), name)
            for name in (
                f"{CONV}.weight_scale", f"{CONV}.weight_dilation", f"{LINEAR}.act_scale", f"{CONV}.bias",
                "conv_in.weight", "mid_block.resnets.0.norm1.weight", "conv_norm_out.bias",
            )
        ),
    ],
)  # fmt: skip
def test_plausible_values_of_another_model_are_refused_by_name(damaged, change, named):
    path = damaged(change)

    with pytest.raises(ValueError, match=rf"not those that were saved .*: .*{named}.* from another save. Download"):
        UNet2DConditionModel.from_pretrained(path)


@pytest.mark.parametrize("field", ["timesteps", "timestep_groups", "int8_attention"])
def test_config_of_another_save_is_refused(damaged, field):
    other = {"timesteps": [0.0, 10.0, 20.0, 30.0], "timestep_groups": 2, "int8_attention": ["attn1"]}[field]
    path = damaged(change_config=lambda config: config.update({field: other}))

    with pytest.raises(ValueError, match=r"config.json is not the one that was saved with these tensors"):
        UNet2DConditionModel.from_pretrained(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("norm_num_groups", 4), ("norm_eps", 1e-6), ("act_fn", "gelu"), ("flip_sin_to_cos", False), ("freq_shift", 1),
     ("attention_head_dim", 8), ("attention_head_dim", [4, 4]), ("sample_size", 16), ("mine", 3)],
)  # fmt: skip
def test_changed_field_of_the_model_s_config_is_refused(saved, tmp_path, name, value):
    """Most of these change the image, and no tensor's shape."""
    shutil.copytree(saved, tmp_path / "unet")
    config = json.loads((saved / "config.json").read_text())
    (tmp_path / "unet" / "config.json").write_text(json.dumps(config | {name: value}))

    refused = rf"The {name} in config.json is not the one|{len(config)} fields|fields of config.json, this one has"
    with pytest.raises(ValueError, match=rf"({refused}).* Download or save all files again"):
        UNet2DConditionModel.from_pretrained(tmp_path / "unet")


def test_lost_field_of_the_model_s_config_is_refused(saved, tmp_path):
    """diffusers takes its default."""
    shutil.copytree(saved, tmp_path / "unet")
    config = json.loads((saved / "config.json").read_text())
    del config["norm_num_groups"]
    (tmp_path / "unet" / "config.json").write_text(json.dumps(config))

    with pytest.raises(ValueError, match=r"config\.json"):
        UNet2DConditionModel.from_pretrained(tmp_path / "unet")


def test_another_field_of_the_config_in_from_pretrained_is_refused(saved):
    with pytest.raises(ValueError, match=r"norm_eps in config.json .* given to from_pretrained"):
        UNet2DConditionModel.from_pretrained(saved, norm_eps=1e-3)


def test_fields_that_a_newer_diffusers_adds_are_not_checked(saved, unet2d_condition):
    config = dict(unet2d_condition.quantized.config)
    newer = config | {"added_later": 3, "_use_default_values": ["added_later"]}

    assert digest.fields_to_check(newer, loaded=True) == digest.fields_to_check(config)
    assert "added_later" in digest.fields_to_check(newer)  # once it is saved, it is in the file


def test_digest_without_the_fields_of_the_config_loads_with_a_warning(damaged, unet2d_condition, assert_same_tensors):
    """As an older version wrote it."""

    def shorten(tensors):
        name = next(name for name in tensors if name.endswith(digest.NAME))
        tensors[name] = tensors[name][: len(tensors)].clone()

    with pytest.warns(UserWarning, match="older version and has no digest of config.json"):
        unet = UNet2DConditionModel.from_pretrained(damaged(shorten))

    assert_same_tensors(unet.state_dict(), unet2d_condition.quantized.state_dict())


@pytest.fixture
def other_save(unet2d_condition):
    """The quantized UNet with other biases."""
    other = unet2d_condition.copy()
    for layer in quantized_layers(other).values():
        if layer.bias is not None:
            layer.bias.data += 0.01
    return other


def test_shard_of_another_save_is_refused(unet2d_condition, other_save, tmp_path):
    for name, unet in {"old": unet2d_condition.quantized, "new": other_save}.items():
        unet.save_pretrained(tmp_path / name, max_shard_size="200KB")
    shards = sorted(path.name for path in (tmp_path / "new").glob("*.safetensors"))
    for shard in shards:
        shutil.copytree(tmp_path / "old", tmp_path / shard)
        shutil.copy(tmp_path / "new" / shard, tmp_path / shard / shard)

        with pytest.raises(ValueError, match="from another save"):
            UNet2DConditionModel.from_pretrained(tmp_path / shard)


def test_a_shard_without_its_tensors_is_refused(unet2d_condition, tmp_path):
    unet2d_condition.quantized.save_pretrained(tmp_path, max_shard_size="200KB")
    first, second, *_ = sorted(tmp_path.glob("*.safetensors"))
    shutil.copy(first, second)

    with pytest.raises(ValueError, match=r"missing tensors: .* and \d+ more\. The file is incomplete"):
        UNet2DConditionModel.from_pretrained(tmp_path)


def test_weights_of_another_save_are_refused(saved, unet2d_condition, tmp_path):
    """A save that was interrupted between the config and the weights leaves these two."""
    timesteps = unet2d_condition.copy()
    timesteps.hf_quantizer.quantization_config.timesteps = [0.0, 10.0, 20.0, 30.0]
    timesteps.save_pretrained(tmp_path)
    shutil.copy(saved / WEIGHTS, tmp_path / WEIGHTS)

    with pytest.raises(ValueError, match=r"config.json is not the one"):
        UNet2DConditionModel.from_pretrained(tmp_path)


def test_checkpoint_without_digest_loads_with_a_warning(damaged, unet2d_condition, assert_same_tensors, recwarn):
    def remove(tensors):
        del tensors[next(name for name in tensors if name.endswith(digest.NAME))]

    path = damaged(remove)
    recwarn.clear()

    unet = UNet2DConditionModel.from_pretrained(path)

    assert any("has no digest" in str(warning.message) for warning in recwarn)
    assert_same_tensors(unet.state_dict(), unet2d_condition.quantized.state_dict())


def test_undamaged_copy_loads(damaged, unet2d_condition, assert_same_tensors):
    """Or the tests above might refuse the copying."""
    unet = UNet2DConditionModel.from_pretrained(damaged())

    assert_same_tensors(unet.state_dict(), unet2d_condition.quantized.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timesteps": [0.0, 500.0]}, r"act_scale: expected shape \(2,\), the checkpoint holds \(4,\)"),
        ({"timesteps": None}, r"unexpected tensors: .*act_scale"),
        ({"timesteps": [750.0, 500.0, 250.0, 0.0]}, "sorted"),
        ({"modules_to_not_convert": []}, r"missing tensors: conv_in\.act_scale"),
        (
            {"modules_to_not_convert": ["mid_block", "conv_in", "conv_out"]},
            r"missing tensors: mid_block\.\S+\.weight",
        ),
        ({"weight_bits": 8}, "weight_bits must be 4"),
        ({"quant_method": "dilate"}, "dilatequant"),
    ],
    ids=str,
)
def test_config_that_does_not_fit_the_tensors_is_refused(damaged, change, message):
    path = damaged(change_config=lambda config: config.update(change))

    with pytest.raises(ValueError, match=message):
        UNet2DConditionModel.from_pretrained(path)


def test_activation_bits_below_the_zero_points_are_refused(damaged):
    path = damaged(change_config=lambda config: config.update(activation_bits=4))

    with pytest.raises(ValueError, match=r"act_zero_point must lie in \[-8, 7\]"):
        UNet2DConditionModel.from_pretrained(path)


def test_another_process_needs_the_import_of_dq_runtime_and_no_more(saved, unet2d_condition, tmp_path):
    torch.save((unet2d_condition.sample, unet2d_condition.arguments), tmp_path / "inputs.pt")
    code = f"""
import sys
import torch
from diffusers import UNet2DConditionModel
try:
    UNet2DConditionModel.from_pretrained({str(saved)!r})
except ValueError as error:
    print(error)
else:
    sys.exit("loaded without the import")

import dq_runtime
unet = UNet2DConditionModel.from_pretrained({str(saved)!r})
sample, arguments = torch.load("inputs.pt")
with torch.no_grad():
    torch.save(unet(sample, torch.tensor([3, 999]), **arguments).sample, "output.pt")
if any(name.startswith("dq_runtime.calibration") for name in sys.modules):
    sys.exit("inference imported calibration")
"""

    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)

    assert result.returncode == 0, result.stderr
    assert "dilatequant" in result.stdout
    expected = unet2d_condition.call(unet2d_condition.quantized, torch.tensor([3, 999]))
    assert torch.equal(torch.load(tmp_path / "output.pt"), expected)


@pytest.mark.supports("Saving and loading", "saves with an adapter", "leave the adapter out, with a warning")
def test_adapters_are_left_out_of_a_checkpoint(unet2d_condition, tmp_path, assert_same_tensors, caplog):
    unet = unet2d_condition.copy()
    unet.save_pretrained(tmp_path)
    assert not caplog.records
    unet.add_adapter(LoraConfig(target_modules=["to_q", "conv1", "conv_in"]))

    unet.save_pretrained(tmp_path)
    assert "adapters of the model are not part of its checkpoint: save them with save_lora_adapter()" in caplog.text

    loaded = UNet2DConditionModel.from_pretrained(tmp_path)
    assert_same_tensors(loaded.state_dict(), unet2d_condition.quantized.state_dict())


@pytest.mark.supports("Offloading", "`device_map` with disk", "same result")
def test_unet_is_offloaded_to_the_disk(unet2d_condition, tmp_path):
    unet2d_condition.quantized.save_pretrained(tmp_path / "unet")
    unet = UNet2DConditionModel.from_pretrained(
        tmp_path / "unet", device_map="auto", max_memory={"cpu": "40KB"}, offload_folder=tmp_path / "offloaded"
    )

    assert "disk" in unet.hf_device_map.values()
    assert torch.equal(unet2d_condition.call(unet), unet2d_condition.call(unet2d_condition.quantized))
