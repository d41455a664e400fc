"""The GEMM in Gluon: its machine code is safe, it runs where it was asked for and can, and equals the oracle there."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import triton
from flat_operators import reference
from triton.backends.compiler import GPUTarget

from benchmarks.result_files import ROOT
from benchmarks.static_analysis import hopper_gemm as report
from benchmarks.static_analysis import machine_code, static_kernels
from dq_kernels.records import PackedWeight, Quantizer
from dq_kernels.triton import gemm, hopper_gemm, tuning
from dq_kernels.triton.launch import current_target

HOPPER, ADA = GPUTarget("cuda", 90, 32), GPUTarget("cuda", 89, 32)


@pytest.fixture(scope="module")
def committed():
    return static_kernels.read_report(report.OUTPUT)


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    # In a process of its own: here kernels may be interpreted.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    output = tmp_path_factory.mktemp("static") / "static_hopper_gemm.json"
    command = [sys.executable, "-m", "benchmarks.static_analysis.hopper_gemm", "--sample", "--output", str(output)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    return static_kernels.read_report(output)


@pytest.fixture(scope="module", params=["committed", "sample"])
def rows(request):
    return request.getfixturevalue(request.param)["rows"]


def test_report_covers_every_tile_and_epilogue(committed):
    named = [(row["block_m"], row["use"]) for row in committed["rows"]]
    assert named == [(tile.block_m, use.name) for tile, use in report.shipped()], "run its script again"


def test_report_is_what_the_compiler_says_today(committed, sample):
    if sample["triton"] != committed["triton"]:
        pytest.skip(f"the report was made by Triton {committed['triton']}, here is {sample['triton']}")
    assert [row for row in sample["rows"] if row not in committed["rows"]] == []


def test_no_register_is_touched_while_a_matrix_instruction_may_use_it(rows):
    assert [row["conflicts"] for row in rows] == [[]] * len(rows)


def test_the_products_of_two_steps_are_in_flight(rows):
    # A step has two groups, of the low and of the high nibbles: each half of the loop lets one step run. Behind the
    # loop all must be finished, and so behind an odd last step.
    assert [row["waits"] for row in rows] == [[2, 2, 0, 0]] * len(rows)
    for row in rows:  # two steps of 2 BLOCK_K channels, 32 an instruction, 64 rows of a warp group, 128 columns at most
        columns = max(1, row["block_m"] // 128)
        assert row["loop_mma"] == 2 * columns * (2 * row["block_k"] // 32) * row["block_n"] // (16 * row["num_warps"])


def test_nothing_spills_and_a_multiprocessor_holds_a_block(rows):
    assert [(row["spills"], row["stack_bytes"]) for row in rows] == [(0, 0)] * len(rows)
    assert min(row["blocks"] for row in rows) >= 1
    assert not any(row["early_accesses"] for row in rows if "early_accesses" in row)


LOOP = """
.L_x_1:
        /*0010*/                   LDSM.16.M88.4 R{first}, [R2+UR6] ;
        /*0020*/                   IGMMA.64x16x32.S8.S8 R24, R{first}, gdesc[UR8], R24 ;
        /*0030*/                   IGMMA.64x16x32.S8.S8 R24, R{second}, gdesc[UR8], R24, gsb0 ;
        /*0040*/                   WARPGROUP.DEPBAR.LE gsb0, {running} ;
        /*0050*/                   LDSM.16.M88.4 R{third}, [R2+UR6] ;
        /*0060*/                   IGMMA.64x16x32.S8.S8 R24, R{third}, gdesc[UR8], R24, gsb0 ;
        /*0070*/                   WARPGROUP.DEPBAR.LE gsb0, {running} ;
        /*0080*/               @P0 BRA `(.L_x_1) ;
        /*0090*/                   WARPGROUP.DEPBAR.LE gsb0, {left} ;
        /*00a0*/                   IADD3 R4, R31, 0x1, RZ ;
        /*00b0*/                   EXIT ;
"""
SAFE = {"first": 88, "second": 92, "third": 96, "running": "0x1", "left": "0x0"}


@pytest.mark.parametrize(
    ("changes", "written"),
    [
        ({}, set()),
        ({"third": 88}, {"LDSM.16.M88.4 R88"}),
        ({"third": 85}, {"LDSM.16.M88.4 R85", "LDSM.16.M88.4 R88"}),  # R85 to R88, R88 to R91
        ({"third": 88, "running": "0x0"}, set()),
        ({"left": "0x1"}, {"IADD3 R4"}),  # reads an accumulator
        ({"first": 22}, {"LDSM.16.M88.4 R22"}),  # writes two accumulators
    ],
    ids=["two sets", "one set", "overlapping sets", "one set and a full wait", "early read", "early write"],
)
def test_conflicts_with_running_matrix_instructions_are_found(changes, written):
    found = machine_code.in_flight_conflicts(machine_code.parse(LOOP.format(**SAFE | changes)))
    assert {conflict.split(",")[0] for conflict in found} == written, found


def test_it_is_off_unless_asked_for():
    assert not tuning.HOPPER_GEMM
    assert not tuning.uses_hopper_gemm(HOPPER)


@pytest.mark.parametrize(
    ("target", "version", "found"),
    [
        (None, "3.9.0", "no GPU and Triton 3.9.0"),
        (ADA, "3.9.0", "architecture cuda 89 and Triton 3.9.0"),
        (GPUTarget("hip", "gfx942", 64), "3.6.0", "architecture hip gfx942"),
        (HOPPER, "3.4.1", "architecture cuda 90 and Triton 3.4.1"),
        (HOPPER, "3.10.0", "Triton 3.10.0"),
    ],
)
def test_where_it_cannot_run_the_error_says_why_and_what_to_do(monkeypatch, target, version, found):
    monkeypatch.setattr(tuning, "HOPPER_GEMM", True)
    monkeypatch.setattr(triton, "__version__", version)
    with pytest.raises(
        RuntimeError, match=r"DQ_HOPPER_GEMM=1.*cuda 90.*Triton 3\.5 to 3\.9.*Unset DQ_HOPPER_GEMM"
    ) as error:
        tuning.uses_hopper_gemm(target)
    assert found in str(error.value)


@pytest.mark.parametrize("version", ["3.6.0", "3.9.0"])
def test_it_can_be_asked_for_on_hopper(monkeypatch, version):
    monkeypatch.setattr(tuning, "HOPPER_GEMM", True)
    monkeypatch.setattr(triton, "__version__", version)
    assert tuning.uses_hopper_gemm(HOPPER)


def operands(rows, channels, out_channels, batch=2, device="cpu"):
    """A linear layer with scales 1, whose results in fp32 are the integer sums, as records."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-128, 128, (batch, rows // batch, channels), dtype=torch.int8, generator=generator)
    values = torch.randint(0, 256, (out_channels, channels // 2), dtype=torch.uint8, generator=generator)
    weight = PackedWeight(values, torch.ones(out_channels), reference.unpack_int4(values).sum(1, dtype=torch.int32))
    index = torch.arange(batch, dtype=torch.int32) % 3
    zero_points = torch.tensor([-128, 3, 127], dtype=torch.int32)
    quantizer = Quantizer(torch.ones(channels), torch.ones(3), zero_points, index, 8)
    moved = [
        type(record)(*(part.to(device) if torch.is_tensor(part) else part for part in record))
        for record in (weight, quantizer)
    ]
    return x.to(device), *moved


@pytest.mark.parametrize(
    ("rows", "channels", "change", "served"),
    [
        (128, 64, {}, True),
        (128, 64, {"statistics": True}, False),
        (128, 64, {"channel_add": True}, False),
        (128, 64, {"geglu": True}, False),
        (32, 64, {}, False),  # fewer rows than a tile
        (128, 48, {}, False),  # rows of 24 bytes, which TMA cannot address
    ],
    ids=["linear", "statistics", "addend", "GEGLU", "few rows", "unaligned"],
)
def test_other_launches_are_left_to_triton(monkeypatch, rows, channels, change, served):
    launched = []

    class Kernel:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *arguments, **options: launched.append(self.name)

    monkeypatch.setattr(tuning, "HOPPER_GEMM", True)
    monkeypatch.setattr(triton, "__version__", "3.9.0")
    monkeypatch.setattr(gemm, "current_target", lambda: HOPPER)
    monkeypatch.setattr(gemm, "int4_gemm_kernel", Kernel("Triton"))
    monkeypatch.setattr(hopper_gemm, "hopper_gemm_kernel", Kernel("Gluon"))
    x, weight, quantizer = operands(rows, channels, 64)
    out = torch.empty(2, rows // 2, 64)
    tensors = {"statistics": torch.empty(2, 1, 2, 64), "channel_add": torch.empty(2, 64), "geglu": True}
    gemm.launch(x, weight, quantizer, out, gemm.Epilogue(**{name: tensors[name] for name in change}))
    assert launched == ["Gluon" if served else "Triton"]


@pytest.mark.parametrize(
    ("rows", "out_channels", "rows_per_sample", "block_m"),
    [(8192, 640, 4096, 256), (8192, 320, 4096, 128), (2048, 640, 1024, 64), (8190, 640, 4095, 128), (64, 64, 32, 64)],
)
def test_the_largest_tile_that_fills_the_multiprocessors_is_taken(rows, out_channels, rows_per_sample, block_m):
    assert hopper_gemm.tile_for(rows, out_channels, rows_per_sample).block_m == block_m


# Ragged edges of rows, channels and K, odd and even numbers of steps, and less steps than stages.
SHAPES = [(64, 64, 128, 1), (154, 320, 136, 2), (300, 640, 264, 3), (512, 1280, 256, 2), (8192, 960, 640, 2)]


@pytest.mark.cuda
@pytest.mark.parametrize("tile", hopper_gemm.TILES, ids=lambda tile: f"{tile.block_m}x{tile.block_n}")
@pytest.mark.parametrize(("rows", "channels", "out_channels", "batch"), SHAPES)
def test_results_equal_the_oracle_and_tritons_gemm(tile, rows, channels, out_channels, batch):
    if (missing := tuning.missing_for_hopper_gemm(current_target())) is not None:
        pytest.skip(missing)
    if tile == hopper_gemm.TILES[0] and rows // batch % tile.block_m:
        pytest.skip("never launched: the largest tile has rows of one sample")
    x, weight, quantizer = operands(rows, channels, out_channels, batch)
    sums = reference.module.int4_linear(x, weight, quantizer, None, None, torch.float32)
    x, weight, quantizer = operands(rows, channels, out_channels, batch, "cuda")
    y = torch.full((batch, rows // batch, out_channels), float("nan"), device="cuda")
    hopper_gemm.launch(x, weight, quantizer, y, None, None, None, tile)
    assert torch.equal(y.cpu(), sums)

    bias, addend = torch.randn(out_channels, device="cuda").half(), torch.randn(y.shape, device="cuda").half()
    quantizer = quantizer._replace(scale=torch.tensor([0.01, 0.02, 0.03], device="cuda"))
    weight = weight._replace(scale=torch.rand(out_channels, device="cuda") / 100)
    next_quantizer = quantizer._replace(dilation=1 + torch.rand(out_channels, device="cuda"))
    for residual, following, dtype in ((addend, None, torch.float16), (None, next_quantizer, torch.int8)):
        y, expected = (torch.empty(addend.shape, dtype=dtype, device="cuda") for _ in range(2))
        hopper_gemm.launch(x, weight, quantizer, y, bias, residual, following, tile)
        gemm.launch(x, weight, quantizer, expected, gemm.Epilogue(bias, residual=residual, next_quantizer=following))
        assert torch.equal(y, expected)
