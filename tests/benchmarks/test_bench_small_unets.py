"""The benchmark of the small UNets runs, and its ratios are those of its times."""

import json
import os
import platform
import subprocess
import sys

import pytest

from benchmarks.result_files import ROOT
from benchmarks.speed import bench_small_unets


@pytest.mark.parametrize("task", ["digits/class_conditional", "emoji"])
def test_every_form_is_timed_and_written(monkeypatch, tmp_path, capsys, task):
    output = tmp_path / "rows.json"
    options = ["--task", task, "--batch", "2", "--rounds", "1", "--threads", "1", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["bench_small_unets.py", *options])

    bench_small_unets.main()

    report = json.loads(output.read_text())
    (row,) = report["rows"]
    assert {"fp32", "int4"} <= row["median_ms"].keys()
    assert row["speed_up"]["fp32"] == pytest.approx(row["median_ms"]["fp32"] / row["median_ms"]["int4"])
    assert row["cpu_speed_up"]["fp32"] == pytest.approx(row["median_cpu_ms"]["fp32"] / row["median_cpu_ms"]["int4"])
    assert row["threads"] == 1
    assert report["cpu_capability"]
    assert f"{task}, batch 2: fp32" in capsys.readouterr().out


@pytest.mark.parametrize(("slowdown", "forms"), [(30.0, {"fp32", "int4"}), (1.5, {"fp32", "bf16", "int4"})])
def test_bf16_is_left_out_where_it_is_many_times_slower_than_fp32(monkeypatch, tmp_path, slowdown, forms):
    timed = []

    def measure(task, batch, rounds, with_bf16):
        timed.append(with_bf16)
        return {"task": task.name, "batch": batch, "median_ms": {}, "speed_up": {}, "cpu_speed_up": {}}

    monkeypatch.setattr(bench_small_unets, "bf16_slowdown", lambda: slowdown)
    monkeypatch.setattr(bench_small_unets, "measure", measure)
    options = ["--task", "digits/class_conditional", "--batch", "1", "--output", str(tmp_path / "rows.json")]
    monkeypatch.setattr(sys, "argv", ["bench_small_unets.py", *options])

    bench_small_unets.main()

    assert timed == ["bf16" in forms]
    assert bench_small_unets.models(bench_small_unets.TASKS["digits/class_conditional"], *timed).keys() == forms


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AVX2 is an instruction set of x86")
def test_bf16_is_slow_if_onednn_may_only_use_avx2():
    code = "from benchmarks.speed import bench_small_unets as b; print(b.bf16_slowdown() > b.LARGEST_BF16_SLOWDOWN)"
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}  # oneDNN reads it once per process

    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)

    assert result.stdout == "True\n", result.stderr
