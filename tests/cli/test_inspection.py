"""``dq-runtime inspect``: what it says is what the loaded model has, and it reads no tensor."""

import os
import shutil

import pytest
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from dq_runtime.evaluation.footprint import footprint
from dq_runtime.layers import quantized_layers


@pytest.fixture(scope="module")
def report(run_json, packed_folder):
    return run_json("inspect", packed_folder)


@pytest.fixture(scope="module")
def unet(packed_folder):
    return UNet2DConditionModel.from_pretrained(packed_folder / "unet")


def test_layers_are_those_of_the_loaded_model(report, unet):
    layers = quantized_layers(unet)

    assert report["layers"].keys() == layers.keys()
    for name, layer in layers.items():
        found = report["layers"][name]
        assert tuple(found["shape"]) == layer.stock_shape
        assert found["activation_bits"] == layer.activation_bits
        assert found["bytes"] >= sum(tensor.nbytes for tensor in (layer.packed_weight, *layer.buffers()))
    assert report["missing"] == []
    assert report["timesteps"] == unet.config.quantization_config.timesteps


def test_sizes_are_those_of_the_loaded_model(report, unet):
    measured = footprint(unet)

    assert report["bytes"]["packed weights"] == sum(
        layer.packed_weight.nbytes for layer in quantized_layers(unet).values()
    )
    assert report["bytes"]["same layers in fp16"] == measured.weights_fp16
    assert report["bytes"]["packed weights"] + report["bytes"]["tables"] == measured.weights + measured.tables


def test_every_layer_in_floating_point_has_its_reason(report, unet):
    assert report["floating_point"]["conv_in"] == "in modules_to_not_convert"
    assert any(name.startswith("mid_block") for name in report["floating_point"])
    assert not report["floating_point"].keys() & quantized_layers(unet).keys()


def test_no_tensor_is_read(run_json, packed_folder, tmp_path, report):
    """A file of the same size without any data behind its header gives the same report."""
    shutil.copytree(packed_folder / "unet", tmp_path / "unet")
    (file,) = (tmp_path / "unet").glob("*.safetensors")
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    file.write_bytes(content[:header] + bytes(len(content) - header))

    assert run_json("inspect", tmp_path / "unet") == report | {"folder": str(tmp_path / "unet")}


def test_a_layer_that_the_files_lack_is_named_with_exit_code_1(run, packed_folder, tmp_path):
    shutil.copytree(packed_folder / "unet", tmp_path / "unet")
    (file,) = (tmp_path / "unet").glob("*.safetensors")
    save_file({name: t for name, t in load_file(file).items() if not name.startswith("time_embedding.linear_2.")}, file)

    assert "Missing in the files: time_embedding.linear_2." in run("inspect", tmp_path / "unet", code=1).stderr


@pytest.mark.parametrize(("own", "expected"), [(None, "error"), ("info", "info")])
def test_transformers_tells_of_errors_alone_unless_told_otherwise(run, packed_folder, monkeypatch, own, expected):
    """It warns that torchvision is missing, which no command needs."""
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", own or "")
    if own is None:
        monkeypatch.delenv("TRANSFORMERS_VERBOSITY")

    run("inspect", packed_folder)

    assert os.environ["TRANSFORMERS_VERBOSITY"] == expected
