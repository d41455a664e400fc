"""Times the forward pass of whole UNets, INT4 and fp16, in one run.

    python -m benchmarks.speed.bench_unet [--unet sd15]... [--batch 2] [--row 'int4 CUDA graph']... [--output FILE]
    python -m benchmarks.speed.bench_unet --device cpu --unet ddpm_cifar

SD1.5 at 512x512 and SDXL at 1024x1024 have their real configurations. Weights are random: latency does not depend on
their values. Every round times one forward pass of each row in turn; the table shows medians. ``weights MB`` counts
parameters and buffers. ``peak MB`` adds the memory that one forward pass, or its capture, allocates; it is unknown for
rows whose memory belongs to a compiler's own graphs. All rows stay on the GPU to the end, with weights of 34 GB for
both UNets. On a GPU with less memory, choose one ``--unet`` and some ``--row`` at a time.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import environment, quantized_unets, unets
from benchmarks.command_line import new_parser
from benchmarks.result_files import write_whole
from dq_runtime.fused import fuse
from dq_runtime.graphs import enable_cuda_graphs

MEGABYTE = 1e6
WARM_UP_ROUNDS = 2


@dataclass(frozen=True)
class Row:
    """One way to run a UNet; ``make`` builds it, and ``replays`` is True if a CUDA graph replays it."""

    name: str
    make: Callable[[], nn.Module]
    is_compiled: bool = False
    replays: bool = False


@dataclass
class Result:
    """The measurements of a row."""

    row: str
    median_ms: float
    fastest_ms: float
    weights_mb: float
    peak_mb: float | None
    seconds_to_first: float


def rows(name: str, device: str, compile_mode: str) -> list[Row]:
    """The baselines, as diffusers runs them, then our rows."""

    def stock(dtype: torch.dtype, memory_format: torch.memory_format = torch.contiguous_format) -> Any:
        return unets.build(name, device, dtype).to(memory_format=memory_format)

    def quantized(dtype: torch.dtype, fused: bool = True, int8_attention: Sequence[str] = ()) -> Any:
        unet = quantized_unets.build(name, device, dtype, int8_attention)
        if fused:
            fuse(unet)
        return unet

    def compiled(unet: Any) -> Any:
        unet.compile(mode=compile_mode, fullgraph=True)
        return unet

    if device == "cpu":
        return [
            Row("fp32", lambda: stock(torch.float32)),
            Row("bf16 channels_last", lambda: stock(torch.bfloat16, torch.channels_last)),
            Row("int4", lambda: quantized(torch.float32)),
        ]
    half = torch.float16
    return [
        Row("fp16 eager", lambda: stock(half)),
        Row("fp16 channels_last", lambda: stock(half, torch.channels_last)),
        Row("fp16 compiled", lambda: compiled(stock(half, torch.channels_last)), is_compiled=True),
        Row("fp16 CUDA graph", lambda: stock(half, torch.channels_last), replays=True),
        Row("int4 unfused", lambda: quantized(half, fused=False)),
        Row("int4", lambda: quantized(half)),
        Row("int4 compiled", lambda: compiled(quantized(half)), is_compiled=True),
        Row("int4 CUDA graph", lambda: quantized(half), replays=True),
        Row("int4 CUDA graph, int8 attention", lambda: quantized(half, int8_attention=["attentions"]), replays=True),
    ]


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


@torch.no_grad()
def prepare(row: Row, name: str, device: str, batch: int) -> tuple[Callable[[], torch.Tensor], Result]:
    """Builds a row's UNet and calls it, which compiles and captures; fails if the result is not finite."""
    torch.manual_seed(0)
    start = time.perf_counter()
    unet = row.make()
    dtype = torch.float32 if device == "cpu" else torch.float16
    arguments = unets.inputs(name, batch, device, torch.bfloat16 if row.name.startswith("bf16") else dtype)
    if not row.is_compiled:
        unet(**arguments)  # cuDNN searches its plans; only the first call needs memory for this
    if row.replays:
        enable_cuda_graphs(unet)
    before = 0
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()

    def call() -> torch.Tensor:
        return unet(**arguments).sample

    if not call().isfinite().all():
        raise RuntimeError(f"{row.name}: the result is not finite, so its time would mean nothing")
    weights = tensor_megabytes(unet)
    peak = None
    if device != "cpu" and not row.is_compiled:
        peak = weights + (torch.cuda.max_memory_allocated() - before) / MEGABYTE
    result = Result(row.name, 0.0, 0.0, weights, peak, time.perf_counter() - start)
    print(f"{name}: {row.name} is ready after {result.seconds_to_first:.1f} s", flush=True)
    return call, result


