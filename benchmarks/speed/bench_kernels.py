"""Times our operators, PyTorch's and other libraries', layer by layer, on the shapes of SD1.5 and SDXL.

    pytest benchmarks/speed/bench_kernels.py               # a dozen shapes of each UNet, batch 2, and the fused chains
    pytest benchmarks/speed/bench_kernels.py --full        # every shape, batch 2 and 8
    pytest benchmarks/speed/bench_kernels.py --rows FILE   # writes each row at once, one line of JSON
    pytest benchmarks/speed/bench_kernels.py --tiny        # a trial run of some seconds
    pytest benchmarks/speed/bench_kernels.py --benchmark-json benchmarks/results/bench_kernels_cpu.json

The baselines depend on the current device: on a GPU fp16 (cuBLAS, cuDNN in channels_last with its autotuner) and the
installed libraries of ``peers/linears.py``, on a CPU fp32 and bf16. Our times include the quantization of the input.
Each of our results is checked before it is timed.

On a GPU a round replays one CUDA graph of many calls. Each call has separate tensors, so its operands are not in the L2
cache. ``us`` in a row (pytest-benchmark's ``extra_info``) is the median over rounds of the time between two CUDA events
around the replay, divided by the number of calls. pytest-benchmark's own columns are host times of whole rounds of
``calls`` calls. On a CPU a round is one call.
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
CHAIN_TOLERANCE = 0.05  # 8-bit activations, one or two roundings: steps of 0.03 to 0.1, values of about 1


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per row."""
    rows = cases(metafunc.config.getoption("--full"), metafunc.config.getoption("--tiny"))
    metafunc.parametrize("case", rows, ids=[f"{row.group}, {row.implementation}" for row in rows])


@torch.no_grad()
def test_time(benchmark: Any, record_row: Callable[[dict[str, Any]], None], case: Case) -> None:
    benchmark.group = case.group
    if case.implementation == OURS:
        check(case)
    if CUDA:
        torch.backends.cudnn.benchmark = True
        torch.compiler.reset()  # or a library's compiled rows reach the limit of recompilations
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
    """Fails if our result is wrong: a layer is compared with the exact result, a chain with the baseline's."""
    torch.manual_seed(0)
    if case.chain is None:
        assert layer_error(case.shapes[0]) < LAYER_TOLERANCE
    else:
        ours, baseline = CHAINS[case.chain](case.shapes)
        assert relative_error(ours.to_floats(ours.run()), baseline.to_floats(baseline.run())) < CHAIN_TOLERANCE


def host_round(side: Side) -> Callable[[], float]:
    """A function that times one call on the CPU, in us."""

    def call() -> float:
        start = time.perf_counter()
        side.run()
        return 1e6 * (time.perf_counter() - start)

    return call
