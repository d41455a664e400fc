"""The operators against PyTorch's own and other libraries', layer by layer, on the shapes of SD1.5 and SDXL.

    pytest benchmarks/bench_kernels.py                     # a dozen shapes of each UNet, batch 2, and the fused chains
    pytest benchmarks/bench_kernels.py --full              # every shape, batch 2 and 8
    pytest benchmarks/bench_kernels.py --rows FILE         # the rows as they come, a line of JSON each
    pytest benchmarks/bench_kernels.py --tiny              # seconds, to try it out
    pytest benchmarks/bench_kernels.py --benchmark-json benchmarks/results/bench_kernels_cpu.json

Runs where it is: on a GPU ours against fp16 (cuBLAS, cuDNN in channels_last with its autotuner) and against the
libraries of ``peers.py`` that are installed; on a CPU against fp32 and bf16. Ours counts the quantization of the
input. Before anything of ours is timed, its result is checked.

How times are taken: on a GPU a round replays one CUDA graph of many calls, each on tensors of its own, so that what a
call reads is not in the L2 cache; ``us`` in a row (pytest-benchmark's ``extra_info``) is the median over rounds of the
time between two CUDA events around the replay, divided by the number of calls. pytest-benchmark's own columns are host
times of whole rounds, that is of ``calls`` calls; on a CPU a round is one call.
"""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import roofline
import torch
from kernel_cases import Case, cases, prepare
from kernel_sides import BASELINE, CHAINS, CUDA, OURS, Side, layer_error, relative_error
from peers import PEERS
from timing import captured, copies_to_rotate

ROUNDS, WARMUP = (9, 2) if CUDA else (3, 1)
LAYER_TOLERANCE = 2e-3  # one rounding of the result to fp16
CHAIN_TOLERANCE = 0.05  # 8-bit activations: a step of 0.03 to 0.1 against values of about 1, once or twice


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a row."""
    rows = cases(metafunc.config.getoption("--full"), metafunc.config.getoption("--tiny"))
    metafunc.parametrize("case", rows, ids=[f"{row.group}, {row.implementation}" for row in rows])


@torch.no_grad()
def test_time(benchmark: Any, record_row: Callable[[dict[str, Any]], None], case: Case) -> None:
    benchmark.group = case.group
    if case.implementation == OURS:
        check(case)
    if CUDA:
        torch.backends.cudnn.benchmark = True
        torch.compiler.reset()  # a library's compiled rows would reach the limit of recompilations together
    try:
        side = prepare(case)
        side.run()
        if CUDA:
            sides = [side, *(prepare(case) for _ in range(copies_to_rotate(side.bytes) - 1))]
            round_us, calls = captured([side.run for side in sides]), len(sides)
        else:
            round_us, calls = host_round(side), 1
    except Exception as error:
        if case.implementation in PEERS:
            pytest.skip(f"{case.implementation} does not run here: {error!r}"[:300])
        raise
    times: list[float] = []
    benchmark.pedantic(lambda: times.append(round_us()), rounds=ROUNDS, warmup_rounds=WARMUP)
    row = report(case, side, statistics.median(times[WARMUP:] or times))
    benchmark.extra_info.update(row, calls=calls)
    record_row(row)


def check(case: Case) -> None:
    """Fails if ours is wrong, whose time would mean nothing: a layer exactly, a chain against the baseline's."""
    torch.manual_seed(0)
    if case.chain is None:
        assert layer_error(case.shapes[0]) < LAYER_TOLERANCE
    else:
        ours, baseline = CHAINS[case.chain](case.shapes)
        assert relative_error(ours.to_floats(ours.run()), baseline.to_floats(baseline.run())) < CHAIN_TOLERANCE


def host_round(side: Side) -> Callable[[], float]:
    """One call on the CPU, in us."""

    def call() -> float:
        start = time.perf_counter()
        side.run()
        return 1e6 * (time.perf_counter() - start)

    return call


def report(case: Case, side: Side, us: float) -> dict[str, Any]:
    """A row of the results: what ran, us per call, TFLOP/s and the share of what the device could do at best."""
    bound = bound_us(case, side)
    layer = None if case.chain else case.shapes[0]
    return {
        "group": case.group,
        "unet": case.unet,
        "kind": case.kind,
        "implementation": case.implementation,
        "us": round(us, 3),
        "gflop": round(side.operations / 1e9, 6),
        "tflops": round(side.operations / us / 1e6, 3),
        "roofline": None if bound is None else round(bound / us, 4),
        "layers": len(layer.names) if layer else 1,
    }


def ceilings(device: str) -> roofline.Device | None:
    """The published ceilings of a GPU by its name in PyTorch; of none that only resembles it."""
    if any(word in device for word in ("PCIe", "NVL", "40GB", "Laptop", "MIG", " Ti", " D")):
        return None
    matches = (name for name in roofline.DEVICES if re.search(rf"\b{re.escape(name)}(?=[- ]|$)", device))
    return next((roofline.DEVICES[name] for name in matches), None)


def bound_us(case: Case, side: Side) -> float | None:
    """The least time on this device, if it is a known one, for ours and for fp16: of a layer ``roofline``'s, of a
    chain that of its operations or of reading its inputs, whichever is longer.
    """
    device = ceilings(torch.cuda.get_device_name()) if CUDA else None
    if device is None or case.implementation not in (OURS, BASELINE):
        return None
    ours = case.implementation == OURS
    if case.chain is None:
        return 1e6 * roofline.layer_bound(case.shapes[0], device, "w4a8" if ours else "fp16", fused=False)
    arithmetic = "int8" if ours else "fp16"
    return 1e6 * roofline.Kernel("chain", arithmetic, side.operations, 0, side.bytes).seconds(device)


def speed_ups(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours relative to the baseline for each group that has both: the group, its speed-up and its FLOPs."""
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["group"], {})[row["implementation"]] = row
    return [
        {
            **{name: by_name[OURS][name] for name in ("group", "unet", "kind")},
            "speed_up": by_name[BASELINE]["us"] / by_name[OURS]["us"],
            "gflop": by_name[OURS]["gflop"] * by_name[OURS]["layers"],
        }
        for by_name in groups.values()
        if OURS in by_name and BASELINE in by_name
    ]


def geometric_mean(ratios: Iterable[tuple[float, float]]) -> float:
    """Of (ratio, weight): exp(sum w ln r / sum w)."""
    pairs = list(ratios)
    return math.exp(sum(weight * math.log(ratio) for ratio, weight in pairs) / sum(weight for _, weight in pairs))


def summary(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Lines for the end of a run: mean speed-ups, chains one by one, and every row that is slower than the baseline."""
    compared = speed_ups(rows)
    lines = []
    for unet, kind in dict.fromkeys((row["unet"], row["kind"]) for row in compared if row["kind"] != "chain"):
        pairs = [(row["speed_up"], row["gflop"]) for row in compared if (row["unet"], row["kind"]) == (unet, kind)]
        mean = geometric_mean(pairs)
        lines.append(f"{unet}, {kind}: {mean:.2f}x {BASELINE} (geometric mean of {len(pairs)} by FLOPs)")
    lines += [f"{row['group']}: {row['speed_up']:.2f}x {BASELINE}" for row in compared if row["kind"] == "chain"]
    slower = sorted((row for row in compared if row["speed_up"] < 1), key=lambda row: row["speed_up"])
    lines.append(f"slower than {BASELINE}: {len(slower)} of {len(compared)}")
    lines += [f"  {row['speed_up']:.2f}x  {row['group']}" for row in slower]
    return lines
