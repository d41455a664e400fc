"""Quantization of floating-point checkpoints while they are loaded."""

import copy
import shutil
import threading

import pytest
import tiny_pipeline
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel, VQModel
from diffusers.models import modeling_utils
from diffusers.quantizers import PipelineQuantizationConfig
from safetensors.torch import load_file, save_file

import dq_runtime
from dq_runtime import DilateQuantConfig, diffusers_quantizer
from dq_runtime.diffusers_quantizer import DilateQuantizer
from dq_runtime.layers import quantized_layers
from dq_runtime.on_loading import WeightsOnLoading

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(unet2d_condition, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stock")
    unet2d_condition.stock.save_pretrained(folder)
    return folder


def load(folder, **config):
    return UNet2DConditionModel.from_pretrained(folder, quantization_config=DilateQuantConfig(**config))


def error(subject, unet, timestep=500):
    expected = subject.call(subject.stock, timestep)
    return float((subject.call(unet, timestep) - expected).norm() / expected.norm())


@pytest.mark.supports(
    "Saving and loading",
    "`quantization_config=DilateQuantConfig()`",
    "packs a floating-point checkpoint while it is loaded",
    "scales at run time until `calibrate`",
)
def test_floating_point_checkpoint_is_packed_on_loading(unet2d_condition, folder):
    unet = load(folder)

    layers = quantized_layers(unet)
    assert layers.keys() == quantized_layers(unet2d_condition.quantized).keys()
    assert all(layer.packed_weight.dtype == torch.uint8 and layer.act_scale is None for layer in layers.values())
    assert 0 < error(unet2d_condition, unet) < 0.2
    assert not any(parameter.requires_grad for parameter in unet.parameters())


def test_scales_follow_each_sample(unet2d_condition, folder):
    unet = load(folder)
    subject = unet2d_condition
    together = subject.call(unet)

    for i in range(2):
        arguments = {name: value[i : i + 1] for name, value in subject.arguments.items()}
        alone = unet(subject.sample[i : i + 1], 500, **arguments).sample
        assert (alone - together[i : i + 1]).norm() < 0.03 * alone.norm()
    big = unet(1000 * subject.sample, 500, **subject.arguments).sample
    expected = subject.stock(1000 * subject.sample, 500, **subject.arguments).sample
    assert (big - expected).norm() < 0.2 * expected.norm()


def test_fused_unet_computes_as_the_unfused_one(unet2d_condition, folder):
    unet = load(folder)
    expected = unet2d_condition.call(unet)

    assert len(dq_runtime.fuse(unet)) > 5
    assert (unet2d_condition.call(unet) - expected).norm() < 0.03 * expected.norm()


def test_layers_that_read_one_tensor_have_one_dilation(folder):
    unet = load(folder)
    dilated = 0
    for module in unet.modules():
        if hasattr(module, "to_q") and not module.is_cross_attention:
            dilations = [layer.weight_dilation for layer in (module.to_q, module.to_k, module.to_v)]
            assert all(torch.equal(dilation, dilations[0]) for dilation in dilations)
            dilated += bool((dilations[0] > 1).any())
    assert dilated


def is_alone(tensor):
    """True if nothing but the tensor is in its memory: one of a mapped file would keep all of that there."""
    return tensor.untyped_storage().nbytes() == tensor.nbytes


def test_no_tensor_keeps_its_file_in_memory(folder):
    unet = load(folder, modules_to_not_convert=["conv_in", "mid_block"])
    assert [name for name, tensor in unet.state_dict().items() if not is_alone(tensor)] == []


def test_weights_wait_for_their_group_alone(unet2d_condition, monkeypatch, folder):
    """So the peak of memory is a shard, and the packed model."""
    waiting, add = [], WeightsOnLoading.add

    def counted(self, *arguments):
        add(self, *arguments)
        waiting.append(len(self._waiting))
        assert all(is_alone(weight) for weight in self._waiting.values())

    monkeypatch.setattr(WeightsOnLoading, "add", counted)
    load(folder)
    assert len(waiting) == len(quantized_layers(unet2d_condition.quantized))
    assert max(waiting) == 2
    assert waiting[-1] == 0


@pytest.mark.skipif(not diffusers_quantizer.RENAMES, reason="diffusers before 0.39 does not ask")
@pytest.mark.parametrize("packed", [False, True])
def test_shards_are_read_one_by_one_unless_they_are_packed(unet2d_condition, folder, tmp_path, monkeypatch, packed):
    monkeypatch.setattr(modeling_utils, "HF_ENABLE_PARALLEL_LOADING", True)
    threads = []
    create = DilateQuantizer.create_quantized_param

    def counted(self, *arguments, **kwargs):
        threads.append(threading.current_thread())
        return create(self, *arguments, **kwargs)

    monkeypatch.setattr(DilateQuantizer, "create_quantized_param", counted)
    (load(folder) if packed else copy.deepcopy(unet2d_condition.stock)).save_pretrained(
        tmp_path, max_shard_size="100KB"
    )
    threads.clear()

    unet = UNet2DConditionModel.from_pretrained(tmp_path) if packed else load(tmp_path)

    assert (set(threads) == {threading.main_thread()}) is not packed
    assert torch.equal(unet2d_condition.call(unet), unet2d_condition.call(load(folder)))


def test_saved_again_it_is_a_packed_checkpoint(unet2d_condition, folder, tmp_path):
    unet = load(folder, dilation="none")
    unet.save_pretrained(tmp_path)

    again = UNet2DConditionModel.from_pretrained(tmp_path)

    assert torch.equal(unet2d_condition.call(again), unet2d_condition.call(unet))


def test_dequantized_it_is_a_stock_unet(unet2d_condition, folder):
    unet = load(folder)

    stock = copy.deepcopy(unet).dequantize()

    assert not quantized_layers(stock)
    assert error(unet2d_condition, stock) < 0.2


def test_options_reach_the_layers(folder):
    unet = load(folder, activation_bits=4, layer_activation_bits={}, modules_to_not_convert=["mid_block", "conv_in"])

    layers = quantized_layers(unet)
    assert not any(name.startswith(("mid_block", "conv_in")) for name in layers)
    assert {layer.activation_bits for layer in layers.values()} == {4}


@pytest.mark.parametrize("what", ["latent", "prompt"])
def test_nan_is_visible(unet2d_condition, folder, what):
    unet = load(folder)
    sample, prompt = unet2d_condition.sample.clone(), unet2d_condition.arguments["encoder_hidden_states"].clone()
    (sample if what == "latent" else prompt)[0].view(-1)[0] = torch.nan

    result = unet(sample, 500, prompt).sample

    assert not result[0].isfinite().any()
    assert torch.equal(result[1], unet2d_condition.call(unet)[1])


def test_timesteps_need_calibration(folder):
    with pytest.raises(ValueError, match="need calibration"):
        load(folder, timesteps=[0.0, 500.0])


def test_other_models_are_refused_with_those_that_are_known(tmp_path):
    VQModel(block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path)

    with pytest.raises(TypeError, match=r"VQModel is no model .* it supports UNet2DModel"):
        VQModel.from_pretrained(tmp_path, quantization_config=DilateQuantConfig())


def test_weight_that_is_not_finite_is_refused_by_name(unet2d_condition, tmp_path):
    unet = copy.deepcopy(unet2d_condition.stock)
    unet.mid_block.resnets[0].conv1.weight[0, 0, 0, 0] = torch.inf
    unet.save_pretrained(tmp_path)

    with pytest.raises(ValueError, match=r"mid_block\.resnets\.0\.conv1\.weight holds NaN"):
        load(tmp_path)


def test_calibration_gives_it_static_scales(unet2d_condition, folder, tmp_path):
    unet = load(folder)
    packed = {name: layer.packed_weight.clone() for name, layer in quantized_layers(unet).items()}

    assert dq_runtime.calibrate(unet, unet2d_condition.calibration_set, distillation=None) is unet

    for name, layer in quantized_layers(unet).items():
        assert torch.equal(layer.packed_weight, packed[name])
        assert layer.act_scale.shape == (4,)
    assert 0 < error(unet2d_condition, unet) < 0.2
    assert len(dq_runtime.fuse(unet)) > 5
    unet.save_pretrained(tmp_path)
    again = UNet2DConditionModel.from_pretrained(tmp_path)
    dq_runtime.fuse(again)
    assert torch.equal(unet2d_condition.call(again), unet2d_condition.call(unet))


@pytest.mark.parametrize(
    "arguments", [{"distillation": dq_runtime.Distillation()}, {"config": DilateQuantConfig(activation_bits=4)}]
)
def test_calibration_changes_neither_weights_nor_config(unet2d_condition, folder, arguments):
    with pytest.raises(ValueError, match="weights and config are fixed"):
        dq_runtime.calibrate(load(folder), unet2d_condition.calibration_set, **arguments)


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory):
    return tiny_pipeline.save_pipeline(tmp_path_factory.mktemp("pipeline"))


