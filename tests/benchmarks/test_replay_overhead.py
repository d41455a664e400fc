"""The benchmark of a replayed call's overhead measures a call up to its launch and as a whole, and needs no GPU."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks.static_analysis import replay_overhead


def test_every_kind_of_call_is_replayed(tmp_path, monkeypatch, capsys):
    output = tmp_path / "overhead.json"
    arguments = ["replay_overhead", "--unet", "ddpm_cifar", "--rounds", "3", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", arguments)
    threads = torch.get_num_threads()

    replay_overhead.main()
    torch.set_num_threads(threads)

    rows = json.loads(output.read_text())["rows"]
    assert [row["call"] for row in rows] == ["tensor timestep", "number timestep"]
    for row in rows:
        assert 0 < row["launch_fastest_us"] <= row["launch_median_us"]
        assert row["launch_fastest_us"] < row["call_fastest_us"] <= row["call_median_us"]
    assert capsys.readouterr().out.count("until the launch") == 2


def test_a_call_that_is_not_replayed_is_an_error():
    with pytest.raises(RuntimeError, match="ran eagerly"):
        replay_overhead.measure(lambda: None, 1)
