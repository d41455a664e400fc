"""Searches launch configurations for the GEMMs of SD1.5 and SDXL, and writes the tuning file that the package ships.

    python -m benchmarks.tuning.tune [--unet sd15]... [--batch 2]... [--minutes 8] [--worst 10] [--output FILE]

For each launch of a fused UNet (``speed/launches.py``), the search times every tile that fits, then split-K and the
order of the tiles for the best ones. Times are medians over CUDA graphs with rotated weights. Candidates that spill
registers are left out. ``<output>.progress`` keeps every finished shape, so a second run continues an interrupted
search.

The tuning file is written after each shape, as soon as every operator has a shape. Its earlier entries stay until
their shapes are tuned again. ``benchmarks/results/tuning_<architecture>.json`` has the time of the best configuration
for each launch. ``--worst`` tunes only the launches that lose the most time against the best rate in that file.
``--dry-run`` runs tiny shapes in Triton's interpreter, without timing them.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment
from benchmarks.command_line import new_parser
from benchmarks.result_files import RESULTS, ROOT, write_whole
from benchmarks.speed.launches import TINY, Launch, launches
from benchmarks.speed.problem import Problem
from benchmarks.speed.timing import graph_microseconds
from dq_kernels.triton.tuning import LaunchConfig, architecture, read_tuning

TUNING = ROOT / "kernels" / "triton" / "tuning"
FIELDS = ["block_m", "block_n", "block_k", "num_warps", "num_stages", "group_m", "split_k"]
COLUMNS = ["op", "rows", "out_channels", "reduction", "stride", "upsample", "residual", "config", "us", "tops"]
# block_m, block_n, block_k, num_warps, num_stages
TILES = (
    (16, 64, 64, 4, 4),
    (16, 64, 128, 4, 4),
    (16, 128, 64, 4, 4),
    (32, 64, 64, 4, 4),
    (32, 64, 128, 4, 3),
    (64, 64, 32, 4, 5),
    (64, 64, 64, 4, 4),
    (64, 64, 128, 4, 3),
    (64, 128, 32, 4, 5),
    (64, 128, 64, 4, 4),
    (64, 128, 128, 4, 3),
    (128, 64, 32, 4, 5),
    (128, 64, 64, 4, 4),
    (64, 128, 64, 8, 3),
    (128, 64, 64, 8, 4),
    (128, 128, 32, 8, 4),
    (128, 128, 64, 8, 3),
    (128, 128, 64, 8, 4),
    (256, 64, 32, 4, 4),
    (256, 64, 64, 4, 3),
    (256, 64, 64, 8, 3),
    (256, 128, 32, 8, 4),
    (256, 128, 64, 8, 3),
    (128, 256, 32, 8, 4),
    (128, 256, 64, 8, 3),
)
OPERATORS = {"linear", "linear_geglu", "conv2d"}
SPLITS = (2, 4, 8)
GROUPS = (4, 16)
REFINED = 3  # the number of tiles in the second round
DRY_TILES = ((16, 16, 16, 4, 2), (32, 16, 16, 4, 2))


def key(launch: Launch) -> str:
    """A launch's name in the progress file."""
    return json.dumps(astuple(launch))


def tiles(launch: Launch, candidates: tuple[tuple[int, ...], ...] = TILES) -> list[LaunchConfig]:
    """Tiles that are not mostly padding and whose accumulators fit in registers."""
    chosen = []
    for block_m, block_n, *rest in candidates:
        accumulators = block_m * block_n * (2 if launch.op == "linear_geglu" else 1)
        too_large = block_m >= 2 * max(launch.rows, 16) or block_n >= 2 * max(launch.out_channels, 64)
        too_small = block_m <= 32 and launch.rows > 256
        if launch.op == "linear_geglu" and rest[1] == 8 and block_n < 128:
            continue  # two groups of four warps would exchange their halves through shared memory
        if launch.op == "linear_geglu" and rest[0] > 64 and accumulators > 64 * 32 * rest[1]:
            continue  # it spills with some versions of Triton
        if accumulators <= 64 * 32 * rest[1] * 2 and not too_large and not too_small:
            chosen.append(LaunchConfig(block_m, block_n, *rest))
    return chosen


