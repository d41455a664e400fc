"""The kernel benchmarks: the shapes that they cover, the results that they refuse to time, and their arithmetic."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from benchmarks import unets
from benchmarks.peers import linears
from benchmarks.speed import bench_kernels, kernel_cases, kernel_report, kernel_sides, timing
from benchmarks.static_analysis.devices import DEVICES
from benchmarks.static_analysis.kernel_bounds import layer_bound

OURS, BASELINE = kernel_sides.OURS, kernel_sides.BASELINE


@pytest.fixture(scope="module")
def full_rows():
    return kernel_cases.cases(full=True, tiny=False)


def flops(shape):
    return shape.operations * len(shape.names)


@pytest.mark.parametrize(("name", "share"), [("sd15", 0.45), ("sdxl", 0.84)])
def test_representative_shapes_are_the_largest_and_every_class_of_few_rows(name, share):
    shapes = unets.layers(name, 2)
    chosen = kernel_cases.representative(shapes)
    few = [shape for shape in chosen if shape.rows < kernel_cases.FEW_ROWS]
    many = [shape for shape in chosen if shape.rows >= kernel_cases.FEW_ROWS]
    assert len(chosen) == len(set(chosen)) == kernel_cases.SUBSET
    classes = {(s.kind, s.tokens) for s in shapes if s.rows < kernel_cases.FEW_ROWS}
    assert len(few) == len(classes) == len({(s.kind, s.tokens) for s in few})
    left_out = [s for s in shapes if s not in chosen and s.rows >= kernel_cases.FEW_ROWS]
    assert min(map(flops, many)) >= max(map(flops, left_out))
    assert sum(map(flops, chosen)) > share * sum(map(flops, shapes))
    assert {s.kind for s in many} == {"linear", "conv2d"}
    assert {1, unets.TEXT_TOKENS} <= {s.tokens for s in few}  # time embedding, text


def test_representative_shapes_are_all_if_there_are_few():
    assert set(kernel_cases.representative(kernel_cases.TINY)) == set(kernel_cases.TINY)


def test_full_covers_every_shape_at_both_batches(full_rows):
    ours = {(row.unet, row.shapes[0]) for row in full_rows if row.chain is None and row.implementation == OURS}
    assert ours == {(n, s) for n in kernel_cases.UNETS for batch in (2, 8) for s in unets.layers(n, batch)}


@pytest.mark.parametrize("full", [False, True])
def test_rows_have_names_of_their_own_and_each_of_ours_has_a_baseline(full, full_rows):
    rows = full_rows if full else kernel_cases.cases(full=False, tiny=False)
    names = [(row.group, row.implementation) for row in rows]
    assert len(names) == len(set(names))
    groups = {row.group for row in rows}
    assert {(group, name) for group in groups for name in (OURS, BASELINE)} <= set(names)
    assert {row.chain for row in rows} == {None, *kernel_sides.CHAINS}


def row(group, implementation, us, gflop=1.0, kind="linear", layers=1):
    return {
        "group": group, "unet": "sd15", "kind": kind, "implementation": implementation,
        "us": us, "gflop": gflop, "layers": layers,
    }  # fmt: skip


ROWS = [
    row("a", OURS, 10.0, 1.0), row("a", BASELINE, 20.0, 1.0),  # 2x, weight 1
    row("b", OURS, 10.0, 3.0, layers=2), row("b", BASELINE, 80.0, 3.0, layers=2),  # 8x, weight 6
    row("c", OURS, 20.0, 2.0), row("c", BASELINE, 10.0, 2.0),  # 0.5x, weight 2
    row("d", OURS, 1.0, kind="conv2d"), row("d", BASELINE, 3.0, kind="conv2d"),
    row("e", OURS, 1.0),  # nothing to compare with
]  # fmt: skip


def test_mean_speed_up_by_hand():
    # 2^((1 * 1 + 3 * 6 - 1 * 2) / 9) = 2^(17 / 9)
    pairs = [(r["speed_up"], r["gflop"]) for r in kernel_report.speed_ups(ROWS) if r["kind"] == "linear"]
    assert pairs == [(2.0, 1.0), (8.0, 6.0), (0.5, 2.0)]
    assert kernel_report.geometric_mean(pairs) == pytest.approx(2 ** (17 / 9))


def test_summary_states_means_by_kind_and_every_slower_row():
    lines = kernel_report.summary(ROWS)
    assert f"sd15, linear: {2 ** (17 / 9):.2f}x {BASELINE} (geometric mean of 3 by FLOPs)" in lines
    assert f"sd15, conv2d: 3.00x {BASELINE} (geometric mean of 1 by FLOPs)" in lines
    assert lines[-2:] == [f"slower than {BASELINE}: 1 of 4", "  0.50x  c"]


def test_report_by_hand():
    case = kernel_cases.Case("tiny", (kernel_cases.TINY[1],), BASELINE)
    side = kernel_sides.Side(lambda: None, (torch.empty(8, dtype=torch.int8), torch.empty(3)), 2_000_000)
    report = kernel_report.report(case, side, 4.0)
    assert (report["us"], report["gflop"], report["tflops"]) == (4.0, 0.002, 0.5)
    assert side.bytes == 8 + 12


def test_share_of_the_roofline_is_the_bound_over_the_time(monkeypatch):
    monkeypatch.setattr(kernel_report, "CUDA", True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    shape = kernel_cases.TINY[1]
    bound = layer_bound(shape, DEVICES["H100"], "w4a8", fused=False)
    case, side = kernel_cases.Case("tiny", (shape,), OURS), kernel_sides.Side(lambda: None, (), shape.operations)
    assert kernel_report.report(case, side, 4e6 * bound)["roofline"] == 0.25
    assert kernel_report.report(replace(case, implementation="other"), side, 1.0)["roofline"] is None


def test_a_round_on_a_gpu_is_one_graph_of_all_copies(monkeypatch):
    """With PyTorch's CUDA calls replaced: 6 ms for a replay of 4 copies are 1500 us a call."""
    recorded, calls = [], []
    event = SimpleNamespace(
        record=lambda: recorded.append("event"), synchronize=lambda: None, elapsed_time=lambda end: 6.0
    )
    graph = SimpleNamespace(replay=lambda: recorded.append("replay"))
    fakes = {
        "Stream": lambda: SimpleNamespace(wait_stream=lambda stream: None), "current_stream": lambda: None,
        "stream": lambda stream: nullcontext(), "synchronize": lambda: None,
        "CUDAGraph": lambda: graph, "graph": lambda graph: nullcontext(), "Event": lambda enable_timing: event,
        "get_device_properties": lambda index: SimpleNamespace(L2_cache_size=50_000_000),
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    replay = timing.captured([partial(calls.append, i) for i in range(4)])
    assert replay() == 1500.0
    assert calls[-4:] == [0, 1, 2, 3]
    assert calls[:-4] == [0, 1, 2, 3]  # warm-up: each may compile
    assert recorded == ["event", "replay", "event"]
    assert [timing.copies_to_rotate(size) for size in (1_000, 1_000_000, 10**9)] == [256, 100, 8]


@pytest.mark.parametrize(
    ("device", "known"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        *((name, None) for name in ("NVIDIA H100 PCIe", "NVIDIA GH200 480GB", "NVIDIA A100-SXM4-40GB", "NVIDIA L4")),
    ],
)
def test_ceilings_are_of_exactly_that_gpu(device, known):
    assert kernel_report.ceilings(device) == (DEVICES[known] if known else None)


@pytest.mark.parametrize("shape", kernel_cases.TINY, ids=lambda shape: shape.label)
def test_a_wrong_layer_is_not_timed(monkeypatch, shape):
    case = kernel_cases.Case("tiny", (shape,), OURS)
    bench_kernels.check(case)
    correct = kernel_sides.int4_layer
    monkeypatch.setattr(kernel_sides, "int4_layer", lambda *arguments: correct(*arguments) + 0.01)
    with pytest.raises(AssertionError):
        bench_kernels.check(case)


@pytest.mark.parametrize("chain", kernel_sides.CHAINS)
def test_a_wrong_chain_is_not_timed(monkeypatch, chain):
    case = kernel_cases.Case("tiny", kernel_cases.TINY, OURS, chain)
    bench_kernels.check(case)

    def wrong(shapes, build=kernel_sides.CHAINS[chain]):
        ours, baseline = build(shapes)
        return replace(ours, to_floats=lambda y: ours.to_floats(y).roll(1, dims=-1)), baseline

    monkeypatch.setitem(kernel_sides.CHAINS, chain, wrong)
    with pytest.raises(AssertionError):
        bench_kernels.check(case)


def test_what_a_peer_reads_is_what_it_holds(monkeypatch):
    monkeypatch.setattr(linears, "PEERS", dict.fromkeys(("a int4 weight-only", "a int8 dynamic"), lambda weight: None))
    shape = kernel_cases.TINY[1]
    for name, bits in (("a int4 weight-only", 4), ("a int8 dynamic", 8)):
        side = kernel_sides.layer_side(shape, name)
        assert side.bytes == 2 * shape.rows * shape.in_channels + shape.out_channels * shape.in_channels * bits // 8


def test_other_libraries_come_last(monkeypatch):
    monkeypatch.setattr(linears, "missing", lambda name: None)
    names = [row.implementation for row in kernel_cases.cases(full=False, tiny=True)]
    first = names.index(next(iter(linears.PEERS)))
    assert set(names[:first]) == {OURS, *kernel_sides.BASELINES}
    assert set(names[first:]) == set(linears.PEERS)


def test_peers_are_left_out_by_name_with_the_reason(monkeypatch):
    monkeypatch.setattr(linears.importlib.util, "find_spec", lambda package: None)
    assert {name: linears.missing(name) for name in linears.PEERS} == {
        name: f"{name.split()[0]} is not installed" for name in linears.PEERS
    }
