"""Fixtures of the tests of the command line: tiny pipelines, and a runner that never reaches the network."""

import json

import pytest
import tiny_pipeline
from tiny_pipeline import SHORT
from typer.testing import CliRunner

from dq_runtime.cli.app import app

NARROW = {"block_out_channels": (16, 32), "norm_num_groups": 4}


@pytest.fixture(scope="session", autouse=True)
def offline():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory):
    return tiny_pipeline.save_pipeline(tmp_path_factory.mktemp("pipeline"), **NARROW)


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("a cat\n\na dog\n")
    return file


@pytest.fixture(scope="session")
def run():
    """Runs the command with these arguments; a traceback fails the test."""

    def run(*arguments, code=0):
        result = CliRunner().invoke(app, list(map(str, arguments)), prog_name="dq-runtime")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        return result

    return run


@pytest.fixture(scope="session")
def run_json(run):
    """The JSON object that a command prints on stdout."""
    return lambda *arguments: json.loads(run(*arguments, "--json").stdout)


@pytest.fixture(scope="session")
def quantize(run, pipeline_folder, prompts):
    """Quantizes a few layers of the pipeline's UNet."""

    def quantize(output, *more, model=pipeline_folder, code=0):
        return run("quantize", model, "-o", output, "--prompts", prompts, *SHORT, "--keep", "ff", *more, code=code)

    return quantize


@pytest.fixture(scope="session")
def packed_folder(quantize, tmp_path_factory):
    output = tmp_path_factory.mktemp("packed") / "out"
    quantize(output)
    return output