BACKEND = {"quant_backend": "dilatequant", "quant_kwargs": {"activation_bits": 8}}


@pytest.mark.supports(
    "Pipelines",
    "`PipelineQuantizationConfig`",
    'by `quant_mapping` and by `quant_backend="dilatequant"`',
    "models of transformers are refused: name the others in `components_to_quantize`",
)
@pytest.mark.parametrize(
    "arguments", [{"quant_mapping": {"unet": DilateQuantConfig()}}, {**BACKEND, "components_to_quantize": ["unet"]}]
)
def test_pipeline_quantizes_its_unet(pipeline_folder, arguments):
    config = PipelineQuantizationConfig(**arguments)

    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder, quantization_config=config)

    assert len(quantized_layers(pipeline.unet)) > 20
    assert not quantized_layers(pipeline.vae)


def test_a_text_encoder_is_refused_with_the_remedy(pipeline_folder):
    config = PipelineQuantizationConfig(**BACKEND)

    with pytest.raises(ValueError, match=r"this one is of transformers: .*components_to_quantize=\['unet'\]"):
        StableDiffusionPipeline.from_pretrained(pipeline_folder, quantization_config=config)


@pytest.mark.supports("Saving and loading", "`from_single_file`", "packs a floating-point file while it is loaded")
def test_single_file_is_quantized_and_saved_as_packed(unet2d_condition, folder, tmp_path):
    unet = UNet2DConditionModel.from_single_file(
        str(folder / WEIGHTS), config=str(folder), quantization_config=DilateQuantConfig()
    )
    unet.save_pretrained(tmp_path)

    expected = unet2d_condition.call(load(folder))
    assert torch.equal(unet2d_condition.call(unet), expected)
    assert torch.equal(unet2d_condition.call(UNet2DConditionModel.from_pretrained(tmp_path)), expected)


