"""Errors of the user: one line with what was found and the remedy, exit code 2, nothing on stdout, no traceback."""

import errno
import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from tiny_unets import unet2d

import dq_runtime
from dq_runtime.cli import work_folder
from dq_runtime.cli.errors import explanation


@pytest.fixture
def refused(run):
    """Runs a command that must be refused, with a line that holds all of these texts."""

    def refused(arguments, *texts, code=2):
        result = run(*arguments, code=code)
        lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
        assert len(lines) == 1, result.stderr
        assert result.stderr.rstrip().endswith(lines[0])
        assert not result.stdout
        assert "Traceback" not in result.stderr
        for text in texts:
            assert text in lines[0], lines[0]

    return refused


@pytest.fixture(scope="module")
def unconditional(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unconditional") / "unet"
    unet2d(block_out_channels=(16, 32), norm_num_groups=4).save_pretrained(folder)
    return folder


@pytest.fixture
def out(tmp_path):
    return ["-o", tmp_path / "out"]


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["quantise"], ["No such command 'quantise'", "--help"]),
        ([], ["Missing command", "--help"]),
        (["quantize"], ["Missing argument", "--help"]),
        (["quantize", "model"], ["Missing option", "-o"]),
        (["inspect", "a", "b"], ["unexpected extra argument"]),
        (["quantize", "model", "-o", "out", "--bits", "eight"], ["--bits", "valid integer"]),
        (["quantize", "model", "-o", "out", "--wild"], ["No such option", "--wild"]),
        (["quantize", "model", "-o", "out", "--bits", "5"], ["--bits must be 8, 6 or 4, got 5"]),
        (["quantize", "model", "-o", "out", "--preset", "slow"], ["--preset must be fast, balanced, best, got slow"]),
        (["quantize", "model", "-o", "out", "--steps", "1"], ["--steps must be at least 2, got 1"]),
        (["quantize", "model", "-o", "out", "--samples", "0"], ["--samples must be at least 1, got 0"]),
        (["quantize", "model", "-o", "out", "--seed", "-1"], ["--seed must be at least 0, got -1"]),
        (["quantize", "model", "-o", "out", "--prompts", "none.txt"], ["--prompts none.txt: there is no such file"]),
        (["quantize", "./none", "-o", "out"], ["./none: there is no such file or folder", "OWNER/NAME"]),
        (["quantize", "some/model", "-o", "out"], ["hub cannot be reached", "give a folder"]),
        (["quantize", "some/model", "-o", "out", "--device", "toaster"], ["--device toaster is no device", "cpu"]),
        (["quantize", "some/model", "-o", "out", "--device", "meta"], ["kernels for cuda and cpu alone"]),
        (["inspect", "none"], ["none: there is no such folder"]),
        (["generate", "./none", "a cat", "--steps", "0"], ["--steps must be at least 1, got 0"]),
        (["generate", "./none", "a cat", "--batch", "0"], ["--batch must be at least 1, got 0"]),
        (["bench", "./none", "--rounds", "0"], ["--rounds must be at least 1, got 0"]),
        (["compare", "./none", "./none", "-o", "no/folder/page.html"], ["no/folder: there is no such folder"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and len(value) != 1 else None,
)
def test_bad_options_and_paths(refused, tmp_path, monkeypatch, arguments, texts):
    monkeypatch.chdir(tmp_path)

    refused(arguments, *texts)

    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["doctor", "bench"])
def test_no_gpu(refused, unconditional, command):
    refused([command, *([unconditional] if command == "bench" else []), "--device", "cuda"], "0 CUDA devices", "cpu")


def test_model_of_another_class(refused, pipeline_folder, out):
    refused(["quantize", pipeline_folder / "vae", *out], "holds a AutoencoderKL", "UNet2DConditionModel")


def test_folder_without_a_model(refused, tmp_path, out):
    refused(["quantize", tmp_path, *out], "holds neither model_index.json nor config.json", "save_pretrained")


def test_pipeline_without_a_unet(refused, pipeline_folder, tmp_path, out):
    shutil.copytree(pipeline_folder / "vae", tmp_path / "pipeline" / "vae")
    index = {"_class_name": "DiffusionPipeline", "vae": ["diffusers", "AutoencoderKL"]}
    (tmp_path / "pipeline" / "model_index.json").write_text(json.dumps(index))

    refused(["inspect", tmp_path / "pipeline"], "without a UNet")


def test_damaged_config(refused, unconditional, tmp_path, out):
    shutil.copytree(unconditional, tmp_path / "unet")
    (tmp_path / "unet" / "config.json").write_text("{")

    refused(["quantize", tmp_path / "unet", *out], "config.json is no JSON", "download or save it again")


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("model.ckpt", b"pickle", ["is no .safetensors file", "Convert it"]),
        ("model.safetensors", b"", ["is no safetensors file, or it is cut off"]),
        ("model.safetensors", (99).to_bytes(8, "little") + b"{", ["is no safetensors file, or it is cut off"]),
    ],
)
def test_single_files_that_cannot_be_read(refused, tmp_path, out, name, content, texts):
    (tmp_path / name).write_bytes(content)

    refused(["quantize", tmp_path / name, *out], name, *texts)


def test_single_file_that_is_no_whole_checkpoint(refused, tmp_path, out):
    save_file({"lora_unet.alpha": torch.ones(1)}, tmp_path / "lora.safetensors")

    refused(["quantize", tmp_path / "lora.safetensors", *out], "no text encoder", "--lora")


