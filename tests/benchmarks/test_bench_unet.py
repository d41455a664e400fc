"""The benchmarks of whole UNets and images: their rows, the results that they keep when stopped, and that they run."""

from __future__ import annotations

import json
import mmap
import sys

import pytest
import torch
from diffusers import UNet2DConditionModel

from benchmarks import quantized_unets
from benchmarks.speed import bench_pipeline, bench_unet, unet_rows


@pytest.fixture
def fast_rows():
    """Rows of a model that takes no time."""

    class Identity(torch.nn.Linear):
        def forward(self, sample, **conditions):
            return type("Output", (), {"sample": sample})

    def fast_rows(*names):
        return [
            bench_unet.Row(name, lambda: Identity(4, 4), torch.float32, is_compiled="compiled" in name, in_turn=True)
            for name in names
        ]

    return fast_rows


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the command with some rows, on a CPU; returns the rows in the file."""

    def run(chosen, *arguments):
        output = tmp_path / "rows.json"
        monkeypatch.setattr(bench_unet, "rows", lambda *_: chosen)
        command = ["bench_unet.py", "--device", "cpu", "--unet", "ddpm_cifar", "--rounds", "2", "--output", str(output)]
        monkeypatch.setattr(sys, "argv", [*command, *arguments])
        try:
            bench_unet.main()
        finally:
            run.rows = json.loads(output.read_text())["rows"]
        return run.rows

    return run


def test_compiled_rows_come_last_and_the_main_rows_are_timed_in_turn(fast_rows):
    chosen = fast_rows("fp32 compiled", "fp32", "int4")

    given = [(r.row, r.in_turn_ms is not None) for r in bench_unet.measure(chosen, "ddpm_cifar", "cpu", 1, 2)]

    order = ["fp32", "int4", "fp32 compiled"]
    assert given == [(row, False) for row in order] + [(row, True) for row in order]


def test_every_row_is_in_the_file_before_the_next_one_is_built(fast_rows, run):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run([*fast_rows("fp32", "int4"), bench_unet.Row("slow", interrupted)])

    assert [row["row"] for row in run.rows] == ["fp32", "int4"]
    assert all(row["median_ms"] > 0 and row["back_to_back_ms"] > 0 for row in run.rows)


def test_all_batch_sizes_and_unets_are_measured(fast_rows, run):
    measured = run(fast_rows("int4"), "--unet", "ldm4", "--batch", "1", "--batch", "2")

    assert [(row["unet"], row["batch"]) for row in measured] == [
        (unet, batch) for batch in (1, 2) for unet in ("ddpm_cifar", "ldm4")
    ]


def test_compiled_rows_can_be_left_out(fast_rows, run):
    assert [row["row"] for row in run(fast_rows("fp32", "fp32 compiled"), "--no-compiled")] == ["fp32"]


def test_row_that_cannot_be_compiled_is_named_and_the_others_are_kept(fast_rows, run, capsys):
    def broken():
        raise RuntimeError("no such backend")

    failing = bench_unet.Row("fp32 compiled", broken, is_compiled=True)

    with pytest.raises(SystemExit, match="Failed: ddpm_cifar, batch 2, fp32 compiled"):
        run([failing, *fast_rows("int4")])

    assert [row["row"] for row in run.rows] == ["int4"]
    assert "fp32 compiled failed: RuntimeError('no such backend')" in capsys.readouterr().out


def test_result_that_is_not_finite_is_not_timed(fast_rows, monkeypatch):
    (row,) = fast_rows("fp32")
    monkeypatch.setattr(bench_unet.unets, "inputs", lambda *_: {"sample": torch.tensor(float("nan"))})

    with pytest.raises(RuntimeError, match="fp32: the result is not finite"):
        bench_unet.measure_row(row, "ddpm_cifar", "cpu", 1, 1)


def test_speed_up_is_of_our_fastest_row_in_turn():
    def result(row, ms, in_turn=None):
        return bench_unet.Result("sd15", 2, row, ms, ms, ms, 1.0, None, None, 0.0, in_turn)

    rows = [
        result("fp16 graph", 20.0, 18.0),
        result("int4 graph, LoRA", 3.0, 3.0),
        result("int4 graph, without split-K", 4.0),
        result("int4 graph", 5.0, 6.0),
    ]

    text = bench_unet.table(rows)

    assert text.splitlines()[-1] == "sd15, batch 2: speed-up of int4 graph over fp16 graph: 3.00x"


def test_memory_is_the_growth_of_the_process():
    memory = bench_unet.PeakMemory("cpu")
    memory.start()

    with mmap.mmap(-1, 2**26) as pages:  # not a tensor: malloc may have free memory that is resident
        for _ in range(64):
            pages.write(bytes(2**20))

    assert 0.9 * 2**26 < memory.growth() < 2**27


def test_rows_have_names_of_their_own_and_every_optimisation_one_without_it():
    names = [row.name for row in unet_rows.rows("sd15", "cuda")]

    assert len(set(names)) == len(names)
    assert {f"int4 graph, without {what}" for what in unet_rows.OPTIMISATIONS} < set(names)


def test_row_without_an_optimisation_runs_without_it_and_restores_it():
    def state():
        modules = [unet_rows.attention, unet_rows.gemm, unet_rows.norm, unet_rows.quantization, unet_rows.ForwardState]
        names = ("joins_halves", "launch_options", "launch_config", "remember")
        return {(module, name): getattr(module, name) for module in modules for name in names if hasattr(module, name)}

    before = state()
    for switch in unet_rows.OPTIMISATIONS.values():
        with switch():
            assert state() != before
        assert state() == before


@pytest.fixture
def tiny_sd(monkeypatch):
    config = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (32, 32), "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": 32,
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": 4,
    }  # fmt: skip
    monkeypatch.setitem(unet_rows.unets.CONFIGS, "sd15", (UNet2DConditionModel, config))


def test_images_are_drawn_through_the_stock_pipeline(tiny_sd, monkeypatch):
    small = {**bench_pipeline.VAE, "block_out_channels": (32,) * 4, "layers_per_block": 1}
    monkeypatch.setattr(bench_pipeline.pipeline, "__defaults__", (small,))
    chosen = [row for row in unet_rows.rows("sd15", "cpu") if row.name in ("fp32", "int4")]

    measured = bench_pipeline.measure(chosen, "sd15", steps=2, rounds=1)

    assert measured.keys() == {"fp32", "int4"}
    assert all(seconds > 0 for seconds in measured.values())


def test_quantized_unet_with_random_weights_is_finite_and_a_quarter_of_the_size():
    unet = quantized_unets.build("ddpm_cifar", "cpu", torch.float32)
    arguments = bench_unet.unets.inputs("ddpm_cifar", 1, "cpu", torch.float32)

    with torch.inference_mode():
        sample = unet(**arguments).sample

    assert sample.isfinite().all()
    assert 0.1 < sample.std() < 10
    assert bench_unet.tensor_megabytes(unet) < 0.27 * 2 * 35.75
