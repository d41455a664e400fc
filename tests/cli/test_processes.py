"""``quantize`` and ``generate`` in two processes, as torchrun starts them, on a tiny random pipeline."""

import contextlib
import io
import json
import os
import socket

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from several_ranks import in_processes, on_ranks
from tiny_pipeline import SHORT
from tiny_unets import unet2d

from dq_runtime.cli import generate
from dq_runtime.cli.app import app
from dq_runtime.cli.drawing import record
from dq_runtime.cli.errors import UserError

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def launched(tmp_path):
    """Runs a command in two processes; for each its exit code, stdout and stderr."""

    def launched(*arguments, before=lambda number: None):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]

        def process(number):
            variables = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": 2, "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in variables.items()}, MASTER_ADDR="localhost")
            before(number)
            with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
                code = app(list(map(str, arguments)), standalone_mode=False)
            return code, out.getvalue(), err.getvalue()

        folder = tmp_path / "processes"
        folder.mkdir()
        return in_processes(process, folder)

    return launched


def test_two_processes_quantize_like_one(launched, pipeline_folder, packed_folder, prompts, tmp_path):
    output = tmp_path / "out"
    arguments = ["quantize", pipeline_folder, "-o", output, "--prompts", prompts, *SHORT, "--keep", "ff", "--json"]

    first, second = launched(*arguments)

    assert first[0] == second[0] is None
    assert json.loads(first[1])["output"] == str(output)
    assert "block 1 of" in first[2]
    assert second[1:] == ("", "")
    assert not output.with_name("out.work").exists()
    assert DiffusionPipeline.from_pretrained(output).unet.config.quantization_config.calibration["samples"] == 8
    written, expected = load_file(output / WEIGHTS), load_file(packed_folder / WEIGHTS)
    assert written.keys() == expected.keys()
    differing = 0
    for name, tensor in expected.items():
        if name.endswith(("act_scale", "act_zero_point", "weight_dilation")):  # from the same calibration set
            assert torch.equal(written[name], tensor), name
        elif name.endswith("packed_weight"):
            differing += (written[name] != tensor).sum().item()
    total = sum(tensor.numel() for name, tensor in expected.items() if name.endswith("packed_weight"))
    assert differing < 0.01 * total  # the rounding of sums


def test_two_processes_draw_the_images_of_one(launched, run_json, packed_folder, tmp_path):
    arguments = ["generate", packed_folder, "a cat", "a dog", "a fox", "--batch", 2, "--steps", 2, "--json"]
    expected = run_json(*arguments[:-1], "-o", tmp_path / "one")

    first, second = launched(*arguments, "-o", tmp_path / "two")

    assert second[1:] == ("", "")
    report = json.loads(first[1])
    assert [image["prompt"] for image in report["images"]] == ["a cat"] * 2 + ["a dog"] * 2 + ["a fox"] * 2
    assert len(report["seconds"]) == 3
    for image, other in zip(report["images"], expected["images"], strict=True):
        with open(image["file"], "rb") as ours, open(other["file"], "rb") as theirs:
            assert ours.read() == theirs.read()


def test_an_error_in_one_process_ends_both_and_the_first_says_it(launched, packed_folder, monkeypatch, tmp_path):
    def before(number):
        def draw(*arguments):
            raise UserError("no luck: try again")

        if number == 1:
            monkeypatch.setattr(generate, "draw", draw)

    first, second = launched("generate", packed_folder, "a cat", "a dog", "--steps", 1, "-o", tmp_path, before=before)

    assert first[0] == second[0] == 2
    assert "Error: rank 1 failed: UserError: no luck: try again" in first[2]
    assert second[1:] == ("", "")


def test_other_commands_refuse_several_processes(run, packed_folder, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")

    assert "inspect runs in one process" in run("inspect", packed_folder, code=2).stderr


def test_ranks_record_the_calls_of_one_process(pipeline_folder, tmp_path):
    pipeline = DiffusionPipeline.from_pretrained(pipeline_folder)
    pipeline.set_progress_bar_config(disable=True)
    unet = unet2d(block_out_channels=(16, 32), norm_num_groups=4)

    def recorded(rank):
        with_prompts = record(pipeline, pipeline.unet, ["a cat", "a dog", "a fox"], 0, 2, 3)
        one_prompt = record(pipeline, pipeline.unet, ["a cat"], 0, 2, 3)
        without = record(None, unet, [], 20, 2, 3)  # a batch of 16 and one of 4
        return [vars(call) for calibration_set in (with_prompts, one_prompt, without) for call in calibration_set.calls]

    expected = recorded(0)

    for found in on_ranks(recorded, tmp_path):
        assert len(found) == len(expected) == 6 + 2 + 4
        for call, other in zip(found, expected, strict=True):
            torch.testing.assert_close(call, other, rtol=0, atol=0)
