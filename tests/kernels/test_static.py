"""Machine code of the kernels for GPUs that need not be present, as ``static_kernels`` reports it.

The tests check the committed report, which must cover all shipped configurations, and a sample that is compiled during
the tests. The sample also shows that the report is not stale.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest

from benchmarks.result_files import ROOT
from benchmarks.speed.launches import Launch
from benchmarks.speed.problem import Problem
from benchmarks.static_analysis import kernel_uses, machine_code, static_kernels
from benchmarks.static_analysis.static_report import read_report
from dq_kernels.triton import attention, gemm
from dq_kernels.triton.launch import options_of

MMA_SYNC = r"mma\.sync\.\S*\.s32\.s8\.s8\.s32"
MMA = {
    "sm_80": MMA_SYNC,
    "sm_86": MMA_SYNC,
    "sm_89": MMA_SYNC,
    "sm_90": r"wgmma\.mma_async\.\S*\.s32\.s8\.s8",
    "sm_100": rf"tcgen05\.mma\.\S*kind::i8|{MMA_SYNC}",
    "gfx942": r"v_mfma_i32_\w+_i8",
}
NVIDIA = tuple(target for target in MMA if target.startswith("sm_"))
SAMPLED = ("sm_90", "sm_80", "gfx942")
# The command line with a smaller sample: of sm_90 each use once, of the other targets each kernel of each operator.
COMPILE_SAMPLE = """
from benchmarks.static_analysis import static_kernels
from benchmarks.static_analysis.kernel_uses import USES

def sample(targets):
    jobs = {}
    for job in static_kernels.all_jobs(targets):
        target, key, _ = job
        jobs.setdefault((target, key if target == "sm_90" else (key[0], USES[key].op)), job)
    return list(jobs.values())

static_kernels.sample_jobs = sample
static_kernels.main()
"""

Row = dict[str, Any]


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    return read_report(static_kernels.OUTPUT)


@pytest.fixture(scope="module")
def process_and_sample(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    # In a process of its own: Triton decides when a kernel is defined whether it will be compiled or interpreted.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    output = tmp_path_factory.mktemp("static") / "static_kernels.json"
    targets = [word for target in SAMPLED for word in ("--target", target)]
    command = [sys.executable, "-c", COMPILE_SAMPLE, "--sample", "--jobs", "1", *targets]
    command += ["--output", str(output)]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return process, read_report(output)


@pytest.fixture(scope="module", params=["committed", "compiled"])
def rows(request: pytest.FixtureRequest) -> list[Row]:
    if request.param == "committed":
        return request.getfixturevalue("committed")["rows"]
    return request.getfixturevalue("process_and_sample")[1]["rows"]


def identity(row: Row) -> str:
    """A row's target, kernel, use and configuration, in words for a failure."""
    return f"{row['target']} {row['kernel']} ({row['use']}) {static_kernels.config_of(row)}"


def rows_of(kernel: str, rows: list[Row], *targets: str) -> dict[str, Row]:
    return {identity(row): row for row in rows if row["kernel"] == kernel and row["target"] in targets}


def gemms(rows: list[Row], *targets: str) -> dict[str, Row]:
    return rows_of("int4_gemm", rows, *targets)


def test_report_covers_all_that_is_shipped(committed: dict[str, Any]) -> None:
    shipped = {identity(static_kernels.name_of(job)) for job in static_kernels.all_jobs(list(MMA))}
    reported = {identity(row) for row in committed["rows"]}
    assert reported == shipped, "run benchmarks/static_analysis/static_kernels.py again"


def test_report_is_what_the_compiler_says_today(
    committed: dict[str, Any], process_and_sample: tuple[subprocess.CompletedProcess[str], dict[str, Any]]
) -> None:
    sample = process_and_sample[1]
    if sample["triton"] != committed["triton"]:
        pytest.skip(f"the report was made by Triton {committed['triton']}, here is {sample['triton']}")
    reported = {identity(row): row for row in committed["rows"]}
    stale = {
        identity(row): column
        for row in sample["rows"]
        for column, value in row.items()
        if reported.get(identity(row), {}).get(column) != value
    }
    assert stale == {}, "run benchmarks/static_analysis/static_kernels.py again"


def test_compiler_reports_no_error(
    process_and_sample: tuple[subprocess.CompletedProcess[str], dict[str, Any]],
) -> None:
    # LLVM prints some errors, for example of inline assembly, and continues without the code that has them.
    errors = [line for line in process_and_sample[0].stderr.splitlines() if line.startswith("error:")]
    assert errors == []


def test_nothing_spills(rows: list[Row]) -> None:
    spilled = {identity(row): (row["spills"], row["stack_bytes"]) for row in rows}
    assert {row: spills for row, spills in spilled.items() if any(spills)} == {}


def test_shared_memory_fits(rows: list[Row]) -> None:
    limits = machine_code.LIMITS
    too_large = {
        identity(row): row["shared_bytes"]
        for row in rows
        if row["shared_bytes"] > limits[row["target"]].shared_per_block
    }
    assert too_large == {}