@pytest.mark.supports("Saving and loading", "`from_single_file` of packed weights", "refused: load the folder")
@pytest.mark.parametrize("arguments", [{}, {"quantization_config": DilateQuantConfig()}])
def test_single_file_of_packed_weights_is_refused_with_the_remedy(folder, tmp_path, arguments):
    load(folder).save_pretrained(tmp_path)

    with pytest.raises(ValueError, match=r"packed INT4 weights.*with from_pretrained"):
        UNet2DConditionModel.from_single_file(str(tmp_path / WEIGHTS), config=str(folder), **arguments)


@pytest.mark.supports("Saving and loading", "floating-point checkpoints in float8", "packed on loading")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_checkpoint_in_float8_is_quantized(unet2d_condition, folder, tmp_path, dtype):
    """diffusers casts no tensor of float8 for a quantizer."""
    tensors = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, tmp_path / WEIGHTS)
    shutil.copy(folder / "config.json", tmp_path)

    unet = UNet2DConditionModel.from_pretrained(tmp_path, quantization_config=DilateQuantConfig(), torch_dtype=dtype)

    assert {p.dtype for p in unet.parameters()} == {dtype, torch.uint8}
    expected = copy.deepcopy(unet2d_condition.stock)
    expected.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    result = unet2d_condition.call(unet, dtype=dtype)
    assert (result - unet2d_condition.call(expected)).norm() < 0.2 * result.norm()
