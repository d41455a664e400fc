"""Times the forward pass of whole UNets, INT4 and fp16, in one run.

    python -m benchmarks.speed.bench_unet [--unet sd15]... [--batch 2]... [--row 'int4 graph']... [--output FILE]
    python -m benchmarks.speed.bench_unet --device cpu --unet sd15

SD1.5 at 512x512 and SDXL at 1024x1024 have their real configurations. Weights are random: latency does not depend on
their values. A row is measured, and written, as soon as it is built: single calls, with Python's time in front of each,
and 20 calls back to back, as in a sampling loop. At the end of a batch size, the main rows are measured again in turn,
one call of each per round; the speed-ups come from these medians. ``weights MB`` counts parameters and buffers. ``peak
MB`` adds the memory that one forward pass or its capture allocates (on a CPU: the growth of the process). ``launches``
counts the kernels of one call. All main rows stay in memory to the end of a batch size. On a GPU with less, choose some
``--row``.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import environment, process_memory, unets
from benchmarks.command_line import new_parser
from benchmarks.result_files import write_whole
from benchmarks.speed.unet_rows import Row, rows
from dq_runtime.graphs import enable_cuda_graphs

MEGABYTE = 1e6
WARM_UP_ROUNDS = 2
BACK_TO_BACK = 20  # calls


@dataclass
class Result:
    """The measurements of a row; None: not measured, or unknown."""

    unet: str
    batch: int
    row: str
    median_ms: float
    fastest_ms: float
    back_to_back_ms: float
    weights_mb: float
    peak_mb: float | None
    launches: int | None
    seconds_to_first: float
    in_turn_ms: float | None = None
    sm_clock_mhz: float | None = None  # under load


def seconds(run: Callable[[], Any], device: str) -> float:
    """The time of one call; on a GPU, between two CUDA events."""
    if device == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def tensor_megabytes(unet: nn.Module) -> float:
    """Megabytes of parameters and buffers; each storage counts once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in unet.state_dict().values()}
    return sum(storages.values()) / MEGABYTE


class PeakMemory:
    """The peak of memory since ``start``, in bytes: of the GPU's allocator, or of this process."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._before = 0

    def start(self) -> None:
        if self._device == "cpu":
            self._before = process_memory.reset_peak()
        else:
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()

    def growth(self) -> int:
        peak = process_memory.peak() if self._device == "cpu" else torch.cuda.max_memory_allocated()
        return peak - self._before


def kernel_launches(call: Callable[[], Any], device: str) -> int | None:
    """The kernels, copies and fills that the GPU runs in one call."""
    if device == "cpu":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events()) or None


def clock_under_load(call: Callable[[], Any], device: str) -> float | None:
    """The GPU's clock in MHz while calls wait for it."""
    if device == "cpu":
        return None
    for _ in range(2 * BACK_TO_BACK):
        call()
    clock = environment.sm_clock_mhz()
    torch.cuda.synchronize()
    return clock


@torch.no_grad()
def measure_row(row: Row, name: str, device: str, batch: int, rounds: int) -> tuple[Callable[[], Any], Result]:
    """Builds a row's UNet, calls it, which compiles and captures, and times it.

    Raises:
        RuntimeError: if the result is not finite.
    """
    torch.manual_seed(0)
    memory = PeakMemory(device)
    memory.start()
    start = time.perf_counter()
    with row.without():
        unet = row.make()
        arguments = unets.inputs(name, batch, device, row.dtype)

        def call() -> torch.Tensor:
            return unet(**arguments).sample

        if device != "cpu" and not row.is_compiled:
            call()  # cuDNN searches its plans; only the first call needs memory for this
            memory.start()
        if row.replays:
            enable_cuda_graphs(unet)
        finite = call().isfinite().all()
    if not finite:
        raise RuntimeError(f"{row.name}: the result is not finite, so its time would mean nothing")
    to_first, weights = time.perf_counter() - start, tensor_megabytes(unet)
    peak = memory.growth() / MEGABYTE + (weights if device != "cpu" and not row.is_compiled else 0)
    times = [seconds(call, device) for _ in range(WARM_UP_ROUNDS + rounds)][WARM_UP_ROUNDS:]
    many = BACK_TO_BACK if device != "cpu" else 1
    together = seconds(lambda: [call() for _ in range(many)], device) / many
    result = Result(
        name, batch, row.name, 1e3 * statistics.median(times), 1e3 * min(times), 1e3 * together, weights, peak or None,
        kernel_launches(call, device), to_first, sm_clock_mhz=clock_under_load(call, device),
    )  # fmt: skip
    return call, result