def test_a_multiprocessor_holds_a_block(rows: list[Row]) -> None:
    assert [identity(row) for row in rows if row["blocks"] < 1] == []


@pytest.mark.parametrize("target", MMA)
def test_gemms_multiply_int8_on_matrix_units(rows: list[Row], target: str) -> None:
    for name, row in gemms(rows, target).items():
        assert row["loop_mma"] > 0, name
        assert [mma for mma in row["mma"] if not re.fullmatch(MMA[target], mma)] == [], name


@pytest.mark.parametrize("target", MMA)
def test_attention_multiplies_int8_on_matrix_units(rows: list[Row], target: str) -> None:
    for name, row in rows_of("int8_attention", rows, target).items():
        assert row["loop_mma"] > 0, name
        assert [mma for mma in row["mma"] if not re.fullmatch(MMA[target], mma)] == [], name


def test_attention_loads_keys_and_values_by_16_bytes_a_thread(rows: list[Row]) -> None:
    # 64 keys and 64 values of 32, 64 or 128 padded channels; only sums of the values and two scales are loaded by fewer
    # bytes. Probabilities do not pass through shared memory, which would take 16 stores.
    prepared = {name: row for name, row in rows_of("int8_attention", rows, *NVIDIA).items() if "few keys" not in name}
    for name, row in prepared.items():
        padded = next(size for size in (32, 64, 128) if int(re.search(r"(\d+) channels", name)[1]) <= size)
        num_warps = attention.tile_of(padded)[1]
        assert row["loop_loads"]["16"] == 2 * 64 * padded // (16 * 32 * num_warps), name
        assert row["loop_shared_stores"] <= 5, name
    for name, row in rows_of("quantize_keys_values", rows, *MMA).items():
        assert {"16"} <= set(row["loop_loads"]) <= {"16", "4"}, name  # Triton 3.5 reads a maximum back by 4


def test_main_loop_stores_no_operand_to_shared_memory(rows: list[Row]) -> None:
    # Activations are copied asynchronously; weights are unpacked in the registers that the matrix units read.
    stores = {name: row["loop_shared_stores"] for name, row in gemms(rows, *NVIDIA).items()}
    assert {name: number for name, number in stores.items() if number} == {}


def test_hopper_waits_for_one_product_a_step(rows: list[Row]) -> None:
    # Triton waits for the asynchronous wgmma after each product whose operand A is in registers.
    waits = {name: row["loop_wgmma_waits"] for name, row in gemms(rows, "sm_90").items()}
    assert set(waits.values()) == {1}, waits


def test_only_weights_are_touched_before_the_previous_kernel_has_ended(rows: list[Row]) -> None:
    assert {identity(row): row["early_accesses"] for row in rows if "early_accesses" in row} == {}
    assert [name for name, row in gemms(rows, "sm_90").items() if "early_prefetches" not in row] == []


