"""The benchmark of whole UNets: its rows, the results that it keeps when it is stopped, and that it runs."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks import quantized_unets
from benchmarks.speed import bench_unet


@pytest.fixture
def fast_rows():
    """Rows of a model that takes no time."""

    class Identity(torch.nn.Linear):
        def forward(self, sample, **conditions):
            return type("Output", (), {"sample": sample})

    def fast_rows(*names):
        return [bench_unet.Row(name, lambda: Identity(4, 4), "compiled" in name) for name in names]

    return fast_rows


def test_rows_without_a_compiler_are_measured_and_given_first(fast_rows):
    chosen = fast_rows("fp32", "fp32 compiled", "int4")

    lists = [[r.row for r in results] for results in bench_unet.measure(chosen, "ddpm_cifar", "cpu", 1, 2)]

    assert lists == [["fp32", "int4"], ["fp32", "int4", "fp32 compiled"]]


def test_interruption_while_a_row_compiles_leaves_the_others_in_the_file(fast_rows, monkeypatch, tmp_path):
    def interrupted():
        raise KeyboardInterrupt

    slow = bench_unet.Row("fp32 compiled", interrupted, is_compiled=True)
    monkeypatch.setattr(bench_unet, "rows", lambda *_: [slow, *fast_rows("fp32", "int4")])
    output = tmp_path / "rows.json"
    command = ["bench_unet.py", "--device", "cpu", "--unet", "ddpm_cifar", "--rounds", "1", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", command)

    with pytest.raises(KeyboardInterrupt):
        bench_unet.main()

    rows = json.loads(output.read_text())["unets"]["ddpm_cifar"]
    assert [row["row"] for row in rows] == ["fp32", "int4"]
    assert all(row["median_ms"] > 0 for row in rows)


def test_every_unet_is_measured_before_anything_is_compiled(fast_rows, monkeypatch, tmp_path):
    monkeypatch.setattr(bench_unet, "rows", lambda *_: fast_rows("fp32 compiled", "int4"))
    made, prepare = [], bench_unet.prepare

    def noted(row, name, *rest):
        made.append((name, row.name))
        return prepare(row, name, *rest)

    monkeypatch.setattr(bench_unet, "prepare", noted)
    output = tmp_path / "rows.json"
    command = ["bench_unet.py", "--device", "cpu", "--unet", "ddpm_cifar", "--unet", "ldm4", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", [*command, "--output", str(output)])

    bench_unet.main()

    assert made == [(name, row) for row in ("int4", "fp32 compiled") for name in ("ddpm_cifar", "ldm4")]
    measured = json.loads(output.read_text())["unets"]
    assert set(measured) == {"ddpm_cifar", "ldm4"}
    assert all([row["row"] for row in rows] == ["int4", "fp32 compiled"] for rows in measured.values())


def test_row_that_cannot_be_compiled_is_left_out_and_named(fast_rows, capsys):
    def broken():
        raise RuntimeError("no such backend")

    chosen = [bench_unet.Row("fp32 compiled", broken, is_compiled=True), *fast_rows("fp32", "int4 compiled")]

    *_, results = bench_unet.measure(chosen, "ddpm_cifar", "cpu", 1, 1)

    assert [result.row for result in results] == ["fp32", "int4 compiled"]
    assert "fp32 compiled failed: RuntimeError('no such backend')" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="no such backend"):
        next(bench_unet.measure([bench_unet.Row("fp32", broken)], "ddpm_cifar", "cpu", 1, 1))


def test_run_with_a_failed_row_keeps_the_others_and_fails(fast_rows, monkeypatch, tmp_path):
    def broken():
        raise RuntimeError("no such backend")

    failing = bench_unet.Row("fp32 compiled", broken, is_compiled=True)
    monkeypatch.setattr(bench_unet, "rows", lambda *_: [failing, *fast_rows("int4")])
    output = tmp_path / "rows.json"
    command = ["bench_unet.py", "--device", "cpu", "--unet", "ddpm_cifar", "--rounds", "1", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", command)

    with pytest.raises(SystemExit, match="Failed: ddpm_cifar, fp32 compiled"):
        bench_unet.main()

    assert [row["row"] for row in json.loads(output.read_text())["unets"]["ddpm_cifar"]] == ["int4"]


def test_result_that_is_not_finite_is_not_timed(fast_rows, monkeypatch):
    (row,) = fast_rows("fp32")
    monkeypatch.setattr(bench_unet.unets, "inputs", lambda *_: {"sample": torch.tensor(float("nan"))})

    with pytest.raises(RuntimeError, match="fp32: the result is not finite"):
        bench_unet.prepare(row, "ddpm_cifar", "cpu", 1)


def test_speed_up_is_of_the_fastest_of_ours():
    def result(row, ms):
        return bench_unet.Result(row, ms, ms, 1.0, None, 0.0)

    text = bench_unet.table("sd15", [result("fp16 eager", 20.0), result("int4", 30.0), result("int4 CUDA graph", 5.0)])

    assert text.splitlines()[-1] == "sd15: speed-up of int4 CUDA graph over fp16 eager: 4.00x"


def test_quantized_unet_with_random_weights_is_finite_and_a_quarter_of_the_size():
    unet = quantized_unets.build("ddpm_cifar", "cpu", torch.float32)
    arguments = bench_unet.unets.inputs("ddpm_cifar", 1, "cpu", torch.float32)

    with torch.inference_mode():
        sample = unet(**arguments).sample

    assert sample.isfinite().all()
    assert 0.1 < sample.std() < 10
    assert bench_unet.tensor_megabytes(unet) < 0.27 * 2 * 35.75