@torch.no_grad()
def measure(chosen: list[Row], name: str, device: str, batch: int, rounds: int) -> Iterator[Result]:
    """Yields each row's result as soon as it is known, and again with the time in turn.

    A compiled row that fails is left out, and one line gives the reason.
    """
    kept: list[tuple[Callable[[], Any], Result]] = []
    for row in sorted(chosen, key=lambda row: row.is_compiled):
        try:
            call, result = measure_row(row, name, device, batch, rounds)
        except Exception as error:
            if not row.is_compiled:
                raise
            print(f"{name}: {row.name} failed: {error!r}"[:1000], flush=True)
            continue
        yield result
        if row.in_turn:
            kept.append((call, result))
        del call
    times: list[list[float]] = [[] for _ in kept]
    for _ in range(rounds):
        for index, (call, _) in enumerate(kept):
            times[index].append(seconds(call, device))
    for (_, result), measured in zip(kept, times, strict=True):
        result.in_turn_ms = 1e3 * statistics.median(measured)
        yield result


def table(results: list[Result]) -> str:
    """The rows, and the speed-up of our fastest row over each baseline, of one UNet and batch size."""
    prefix = f"{results[0].unet}, batch {results[0].batch}:"
    columns = ("row", "ms", "best", "in a row", "in turn", "weights MB", "peak MB", "launches")
    lines = [f"{prefix} {columns[0]:<44}" + "".join(f"{column:>11}" for column in columns[1:])]
    for r in results:
        numbers = [r.median_ms, r.fastest_ms, r.back_to_back_ms, r.in_turn_ms, r.weights_mb, r.peak_mb, r.launches]
        cells = ("-" if n is None else f"{n:.2f}" if isinstance(n, float) else str(n) for n in numbers)
        lines.append(f"{prefix} {r.row:<44}" + "".join(f"{cell:>11}" for cell in cells))
    in_turn = [result for result in results if result.in_turn_ms is not None]
    ours = [result for result in in_turn if result.row.startswith("int4") and "LoRA" not in result.row]
    if ours:
        best = min(ours, key=lambda result: result.in_turn_ms or 0.0)
        lines += [
            f"{prefix} speed-up of {best.row} over {other.row}: {other.in_turn_ms / best.in_turn_ms:.2f}x"
            for other in in_turn
            if not other.row.startswith("int4") and other.in_turn_ms and best.in_turn_ms
        ]
    return "\n".join(lines)


def main() -> None:
    """Runs the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--unet", action="append", choices=unets.CONFIGS, help="may be repeated (default: sd15, sdxl)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--batch", type=int, action="append", help="may be repeated (default: 2)")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--row", action="append", default=[], help="only this row; may be repeated")
    parser.add_argument("--no-compiled", action="store_true", help="leave out the rows that compile for minutes")
    parser.add_argument("--output", type=Path, help="the JSON file; written after each row")
    arguments = parser.parse_args()
    torch.backends.cudnn.benchmark = True
    results: dict[tuple[str, int, str], Result] = {}
    wanted = set()
    for batch in arguments.batch or [2]:
        for name in arguments.unet or ("sd15", "sdxl"):
            chosen = [
                row
                for row in rows(name, arguments.device)
                if (not arguments.row or row.name in arguments.row) and not (arguments.no_compiled and row.is_compiled)
            ]
            wanted |= {(name, batch, row.name) for row in chosen}
            for result in measure(chosen, name, arguments.device, batch, arguments.rounds):
                results[name, batch, result.row] = result
                print(f"{name}, batch {batch}: {result.row}: {result.median_ms:.2f} ms", flush=True)
                if arguments.output is not None:
                    document = {**environment.describe(), "rows": [asdict(each) for each in results.values()]}
                    write_whole(arguments.output, json.dumps(document, indent=1) + "\n")
            measured = [result for key, result in results.items() if key[:2] == (name, batch)]
            if measured:
                print(table(measured), flush=True)
    if missing := wanted - results.keys():
        raise SystemExit(
            "Failed: " + ", ".join(sorted(f"{name}, batch {batch}, {row}" for name, batch, row in missing))
        )


if __name__ == "__main__":
    main()
