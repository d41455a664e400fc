"""The benchmark of the small UNets runs, and its ratios are those of its times."""

import json
import sys

import pytest

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
