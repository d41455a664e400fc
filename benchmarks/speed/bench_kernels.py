"""The operators against PyTorch's own and other libraries', layer by layer, on the shapes of SD1.5 and SDXL.

    pytest benchmarks/speed/bench_kernels.py               # a dozen shapes of each UNet, batch 2, and the fused chains
    pytest benchmarks/speed/bench_kernels.py --full        # every shape, batch 2 and 8
    pytest benchmarks/speed/bench_kernels.py --rows FILE   # the rows as they come, a line of JSON each
    pytest benchmarks/speed/bench_kernels.py --tiny        # seconds, to try it out
    pytest benchmarks/speed/bench_kernels.py --benchmark-json benchmarks/results/bench_kernels_cpu.json

Runs where it is: on a GPU ours against fp16 (cuBLAS, cuDNN in channels_last with its autotuner) and against the
libraries of ``peers/linears.py`` that are installed; on a CPU against fp32 and bf16. Ours counts the quantization of
the input. Before anything of ours is timed, its result is checked.

How times are taken: on a GPU a round replays one CUDA graph of many calls, each on tensors of its own, so that what a
call reads is not in the L2 cache; ``us`` in a row (pytest-benchmark's ``extra_info``) is the median over rounds of the
time between two CUDA events around the replay, divided by the number of calls. pytest-benchmark's own columns are host
times of whole rounds, that is of ``calls`` calls; on a CPU a round is one call.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.peers.linears import PEERS
from benchmarks.speed.kernel_cases import Case, cases, prepare
from benchmarks.speed.kernel_report import report
from benchmarks.speed.kernel_sides import CHAINS, CUDA, OURS, Side, layer_error, relative_error
from benchmarks.speed.timing import captured, copies_to_rotate

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