def test_main_loop_loads_as_wide_as_the_tile_permits(rows: list[Row]) -> None:
    # 16 bytes a thread; if a tile has fewer bytes for each thread, all of them at once.
    wrong = {}
    for name, row in gemms(rows, *MMA).items():
        threads = row["num_warps"] * machine_code.LIMITS[row["target"]].warp_size
        weight, activations = (row["block_k"] * row[size] // threads for size in ("block_n", "block_m"))
        tiles = [*[weight] * (1 + ("GEGLU" in row["use"])), activations, activations]
        if row["target"] == "sm_90":  # both halves of K are one tile, and so are GEGLU's hidden rows and gates
            tiles = [sum(tiles[:-2]), 2 * activations]
        expected: Counter[str] = Counter()
        for size in tiles:
            expected[str(min(16, size))] += max(1, size // 16)
        # AMD's compiler moves some loads of the next step in front of the loop's masks: only widths are compared.
        found = row["loop_loads"] if row["target"] in NVIDIA else dict.fromkeys(row["loop_loads"])
        if found != (expected if row["target"] in NVIDIA else dict.fromkeys(expected, None)):
            wrong[name] = row["loop_loads"]
    assert wrong == {}


def test_unpacking_takes_three_instructions_for_eight_nibbles(rows: list[Row]) -> None:
    # An operand A of 4 registers is half of what 12 instructions unpack from 4 packed registers: 6 for each wgmma
    # m64nNk32. An mma m16n8k32 shares its operand with the others of its warp: less than one for each in a tile of 64
    # rows or more, in proportion below.
    for name, row in gemms(rows, "sm_90").items():
        assert 0 < row["loop_unpack"] <= 6 * row["loop_mma"], name
    for name, row in gemms(rows, "sm_80", "sm_86", "sm_89").items():
        assert 0 < row["loop_unpack"] < row["loop_mma"] * max(1, 64 / row["block_m"]), name


class Recorder:
    """In place of the kernel: keeps the arguments of its last launch, by name."""

    def __init__(self, kernel: Any) -> None:
        self.names, self.last = kernel.arg_names, dict[str, Any]()

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **options: self.last.update(zip(self.names, arguments, strict=False), **options)


@pytest.mark.parametrize(
    ("use", "shape"),
    [
        ("linear, even K", Launch("linear", 512, 64, 512, (2, 256, 512), (64, 256))),
        ("linear, GEGLU, quantized", Launch("linear_geglu", 512, 64, 352, (2, 256, 352), (128, 176))),
        (
            "conv 3x3, even K, addend, statistics",
            Launch("conv2d", 512, 64, 4608, (2, 18, 18, 512), (64, 3, 3, 256), channel_add=True, statistics=True),
        ),
    ],
    ids=["linear", "geglu", "conv2d"],
)
def test_report_compiles_what_the_runtime_and_the_tuner_launch(
    monkeypatch: pytest.MonkeyPatch, use: str, shape: Launch
) -> None:
    recorder, compiled = Recorder(gemm.int4_gemm_kernel), []
    annotations = gemm.int4_gemm_kernel.fn.__annotations__
    constants = {name for name, kind in annotations.items() if kind == "tl.constexpr"}
    monkeypatch.setattr(gemm, "int4_gemm_kernel", recorder)
    monkeypatch.setattr(gemm, "current_target", lambda: kernel_uses.TARGETS["sm_90"])
    monkeypatch.setattr(gemm, "launch_options", lambda: options_of(kernel_uses.TARGETS["sm_90"]))
    monkeypatch.setattr(kernel_uses, "_compile", lambda *arguments: compiled.append(arguments))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    problem, gemm_use = Problem(shape, "cpu", copies=1), kernel_uses.USES["int4_gemm", use]
    for config in gemm_use.configs("sm_90"):
        problem.run(config)
        kernel_uses.compile_use(gemm_use, "sm_90", config)
        _, _, given, _, _, options = compiled.pop()
        assert constants <= set(given)
        expected = {name: value for name, value in (given | options).items() if name in recorder.last}
        assert {name: recorder.last[name] for name in expected} == expected
        assert set(options) <= set(expected)
        assert recorder.last.pop("maxnreg", None) == options.get("maxnreg")


def test_interpreted_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    use = kernel_uses.GEMM_USES[0]
    with pytest.raises(RuntimeError, match="unset it to compile kernels"):
        kernel_uses.compile_use(use, "sm_90", use.configs("sm_90")[0])


# Two steps of a loop, in the form that nvdisasm prints; the first shift computes an address.
SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0004*/                   CCTL.E.PF2  [R4] ;
        /*0008*/                   ACQBULK  ;
.L_x_1:
        /*0010*/                   IMAD.SHL.U32 R9, R8, 0x10, RZ ;
        /*0020*/                   LDSM.16.M88.4 R4, [R9+UR14+0xc000] ;
        /*0030*/                   SHF.L.U32 R88, R4.reuse, 0x4, RZ ;
        /*0040*/                   LOP3.LUT R4, R4, 0xf0f0f0f0, RZ, 0xc0, !PT ;
        /*0050*/                   LOP3.LUT R88, R88, 0xf0f0f0f0, RZ, 0xc0, !PT ;
        /*0060*/                   IGMMA.64x128x32.S8.S8 R24, R88, gdesc[UR20], R24 ;
        /*0070*/                   LDGSTS.E.BYPASS.128 [R97+0xc000], desc[UR18][R4.64], !P2 ;
        /*0080*/                   LDG.E.64 R4, desc[UR18][R4.64] ;
        /*0090*/               @P0 BRA `(.L_x_1) ;
        /*00a0*/                   STS [R4], R5 ;
        /*00b0*/                   EXIT ;
"""


def test_sass_is_read_as_written() -> None:
    early = machine_code.before_wait(machine_code.parse(SASS))
    assert machine_code.count(early, machine_code.PREFETCH) == 1
    assert machine_code.count(early, machine_code.GLOBAL_ACCESS) == 0
    loop = machine_code.main_loop(machine_code.parse(SASS))
    assert [line.name for line in (loop[0], loop[-1])] == ["IMAD.SHL.U32", "BRA"]
    assert machine_code.nibble_instructions(loop) == 3
    assert machine_code.global_loads(loop) == {16: 1, 8: 1}
    assert machine_code.multiply_adds(loop) == 64 * 128 * 32
    assert machine_code.count(loop, machine_code.SHARED_STORE) == 0


# Triples from NVIDIA's occupancy calculator: registers, shared memory and warps limit in turn.
@pytest.mark.parametrize(
    ("target", "registers", "num_warps", "shared", "blocks"),
    [
        ("sm_80", 128, 8, 49152, 2),
        ("sm_80", 32, 4, 0, 16),
        ("sm_86", 32, 4, 49152, 2),
        ("sm_89", 168, 4, 0, 3),
        ("sm_90", 111, 8, 65536, 2),
        ("gfx942", 96, 4, 0, 5),
    ],
)
def test_occupancy(target: str, registers: int, num_warps: int, shared: int, blocks: int) -> None:
    share = blocks * num_warps / machine_code.LIMITS[target].warps
    assert machine_code.occupancy(target, registers, num_warps, shared) == (blocks, share)