def test_existing_output(refused, unconditional, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()

    refused(["quantize", unconditional, "-o", tmp_path / "out"], "out exists", "another folder")

    assert [entry.name for entry in tmp_path.rglob("*")] == ["out", "mine"]


def test_existing_page(refused, tmp_path):
    (tmp_path / "page.html").touch()

    refused(["compare", "./a", "./b", "-o", tmp_path / "page.html"], "page.html exists", "another file")


def test_interrupted_command_with_other_options(refused, unconditional, tmp_path, out):
    work = work_folder.WorkFolder(tmp_path / "out", {"steps": 25, "bits": 8, "seed": 0})
    work.create()
    work.calls.touch()

    refused(["quantize", unconditional, *out, "--bits", 4, "--steps", 25], "out.work belongs to", "bits")


def test_layer_to_keep_that_there_is_not(refused, unconditional, out):
    refused(["quantize", unconditional, *out, "--keep", "conv_inn"], "--keep conv_inn matches no layer", "mid_block")


def test_damaged_weights(refused, unconditional, pipeline_folder, tmp_path, out):
    shutil.copytree(unconditional, tmp_path / "unet")
    shutil.copytree(pipeline_folder, tmp_path / "pipeline")
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"damaged")
    (tmp_path / "pipeline" / "vae" / "diffusion_pytorch_model.safetensors").unlink()

    refused(["quantize", tmp_path / "unet", *out], "unet", "diffusion_pytorch_model.safetensors")
    refused(["quantize", tmp_path / "pipeline", *out], "pipeline", "vae")


def test_prompts_that_are_none(refused, unconditional, tmp_path, out):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")

    refused(["quantize", unconditional, *out, "--prompts", tmp_path / "empty.txt"], "empty.txt is empty")
    refused(["quantize", unconditional, *out, "--prompts", tmp_path / "latin.txt"], "no text in UTF-8")


def test_prompts_for_a_model_without(refused, unconditional, prompts, out):
    refused(["quantize", unconditional, *out, "--prompts", prompts], "takes no prompts: leave out --prompts")


def test_lora_that_cannot_be_merged(refused, pipeline_folder, unconditional, tmp_path, out):
    (tmp_path / "bad.safetensors").write_bytes(b"bad")
    save_file({"unrelated": torch.ones(1)}, tmp_path / "other.safetensors")

    refused(["quantize", pipeline_folder, *out, "--lora", "none.safetensors"], "none.safetensors: there is no such")
    refused(["quantize", pipeline_folder, *out, "--lora", tmp_path / "bad.safetensors"], "is no safetensors file")
    refused(["quantize", pipeline_folder, *out, "--lora", tmp_path / "other.safetensors"], "other.safetensors", "LoRA")
    refused(["quantize", unconditional, *out, "--lora", tmp_path / "bad.safetensors"], "needs a whole pipeline")


def test_conditional_unet_without_its_pipeline(refused, pipeline_folder, out):
    refused(["quantize", pipeline_folder / "unet", *out], "This UNet reads prompts", "pipeline's folder")


def test_packed_model(refused, packed_folder, out):
    refused(["quantize", packed_folder, *out], "quantized already", "original weights")


def test_disk_that_is_too_small(refused, unconditional, out, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**5))

    refused(["quantize", unconditional, *out], "100 kB are free", "another disk")

    assert not work_folder.WorkFolder(out[1], {}).folder.exists()


def test_disk_that_fills_up(refused, unconditional, out, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(dq_runtime.CalibrationSet, "save", full)

    refused(["quantize", unconditional, *out, "--steps", 2], "The disk is full", "repeat the command")


def test_gpu_memory_that_fills_up(refused, unconditional, out, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(dq_runtime, "collect_from_scheduler", full)

    refused(["quantize", unconditional, *out], "GPU's memory is full", "--device cpu")


def test_ctrl_c(run, unconditional, out, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(dq_runtime, "collect_from_scheduler", interrupt)

    result = run("quantize", unconditional, *out, code=130)

    assert result.stderr.splitlines()[-1].startswith("Interrupted.")


def test_error_of_the_program_keeps_its_traceback(run, unconditional, out, monkeypatch):
    def fail(*arguments):
        raise ZeroDivisionError

    monkeypatch.setattr(dq_runtime, "collect_from_scheduler", fail)

    with pytest.raises(ZeroDivisionError):
        run("quantize", unconditional, *out)


def test_inspecting_floating_point(refused, pipeline_folder):
    refused(["inspect", pipeline_folder], "is in floating point", "dq-runtime quantize")


def test_inspecting_a_file_that_is_cut_off(refused, packed_folder, tmp_path):
    shutil.copytree(packed_folder / "unet", tmp_path / "unet")
    (file,) = (tmp_path / "unet").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])

    refused(["inspect", tmp_path / "unet"], "is cut off", "Download or save it again")


def test_generating_without_a_prompt_or_a_decoder(refused, packed_folder, unconditional, tmp_path):
    refused(["generate", packed_folder, "-o", tmp_path], "needs at least one prompt")
    refused(["generate", unconditional, "a cat", "-o", tmp_path], "a UNet alone", "pipeline's folder")


def test_scheduler_that_does_not_fit(refused, packed_folder, tmp_path):
    arguments = ["generate", packed_folder, "a cat", "-o", tmp_path, "--scheduler", "Fast"]

    refused(arguments, "--scheduler Fast does not fit", "EulerDiscreteScheduler")


def test_packages_that_are_missing_are_named():
    missing = ModuleNotFoundError("No module named 'skimage'", name="skimage")

    assert explanation(missing) == "The package scikit-image is missing: pip install scikit-image"


def test_decoder_alone_is_no_pipeline(refused, tmp_path):
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path / "vae")

    refused(["bench", tmp_path / "vae"], "holds a AutoencoderKL", "expected a pipeline")
