"""The tuner: the launches that it knows, the configurations that it tries, the results that it keeps."""

from __future__ import annotations

import functools
import json
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import unets
from benchmarks.result_files import ROOT
from benchmarks.speed import launches
from benchmarks.tuning import tune
from dq_kernels.triton.tuning import LaunchConfig, read_tuning

LINEAR = launches.Launch("linear", 8192, 640, 640, (2, 4096, 640), (640, 320))
GEGLU = launches.Launch("linear_geglu", 2048, 5120, 1280, (2, 1024, 1280), (10240, 640))
HALF = launches.Launch("linear", 4096, 640, 640, (1, 4096, 640), (640, 320))
FEW = launches.Launch("linear", 2, 1280, 1280, (2, 1280), (1280, 640))
CONV = launches.Launch("conv2d", 128, 1280, 11520, (2, 10, 10, 1280), (1280, 3, 3, 640))
launches_of = functools.cache(launches.launches)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "ddpm_cifar"])
def test_a_fused_forward_has_the_operations_of_the_stock_unets_layers(name):
    kept = {"conv_in", "conv_out"}
    layers = sum(shape.operations * sum(layer not in kept for layer in shape.names) for shape in unets.layers(name, 2))

    assert sum(launch.operations * count for launch, count in launches_of(name, 2).items()) == layers


def test_fused_layers_of_sd15_are_launched_together():
    counted = launches_of("sd15", 2)

    assert sum(counted.values()) == 196
    assert sum(count for launch, count in counted.items() if launch.op == "linear_geglu") == 16
    # One launch for all time projections, one for all cross-attention keys and values.
    assert [counted[launch] for launch in counted if launch.out_channels in (20160, 24960)] == [1, 1]
    assert sum(count for launch, count in counted.items() if launch.upsample) == 3


def test_every_kind_of_launch_gets_tiles_that_fit_it():
    assert all(config.block_m >= 64 for config in tune.tiles(LINEAR))
    assert {config.block_m for config in tune.tiles(FEW)} == {16}
    for config in tune.tiles(GEGLU):
        assert config.num_warps == 4 or config.block_n >= 128
        assert 2 * config.block_m * config.block_n <= 128 * 32 * config.num_warps


def test_few_tiles_are_split_and_many_are_ordered():
    config = LaunchConfig(64, 64, 64, 4, 4)

    splits = [refined.split_k for refined in tune.refinements(CONV, config, multiprocessors=132)]
    orders = [(refined.group_m, refined.split_k) for refined in tune.refinements(LINEAR, config, multiprocessors=132)]

    assert splits == [2, 4, 8]
    assert orders == [(4, 1), (16, 1)]
    assert not any(refined.split_k > 1 for refined in tune.refinements(GEGLU, config, multiprocessors=10**6))


def test_file_holds_the_fastest_configuration_of_each_shape_once(tmp_path):
    slow, fast, other = ([64, 64, 64, 4, stages, 1, 1] for stages in (2, 3, 4))
    progress = {
        "environment": {"device": "a GPU"},
        "shapes": {
            tune.key(LINEAR): [[9.0, slow]],
            tune.key(replace(LINEAR, residual=True)): [[8.0, fast], [8.5, slow]],
            tune.key(CONV): [[5.0, other]],
            tune.key(FEW): [],  # nothing ran
        },
    }
    file = tmp_path / "sm_00.json"

    tune.write_tuning(file, progress)
    assert not file.exists()  # it would have nothing for GEGLU
    progress["shapes"][tune.key(GEGLU)] = [[7.0, other]]
    tune.write_tuning(file, progress)

    document, shapes = read_tuning(file)
    assert document["measured"] is True
    assert document["source"] == {"device": "a GPU"}
    found = {(shape.op, shape.rows): shape.config.to_list() for shape in shapes}
    assert found == {("linear", 8192): fast, ("conv2d", 128): other, ("linear_geglu", 2048): other}


@pytest.mark.parametrize("measured", [True, False])
def test_measured_shapes_stay_until_they_are_tuned_again(tmp_path, measured):
    old, new = [64, 64, 64, 4, 2, 1, 1], [64, 64, 64, 4, 3, 1, 1]
    file = tmp_path / "sm_00.json"
    every = [LINEAR, GEGLU, CONV]
    entries = [[op.op, op.rows, op.out_channels, op.reduction, old] for op in (*every, FEW)]
    file.write_text(json.dumps({"measured": measured, "shapes": entries}))

    tune.write_tuning(file, {"environment": {}, "shapes": {tune.key(launch): [[1.0, new]] for launch in every}})

    configs = {(s.op, s.rows): s.config.to_list() for s in read_tuning(file)[1]}
    kept = {("linear", FEW.rows): old} if measured else {}
    assert configs == {(launch.op, launch.rows): new for launch in every} | kept


def test_interrupted_search_goes_on_where_it_stopped(tmp_path, monkeypatch):
    searched = []

    def search(launch):
        if len(searched) == 3:
            raise KeyboardInterrupt
        searched.append(launch)
        return [(1.0, [64, 64, 64, 4, 3, 1, 1])]

    output, timings = tmp_path / "sm_00.json", tmp_path / "timings.json"
    monkeypatch.setattr(tune.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune.environment, "describe", lambda: {})
    monkeypatch.setattr(tune, "compile_all", lambda shapes, deadline: None)
    monkeypatch.setattr(tune, "launches", lambda name, batch: {LINEAR: 5, HALF: 4, GEGLU: 1, CONV: 2})
    monkeypatch.setattr(tune, "search", search)
    monkeypatch.setattr(sys, "argv", ["tune.py", "--unet", "sd15", "--output", str(output), "--timings", str(timings)])

    with pytest.raises(KeyboardInterrupt):
        tune.main()
    assert len(read_tuning(output)[1]) == 3
    first = list(searched)
    searched.clear()
    tune.main()

    assert first == [GEGLU, LINEAR, CONV]  # of each operator the one with most operations
    assert searched == [HALF]
    assert len(read_tuning(output)[1]) == 4
    rows = json.loads(timings.read_text())["rows"]
    assert rows[0] == ["conv2d", 128, 1280, 11520, [1, 1], False, False, [64, 64, 64, 4, 3, 1, 1], 1.0, 3774.9]
    assert len(rows) == 4


def test_without_a_gpu_tuning_is_refused(monkeypatch):
    monkeypatch.setattr(tune.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["tune.py"])

    with pytest.raises(SystemExit, match="--dry-run needs none"):
        tune.main()


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs kernels in the interpreter")
def test_dry_run_launches_every_operator(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tune.py", "--dry-run"])

    tune.main()

    output = capsys.readouterr().out
    assert {line.split()[0] for line in output.splitlines()} == {"linear", "linear_geglu", "conv2d"}
    assert "split_k=2" in output


def test_committed_timings_are_of_the_shipped_configurations():
    document = json.loads((ROOT / "benchmarks/results/tuning_sm_90.json").read_text())
    _, shapes = read_tuning(ROOT / "kernels/triton/tuning/sm_90.json")
    timed = {(*row[:4], tuple(row[7])) for row in document["rows"]}

    shipped = {(s.op, s.rows, s.out_channels, s.reduction, tuple(s.config.to_list())) for s in shapes}
    assert shipped <= timed
