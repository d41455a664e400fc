"""The columns of a compiled kernel, and the file of a report: one row for each kernel."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import triton
from triton.compiler import CompiledKernel

from benchmarks.static_analysis import machine_code
from benchmarks.static_analysis.machine_code import MMA, Instruction, count, main_loop

Row = dict[str, Any]


def read(kernel: CompiledKernel) -> tuple[list[Instruction], machine_code.Allocation]:
    """Instructions and allocation of a kernel for NVIDIA or AMD."""
    return (machine_code.read_amd if "amdgcn" in kernel.asm else machine_code.read_nvidia)(kernel.asm)


def describe(target: str, kernel: CompiledKernel) -> tuple[Row, list[Instruction]]:
    """The columns that all kernels have, and the main loop."""
    instructions, allocation = read(kernel)
    shared, columns = kernel.metadata.shared, getattr(kernel.metadata, "tmem_size", 0) or 0
    blocks, share = machine_code.occupancy(
        target, allocation.registers, kernel.metadata.num_warps, shared, columns
    )  # fmt: skip
    loop, early = main_loop(instructions), machine_code.before_wait(instructions)
    row = {
        **allocation._asdict(),
        "shared_bytes": shared,
        "blocks": blocks,
        "occupancy": round(share, 3),
        "instructions": len(instructions),
        "early_prefetches": count(early, machine_code.PREFETCH) or None,
        "early_accesses": count(early, machine_code.GLOBAL_ACCESS) or None,
        "loop_instructions": len(loop),
        "loop_mma": count(loop, MMA),
        "loop_loads": machine_code.global_loads(loop),
        "loop_shared_stores": count(loop, machine_code.SHARED_STORE),
        "loop_integer": count(loop, machine_code.INTEGER),
        "loop_waits": count(loop, machine_code.WAIT),
        "loop_wgmma_waits": count(loop, machine_code.WGMMA_WAIT) or None,
    }
    return row, loop


def write(rows: list[Row], output: Path) -> None:
    """Writes the JSON: names of columns, then one row per line, null where a row has no such column."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    about = {"triton": triton.__version__, "date": datetime.date.today().isoformat(), "columns": columns}
    lines = ",\n  ".join(json.dumps([row.get(name) for name in columns]) for row in rows)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(f'{json.dumps(about)[:-1]}, "rows": [\n  {lines}\n]}}\n', encoding="utf-8")


def read_report(path: Path) -> dict[str, Any]:
    """Reads a file of ``write`` and restores the rows."""
    report = json.loads(path.read_text(encoding="utf-8"))
    columns = report.pop("columns")
    report["rows"] = [
        {name: value for name, value in zip(columns, row, strict=True) if value is not None} for row in report["rows"]
    ]
    return report
