"""``dq-runtime quantize`` on a tiny random pipeline: what it writes, and that interruptions change nothing."""

from logging import NullHandler

import distilling
import tiny_unets
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DModel
from diffusers.utils import logging
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from tiny_pipeline import SHORT

import dq_runtime
from dq_runtime.calibration.training import Trainer
from dq_runtime.cli.drawing import record
from dq_runtime.layers import is_quantized, quantized_layers

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def test_stock_diffusers_loads_the_written_pipeline(packed_folder, pipeline_folder):
    pipeline = DiffusionPipeline.from_pretrained(packed_folder)
    pipeline.set_progress_bar_config(disable=True)

    assert is_quantized(pipeline.unet)
    assert not any(name.startswith(("mid_block", "up_blocks")) for name in quantized_layers(pipeline.unet))
    image = pipeline("a cat", num_inference_steps=2, output_type="pt").images
    assert torch.isfinite(torch.as_tensor(image)).all()
    assert {entry.name for entry in packed_folder.iterdir()} == {entry.name for entry in pipeline_folder.iterdir()}
    assert not packed_folder.with_name("out.work").exists()


def test_an_interruption_after_the_recording_changes_no_byte(quantize, packed_folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        distilling.interrupt(patch, dq_runtime, "calibrate", 0)
        assert "Interrupted" in quantize(tmp_path / "out", code=130).stderr
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.work" / "calls.safetensors").exists()
    monkeypatch.setattr(dq_runtime, "collect_from_pipeline", recorded_once(dq_runtime.collect_from_pipeline))

    quantize(tmp_path / "out")

    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (packed_folder / WEIGHTS).read_bytes()


def test_an_interruption_after_the_first_block_changes_no_byte(quantize, packed_folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        distilling.interrupt(patch, Trainer, "distil", 1)
        assert "Interrupted" in quantize(tmp_path / "out", code=130).stderr
    assert not (tmp_path / "out").exists()
    assert len(list((tmp_path / "out.work" / "blocks").glob("*.safetensors"))) == 1

    quantize(tmp_path / "out")

    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (packed_folder / WEIGHTS).read_bytes()
    assert not (tmp_path / "out.work").exists()


def recorded_once(collect):
    """Only the probe's one prompt may be recorded."""

    def collect_probe(pipeline, calls, component):
        assert len(calls) == 1
        return collect(pipeline, calls, component)

    return collect_probe


def test_prompts_that_are_too_long_for_the_tokenizer_are_cut_without_a_warning(pipeline_folder, monkeypatch):
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder)
    warned, before = [], logging.get_verbosity()
    handler = NullHandler()
    monkeypatch.setattr(handler, "handle", warned.append)
    logging.add_handler(handler)

    pipeline("a" * 50, num_inference_steps=1)
    assert warned
    warned.clear()
    record(pipeline, pipeline.unet, ["a" * 50], 1, 2, 0)

    logging.remove_handler(handler)
    assert warned == []
    assert logging.get_verbosity() == before


def test_estimate_comes_before_the_work_and_is_updated(run, pipeline_folder, prompts, tmp_path):
    arguments = ["quantize", pipeline_folder, "-o", tmp_path / "out", "--prompts", prompts, *SHORT]
    lines = run(*arguments, "--keep", "down_blocks.1").stderr.splitlines()

    estimate = next(i for i, line in enumerate(lines) if line.startswith("estimate"))
    first_block = next(i for i, line in enumerate(lines) if line.startswith("block 1 of"))
    assert "memory" in lines[estimate]
    assert "left" in lines[first_block]
    assert estimate < first_block


def test_a_lora_of_unet_and_text_encoder_is_merged_before_quantization(
    quantize, pipeline_folder, packed_folder, tmp_path
):
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder)
    for model, layer in ((pipeline.unet, "to_q"), (pipeline.text_encoder, "q_proj")):
        model.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=[layer]))
    layers = [get_peft_model_state_dict(model) for model in (pipeline.unet, pipeline.text_encoder)]
    StableDiffusionPipeline.save_lora_weights(tmp_path, *layers)

    quantize(tmp_path / "out", "--lora", tmp_path / "pytorch_lora_weights.safetensors")

    merged, without = (DiffusionPipeline.from_pretrained(folder) for folder in (tmp_path / "out", packed_folder))
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    assert not hasattr(merged.unet, "peft_config")
    weights = [p.unet.get_submodule(name).packed_weight for p in (merged, without)]
    assert not torch.equal(*weights)
    encoders = [dict(p.text_encoder.named_parameters()) for p in (merged, without)]
    assert encoders[0].keys() == encoders[1].keys()
    changed = {name for name in encoders[0] if not torch.equal(encoders[0][name], encoders[1][name])}
    assert changed == {name for name in encoders[0] if name.endswith("q_proj.weight")}


def test_a_single_file_becomes_a_whole_pipeline(quantize, pipeline_folder, packed_folder, tmp_path, monkeypatch):
    """Reading the file is diffusers' part, and needs the hub for the components' configs."""
    file = tmp_path / "model.safetensors"
    save_file({"cond_stage_model.weight": torch.ones(1)}, file)
    loaded = []

    def from_single_file(path, **arguments):
        loaded.append(path)
        return StableDiffusionPipeline.from_pretrained(pipeline_folder, **arguments)

    monkeypatch.setattr(StableDiffusionPipeline, "from_single_file", from_single_file)

    quantize(tmp_path / "out", model=file)

    assert loaded == [str(file)]
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (packed_folder / WEIGHTS).read_bytes()
    assert DiffusionPipeline.from_pretrained(tmp_path / "out").tokenizer is not None


def test_an_unconditional_unet_needs_no_prompts(run_json, tmp_path):
    tiny_unets.unet2d(block_out_channels=(16, 32), norm_num_groups=4).save_pretrained(tmp_path / "unet")

    report = run_json("quantize", tmp_path / "unet", "-o", tmp_path / "out", *SHORT, "--bits", 4)

    unet = UNet2DModel.from_pretrained(tmp_path / "out")
    assert len(quantized_layers(unet)) == report["layers"]
    assert report["bytes_after"] < report["bytes_before"]
    assert unet.config.quantization_config.activation_bits == 4


def test_weights_of_the_variant_fp16_are_found(run_json, tmp_path):
    unet = tiny_unets.unet2d(block_out_channels=(16, 32), norm_num_groups=4).half()
    unet.save_pretrained(tmp_path / "unet", variant="fp16")

    assert run_json("bench", tmp_path / "unet", "--rounds", 1)["forms"]
