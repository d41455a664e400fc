"""Compiles every Triton kernel without a GPU, and reports properties of the machine code.

    python -m benchmarks.static_analysis.static_kernels [--target sm_90]... [--sample] [--jobs 2] [--output FILE]

Each use of each kernel is compiled in each launch configuration that ``kernels/triton/tuning`` lists for the
architecture, in its own file or in that of another architecture. Instructions are counted here, not timed. The JSON has
the names of its columns, then rows:

- ``registers`` of a thread, ``spills`` (instructions that access local memory), ``stack_bytes``, ``shared_bytes``;
  ``blocks``, the resident blocks per multiprocessor, and ``occupancy``, their share of its warps, as limited by these;
- ``early_prefetches`` and ``early_accesses`` of global memory, before the wait for the previous kernel (programmatic
  dependent launch);
- ``mma``: matrix instructions by name, in PTX for NVIDIA, in the machine code for AMD;
- ``loop_*``: instructions of the main loop, which is the innermost loop with a matrix instruction, or the whole kernel
  if there is none. ``loop_loads`` are loads from global memory by bytes per thread. ``loop_integer`` are integer, logic
  and move instructions, except scalar ones. ``loop_unpack`` are instructions that unpack nibbles (NVIDIA; see
  ``machine_code.nibble_instructions``). ``loop_waits`` are barriers and waits, of
  which ``loop_wgmma_waits`` wait for asynchronous matrix instructions (Hopper).
- ``int8_*``: the same for ``int8_baseline``, the loop with int8 weights. ``ratio`` is the number of loop instructions
  per multiply-add, relative to int8; if the names of matrix instructions do not have their size (sm_100), it is per
  matrix instruction.

``--sample`` compiles every use in one configuration, and for sm_90 every configuration in one use, without ``int8_*``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

from benchmarks.command_line import new_parser
from benchmarks.result_files import RESULTS
from benchmarks.static_analysis import machine_code
from benchmarks.static_analysis.kernel_uses import TARGETS, USES, compile_int8, compile_use, shipped
from benchmarks.static_analysis.machine_code import MMA, Instruction, count, main_loop
from benchmarks.static_analysis.static_report import Row, describe, read, write
from dq_kernels.triton.tuning import LaunchConfig

OUTPUT = RESULTS / "static_kernels.json"
SAMPLED_WHOLE = "sm_90"

Job = tuple[str, tuple[str, str], LaunchConfig | None]


def all_jobs(targets: Sequence[str]) -> list[Job]:
    """Every shipped kernel, use and configuration, once."""
    return [(target, key, config) for target in targets for key, config in shipped(target)]


def sample_jobs(targets: Sequence[str]) -> list[Job]:
    """The first of ``all_jobs`` for each use and target; for ``SAMPLED_WHOLE`` also for each configuration."""
    return [job for target in targets for job in _sample(all_jobs([target]))]


def _sample(jobs: list[Job]) -> Iterator[Job]:
    seen: set[Any] = set()
    for job in jobs:
        target, key, config = job
        marks: set[Any] = {key}
        if target == SAMPLED_WHOLE:
            marks.add((USES[key].op, config))
        if not marks <= seen:
            yield job
        seen |= marks


@cache
def int8_loop(target: str, key: tuple[str, str], config: LaunchConfig) -> list[Instruction]:
    """The main loop of the baseline, in the form with fewer instructions."""
    loops = (main_loop(read(compile_int8(USES[key], target, config, parts))[0]) for parts in (1, 2))
    return min(loops, key=instructions_per_work)


def instructions_per_work(loop: list[Instruction]) -> float:
    """Instructions per multiply-add, or per matrix instruction if its name does not have its size."""
    return len(loop) / (machine_code.multiply_adds(loop) or count(loop, MMA) or 1)


def against_int8(loop: list[Instruction], int8: list[Instruction]) -> Row:
    """The columns that compare the main loop with the baseline's."""
    return {
        "int8_loop_instructions": len(int8),
        "int8_loop_mma": count(int8, MMA),
        "int8_loop_integer": count(int8, machine_code.INTEGER),
        "int8_loop_waits": count(int8, machine_code.WAIT),
        "ratio": round(instructions_per_work(loop) / instructions_per_work(int8), 3),
    }


def compile_row(job: Job, beside_int8: bool = True) -> Row:
    """Compiles a job and describes the machine code; ``beside_int8`` adds the comparison with the baseline."""
    target, key, config = job
    row, loop = describe(target, compile_use(USES[key], target, config))
    if config is not None:
        nvidia = TARGETS[target].backend == "cuda"
        row["loop_unpack"] = machine_code.nibble_instructions(loop) if nvidia else None
        if beside_int8:
            row |= against_int8(loop, int8_loop(target, key, config))
    return {**name_of(job), **row}


def name_of(job: Job) -> Row:
    """The columns of a row that identify the job."""
    target, key, config = job
    return {"target": target, "kernel": key[0], "use": key[1], **_fields(config)}


def _fields(config: LaunchConfig | None) -> Row:
    """A configuration as the compiler sees it: without ``group_m``, and with ``is_split`` for ``split_k`` above 1."""
    if config is None:
        return {}
    fields = asdict(config)
    del fields["group_m"]
    return fields | {"is_split": fields.pop("split_k") > 1}


def compile_rows(jobs: Sequence[Job], processes: int, beside_int8: bool = True) -> list[Row]:
    """Compiles all jobs in ``processes`` processes."""
    compile_one = partial(compile_row, beside_int8=beside_int8)
    if processes == 1:
        return list(map(compile_one, jobs))
    with ProcessPoolExecutor(processes) as pool:
        return list(pool.map(compile_one, jobs, chunksize=4))


def config_of(row: Row) -> str:
    """A row's launch configuration in words; empty for a kernel without one."""
    if "block_m" not in row:
        return ""
    words = "{block_m}x{block_n}x{block_k}, {num_warps} warps, {num_stages} stages".format(**row)
    return f"{words}, split" if row["is_split"] else words


def table(rows: list[Row]) -> str:
    """The rows as a table for a terminal, with the launch configuration in one column."""
    names = ("target", "kernel", "use", "registers", "spills", "stack_bytes", "shared_bytes", "blocks", "occupancy")
    loop = ("loop_instructions", "loop_mma", "loop_unpack", "loop_integer", "loop_waits", "loop_shared_stores")
    lines = []
    for row in rows:
        loads = " ".join(f"{number}x{size}" for size, number in row["loop_loads"].items())
        cells = {name: row[name] for name in names} | {"config": config_of(row)}
        cells |= {name: row.get(name, "") for name in (*loop, "ratio")} | {"loop_loads": loads}
        cells["per_mma"] = round(row["loop_instructions"] / row["loop_mma"], 1) if row["loop_mma"] else ""
        lines.append(cells | {"mma": " ".join(row["mma"])})
    columns = [[name, *(str(line[name]) for line in lines)] for name in lines[0]]
    widths = [max(map(len, column)) for column in columns]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in zip(*columns, strict=True))


def main() -> None:
    """Runs the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--target", action="append", choices=TARGETS, help="may be repeated (default: all)")
    parser.add_argument("--sample", action="store_true", help="compile a sample, like the tests")
    parser.add_argument(
        "--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the JSON file (default: %(default)s)")
    arguments = parser.parse_args()
    jobs = (sample_jobs if arguments.sample else all_jobs)(arguments.target or list(TARGETS))
    rows = compile_rows(jobs, arguments.jobs, beside_int8=not arguments.sample)
    print(table(rows))
    write(rows, arguments.output)


if __name__ == "__main__":
    main()
