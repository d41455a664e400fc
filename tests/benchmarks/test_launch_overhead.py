"""The benchmark of Python's overhead makes every launch of a forward pass, and needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from benchmarks.result_files import ROOT
from benchmarks.speed import launches


def test_every_launch_of_a_forward_pass_is_made(tmp_path):
    output = tmp_path / "overhead.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.static_analysis.launch_overhead",
        "--unet",
        "ddpm_cifar",
        "--rounds",
        "2",
    ]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""

    run = subprocess.run(
        [*command, "--output", str(output)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip

    assert run.returncode == 0, run.stderr
    (row,) = json.loads(output.read_text())["rows"]
    multiplications = sum(launches.launches("ddpm_cifar", 2).values())
    assert 2 * multiplications < row["launches"] < 5 * multiplications  # each input is quantized, most by a norm before
    assert 0 < row["fastest_ms"] <= row["median_ms"]
    assert row["us_a_launch"] * row["launches"] == pytest.approx(1e3 * row["fastest_ms"])
    assert f"ddpm_cifar: {row['launches']} launches" in run.stdout