def refinements(launch: Launch, config: LaunchConfig, multiprocessors: int) -> Iterator[LaunchConfig]:
    """Split-K for few tiles, other tile orders for many."""
    num_tiles = -(-launch.rows // config.block_m) * -(-launch.out_channels // config.block_n)
    steps = launch.reduction // (2 * config.block_k)
    if launch.op != "linear_geglu":
        for split in SPLITS:
            if num_tiles * split <= 4 * multiprocessors and steps >= 4 * split:
                yield replace(config, split_k=split)
    if num_tiles > 2 * multiprocessors:
        for group in GROUPS:
            yield replace(config, group_m=group)


def measure(problem: Problem, config: LaunchConfig) -> float | None:
    """Microseconds, or None if the configuration does not fit the device or spills."""
    try:
        if problem.run(config).n_spills:
            return None
        return graph_microseconds(lambda copy: problem.run(config, copy), problem.copies)
    except Exception as error:  # too much shared memory or registers: Triton raises errors of several kinds
        if "out of resource" in str(error) or "OutOfResources" in type(error).__name__:
            return None
        raise


def search(launch: Launch) -> list[tuple[float, list[int]]]:
    """All configurations that ran, the fastest first."""
    problem = Problem(launch, "cuda")
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    timed = {config: time for config in tiles(launch) if (time := measure(problem, config)) is not None}
    for config in sorted(timed, key=timed.__getitem__)[:REFINED]:
        for refined in refinements(launch, config, multiprocessors):
            if (time := measure(problem, refined)) is not None:
                timed[refined] = time
    return [(timed[config], config.to_list()) for config in sorted(timed, key=timed.__getitem__)]


def compile_share(shapes: list[Launch], candidates: tuple[tuple[int, ...], ...]) -> None:
    """Compiles a share of the kernels into Triton's cache on disk; runs in a separate process."""
    for launch in shapes:
        problem = Problem(launch, "cuda", copies=1)
        for config in tiles(launch, candidates):
            for split in (1, 2) if launch.op != "linear_geglu" else (1,):
                try:
                    problem.run(replace(config, split_k=split))
                except Exception:
                    continue  # the search handles this error


def compile_all(shapes: list[Launch], deadline: float) -> None:
    """Compiles the search's kernels in parallel until the deadline; each tile belongs to one process."""
    context = multiprocessing.get_context("spawn")
    workers = max(1, (os.cpu_count() or 2) - 1)
    processes = [context.Process(target=compile_share, args=(shapes, TILES[i::workers])) for i in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()


def write_lines(path: Path, header: dict[str, Any], name: str, rows: list[Any]) -> None:
    """Writes JSON with one row per line."""
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    text = json.dumps(header, indent=1)[:-2] + f',\n "{name}": [\n' + lines + "\n ]\n}\n"
    write_whole(path, text)


def write_timings(path: Path, progress: dict[str, Any]) -> None:
    """Writes every launch with its best configuration, microseconds and TOP/s."""
    rows = []
    for name, results in progress["shapes"].items():
        if results:
            launch, (microseconds, config) = Launch(*json.loads(name)), results[0]
            shape = (launch.op, launch.rows, launch.out_channels, launch.reduction)
            options = (launch.stride, launch.upsample, launch.residual)
            tops = launch.operations / microseconds / 1e6
            rows.append([*shape, *options, config, round(microseconds, 2), round(tops, 1)])
    write_lines(path, {**progress["environment"], "columns": COLUMNS}, "rows", sorted(rows))


def measured_before(path: Path) -> dict[tuple[Any, ...], list[int]]:
    """The configurations of an existing tuning file by shape; empty if they were not measured."""
    if not path.exists():
        return {}
    document, shapes = read_tuning(path)
    return {(s.op, s.rows, s.out_channels, s.reduction): s.config.to_list() for s in shapes if document["measured"]}


def write_tuning(path: Path, progress: dict[str, Any]) -> None:
    """Writes the shipped form: the best configuration of every distinct shape, one per line.

    Every operator needs at least one shape at run time, so no file is written before each has one.
    """
    best: dict[tuple[Any, ...], tuple[float, list[int]]] = {}
    for name, results in progress["shapes"].items():
        op, rows, out_channels, reduction, *_ = json.loads(name)
        if results:
            entry = (op, rows, out_channels, reduction)
            best[entry] = min(best.get(entry, results[0]), results[0], key=lambda result: result[0])
    configs = measured_before(path) | {entry: config for entry, (_, config) in best.items()}
    if {op for op, *_ in configs} == OPERATORS:
        header = {"architecture": path.stem, "measured": True, "source": progress["environment"], "fields": FIELDS}
        write_lines(path, header, "shapes", [[*entry, config] for entry, config in sorted(configs.items())])


def by_cost(counted: Mapping[Launch, int]) -> list[Launch]:
    """The most expensive launch of each operator, then all others by cost, so that an interruption loses the least."""
    dearest = sorted(counted, key=lambda launch: -counted[launch] * launch.operations)
    firsts = {launch.op: launch for launch in reversed(dearest)}
    return sorted(dearest, key=lambda launch: launch not in firsts.values())


def worst(counted: Mapping[Launch, int], timings: Path, number: int) -> list[Launch]:
    """The launches that lose the most time in a forward pass, against the highest rate of any launch in the timings.

    Launches without a time come first.
    """
    rows = json.loads(timings.read_text(encoding="utf-8"))["rows"] if timings.exists() else []
    times = {tuple(row[:4]): row[COLUMNS.index("us")] for row in rows}
    best = max((row[COLUMNS.index("tops")] for row in rows), default=1.0)

    def lost(launch: Launch) -> float:
        time = times.get((launch.op, launch.rows, launch.out_channels, launch.reduction), float("inf"))
        return counted[launch] * (time - launch.operations / best / 1e6)

    return sorted(counted, key=lost, reverse=True)[:number]


def dry_run() -> None:
    """Runs every operator once in the interpreter, on tiny shapes."""
    for launch in TINY:
        problem = Problem(launch, "cpu", copies=1)
        for config in tiles(launch, DRY_TILES):
            for candidate in (config, *refinements(launch, config, multiprocessors=8)):
                problem.run(candidate)
                print(f"{launch.op} {candidate}", flush=True)


def main() -> None:
    """Runs the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--unet", action="append", help="may be repeated (default: sd15 and sdxl)")
    parser.add_argument("--batch", action="append", type=int, help="may be repeated (default: 2)")
    parser.add_argument("--minutes", type=float, default=8, help="time budget (default: %(default)s)")
    parser.add_argument("--worst", type=int, help="tune only so many launches, the worst (default: all)")
    parser.add_argument("--output", type=Path, help="the tuning file (default: the package's, for this device)")
    parser.add_argument("--timings", type=Path, help="the file of the times (default: in benchmarks/results)")
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    if arguments.dry_run:
        dry_run()
        return
    if not torch.cuda.is_available():
        raise SystemExit("Tuning times kernels on a GPU, and there is none; --dry-run needs none")
    deadline = time.monotonic() + 60 * arguments.minutes
    output = arguments.output or TUNING / f"{architecture()}.json"
    progress_file = output.with_suffix(".progress")
    progress: dict[str, Any] = {"environment": environment.describe(), "shapes": {}}
    if progress_file.exists():
        progress["shapes"] = json.loads(progress_file.read_text(encoding="utf-8"))["shapes"]
    counted: dict[Launch, int] = {}
    for name in arguments.unet or ("sd15", "sdxl"):
        for batch in arguments.batch or (2,):
            counted |= launches(name, batch)
    timings = arguments.timings or RESULTS / f"tuning_{output.stem}.json"
    wanted = by_cost(counted) if arguments.worst is None else worst(counted, timings, arguments.worst)
    todo = [launch for launch in wanted if key(launch) not in progress["shapes"]]
    print(f"{len(todo)} shapes to tune, {len(counted) - len(todo)} done before", flush=True)
    compile_all(todo, min(deadline, time.monotonic() + 0.5 * 60 * arguments.minutes))
    print(f"compiled; {deadline - time.monotonic():.0f} s left", flush=True)
    for launch in todo:
        if time.monotonic() > deadline:
            print("out of time: run again to go on", flush=True)
            break
        results = search(launch)
        progress["shapes"][key(launch)] = results[:8]
        write_whole(progress_file, json.dumps(progress, indent=1) + "\n")
        write_tuning(output, progress)
        write_timings(timings if arguments.worst is None else timings.with_stem(f"{timings.stem}_worst"), progress)
        if results:
            microseconds, config = results[0]
            print(
                f"{launch.op} {launch.rows}x{launch.out_channels}x{launch.reduction} {config} {microseconds:.1f} us, "
                f"{launch.operations / microseconds / 1e6:.0f} TOP/s",
                flush=True,
            )


if __name__ == "__main__":
    main()