@torch.no_grad()
def measure(chosen: list[Row], name: str, device: str, batch: int, rounds: int) -> Iterator[list[Result]]:
    """Times all rows of one UNet in turn: first the rows without compilation, then all rows.

    Compilation can take minutes; after an interruption, the first list is there. A row that cannot be compiled is left
    out, and one line gives the reason.
    """
    calls, results = [], []
    for is_compiled in sorted({row.is_compiled for row in chosen}):
        for row in chosen:
            if row.is_compiled == is_compiled:
                try:
                    call, result = prepare(row, name, device, batch)
                except Exception as error:
                    if not is_compiled:
                        raise
                    print(f"{name}: {row.name} failed: {error!r}"[:1000], flush=True)
                    continue
                calls.append(call)
                results.append(result)
        times: list[list[float]] = [[] for _ in calls]
        for _ in range(WARM_UP_ROUNDS + rounds):
            for index, call in enumerate(calls):
                times[index].append(seconds(call, device))
        for result, measured in zip(results, times, strict=True):
            result.median_ms = 1e3 * statistics.median(measured[WARM_UP_ROUNDS:])
            result.fastest_ms = 1e3 * min(measured[WARM_UP_ROUNDS:])
        yield results


def keep(row: Row, names: list[str]) -> bool:
    """True if the row is selected; without names, all rows are."""
    return not names or row.name in names


def table(name: str, results: list[Result]) -> str:
    """The rows, and the speed-up of our fastest row over each baseline."""
    lines = [f"{name}: {'row':<31} {'ms':>9} {'weights MB':>11} {'peak MB':>9}"]
    for result in results:
        peak = "-" if result.peak_mb is None else f"{result.peak_mb:.0f}"
        lines.append(f"{name}: {result.row:<31} {result.median_ms:>9.2f} {result.weights_mb:>11.1f} {peak:>9}")
    ours = [result for result in results if result.row.startswith("int4")]
    if ours:
        best = min(ours, key=lambda result: result.median_ms)
        lines += [
            f"{name}: speed-up of {best.row} over {result.row}: {result.median_ms / best.median_ms:.2f}x"
            for result in results
            if result not in ours
        ]
    return "\n".join(lines)


def main() -> None:
    """Runs the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--unet", action="append", choices=unets.CONFIGS, help="may be repeated (default: sd15, sdxl)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--row", action="append", default=[], help="only this row; may be repeated")
    parser.add_argument("--compile-mode", default="reduce-overhead", help="torch.compile's mode (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="the JSON file; written after each group of rows")
    arguments = parser.parse_args()
    torch.backends.cudnn.benchmark = True
    document: dict[str, Any] = {**environment.describe(), "batch": arguments.batch, "unets": {}}
    document["compile_mode"] = arguments.compile_mode
    runs, wanted = {}, set()
    for name in arguments.unet or ("sd15", "sdxl"):
        chosen = [row for row in rows(name, arguments.device, arguments.compile_mode) if keep(row, arguments.row)]
        wanted |= {(name, row.name) for row in chosen}
        runs[name] = measure(chosen, name, arguments.device, arguments.batch, arguments.rounds)
    # The rows without compilation of all UNets come before any compiled row.
    while runs:
        for name in list(runs):
            results = next(runs[name], None)
            if results is None:
                del runs[name]
                continue
            print(table(name, results), flush=True)
            document["unets"][name] = [asdict(result) for result in results]
            if arguments.output is not None:
                write_whole(arguments.output, json.dumps(document, indent=1) + "\n")
    missing = wanted - {(name, result["row"]) for name, results in document["unets"].items() for result in results}
    if missing:
        raise SystemExit("Failed: " + ", ".join(sorted(f"{name}, {row}" for name, row in missing)))


if __name__ == "__main__":
    main()
