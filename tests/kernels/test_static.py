"""Machine code of the kernels for GPUs that need not be present, as benchmarks/static_kernels.py reports it."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "static_kernels.py"
NVIDIA = ("sm_80", "sm_89", "sm_90")
TARGETS = (*NVIDIA, "gfx942")
GEMMS = ("int4_linear", "int4_conv2d")
# What one thread block may have, in bytes (CUDA's programming guide, compute capabilities; CDNA 3's LDS).
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_89": 99 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}

Row = dict[str, Any]


@pytest.fixture(scope="module")
def process_and_rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], list[Row]]:
    # In a process of its own: Triton decides when a kernel is defined whether it will be compiled or interpreted.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    output = tmp_path_factory.mktemp("static") / "static_kernels.json"
    command = [sys.executable, str(SCRIPT), "--output", str(output)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return process, json.loads(output.read_text(encoding="utf-8"))["rows"]


@pytest.fixture(scope="module")
def rows(process_and_rows: tuple[subprocess.CompletedProcess[str], list[Row]]) -> list[Row]:
    return process_and_rows[1]


def of(rows: list[Row], target: str, *kernels: str) -> dict[str, Row]:
    """The rows of one target, and of some kernels if any are named, by a name that a failure can be read by."""
    selected = [row for row in rows if row["target"] == target and (not kernels or row["kernel"] in kernels)]
    assert selected
    tile = "{block_m}x{block_n}x{block_k}"
    return {
        f"{row['kernel']} ({row['variant']}) {tile.format(**row) if 'block_m' in row else ''}": row for row in selected
    }


def test_compiler_reports_no_error(process_and_rows: tuple[subprocess.CompletedProcess[str], list[Row]]) -> None:
    # LLVM prints some errors, of inline assembly for one, and goes on without the code that it could not make.
    errors = [line for line in process_and_rows[0].stderr.splitlines() if line.startswith("error:")]
    assert errors == []


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_spills(rows: list[Row], target: str) -> None:
    spills = {name: row["spill_bytes"] for name, row in of(rows, target).items() if row["spill_bytes"]}
    assert spills == {}


@pytest.mark.parametrize("target", TARGETS)
def test_shared_memory_fits(rows: list[Row], target: str) -> None:
    limit = SHARED_MEMORY[target]
    too_large = {name: row["shared_bytes"] for name, row in of(rows, target).items() if row["shared_bytes"] > limit}
    assert too_large == {}


@pytest.mark.parametrize("kernel", GEMMS)
@pytest.mark.parametrize(
    ("target", "instruction"),
    [
        ("sm_80", r"mma\.sync\.\S*\.s32\.s8\.s8\.s32"),
        ("sm_89", r"mma\.sync\.\S*\.s32\.s8\.s8\.s32"),
        ("sm_90", r"wgmma\.mma_async\.\S*\.s32\.s8\.s8"),
        ("gfx942", r"v_mfma_i32_\w+_i8"),
    ],
)
def test_gemms_multiply_int8_on_matrix_units(rows: list[Row], target: str, instruction: str, kernel: str) -> None:
    for name, row in of(rows, target, kernel).items():
        assert row["loop_mma"] > 0, name
        assert [mma for mma in row["mma"] if not re.fullmatch(instruction, mma)] == [], name


@pytest.mark.parametrize("kernel", GEMMS)
@pytest.mark.parametrize("target", NVIDIA)
def test_main_loop_stores_no_operand_to_shared_memory(rows: list[Row], target: str, kernel: str) -> None:
    # Activations come by asynchronous copy; weights are unpacked in the registers that the matrix units read.
    stores = {name: row["loop_shared_stores"] for name, row in of(rows, target, kernel).items()}
    assert stores == dict.fromkeys(stores, 0)


@pytest.mark.parametrize("kernel", GEMMS)
@pytest.mark.parametrize("target", NVIDIA)
def test_main_loop_loads_16_bytes_at_a_time(rows: list[Row], target: str, kernel: str) -> None:
    for name, row in of(rows, target, kernel).items():
        threads = 32 * row["num_warps"]
        weight_bytes, half_of_x_bytes = (row["block_k"] * row[size] for size in ("block_n", "block_m"))
        if half_of_x_bytes < 16 * threads:  # a tile of few rows leaves fewer than 16 bytes to each thread
            assert (row["loop_wide_loads"], row["loop_narrow_loads"]) == (weight_bytes / threads / 16, 2), name
        else:
            wide_loads = (weight_bytes + 2 * half_of_x_bytes) / threads / 16
            assert (row["loop_wide_loads"], row["loop_narrow_loads"]) == (wide_loads, 0), name


def test_interpreted_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="unset it to compile kernels"):
        runpy.run_path(str(SCRIPT))["compile_all"](["sm_90"])
