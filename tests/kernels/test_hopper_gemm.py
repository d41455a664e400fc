"""The GEMM in Gluon: its machine code is safe, it runs where it was asked for and can, and equals the oracle there."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pytest
import torch
import triton
from flat_operators import reference
from ptx_machine import Block, TensorMap
from triton.backends.compiler import GPUTarget

from benchmarks.result_files import ROOT
from benchmarks.static_analysis import hopper_gemm as report
from benchmarks.static_analysis import machine_code
from benchmarks.static_analysis.static_report import read_report
from dq_kernels.packing import pack_int4
from dq_kernels.records import PackedWeight, Quantizer
from dq_kernels.triton import gemm, hopper_gemm, tuning
from dq_kernels.triton.launch import current_target

HOPPER, ADA = GPUTarget("cuda", 90, 32), GPUTarget("cuda", 89, 32)


@pytest.fixture(scope="module")
def committed():
    return read_report(report.OUTPUT)


# The command line, which also writes the PTX of the sample.
COMPILE_SAMPLE = """
import sys
from pathlib import Path
from benchmarks.static_analysis import hopper_gemm
hopper_gemm.main()
for number, job in enumerate(hopper_gemm.SAMPLE):
    Path(sys.argv[-1]).with_name(f"{number}.ptx").write_text(hopper_gemm.compiled(*job).asm["ptx"])
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The folder of the compiled sample."""
    # In a process of its own: here kernels may be interpreted.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    folder = tmp_path_factory.mktemp("static")
    command = [sys.executable, "-c", COMPILE_SAMPLE, "--sample", "--output", str(folder / "report.json")]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def sample(compiled):
    return read_report(compiled / "report.json")


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


class Layer(NamedTuple):
    """A linear layer for ``hopper_gemm.launch``.

    Its scales are powers of two, and the numbers small: fp32 holds every step of the epilogue exactly.
    """

    x: torch.Tensor
    weight: PackedWeight
    quantizer: Quantizer
    bias: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    following: Quantizer | None = None

    @property
    def expected(self):
        """The oracle's result: fp32 if there is neither bias nor residual, which are in fp16."""
        dtype = torch.float32 if self.bias is None else torch.float16
        return reference.module.int4_linear(*self[:5], dtype, self.following)

    def to(self, device):
        def moved(part):
            if isinstance(part, tuple):
                return type(part)(*map(moved, part))
            return part.to(device) if torch.is_tensor(part) else part

        return Layer(*map(moved, self))


def layer(rows, channels, out_channels, batch, epilogue="plain"):
    generator = torch.Generator().manual_seed(0)

    def integers(low, high, *shape, dtype=torch.int32):
        return torch.randint(low, high, shape, generator=generator, dtype=dtype)

    x = integers(-128, 128, batch, rows // batch, channels, dtype=torch.int8)
    values = integers(-8, 8, out_channels, channels, dtype=torch.int8)
    index, zero_points = torch.arange(batch, dtype=torch.int32) % 3, torch.tensor([-128, 3, 127], dtype=torch.int32)
    scale, weight_scale = torch.ones(3), torch.ones(out_channels)
    if epilogue != "plain":
        scale, weight_scale = torch.tensor([2.0**-5, 2.0**-6, 2.0**-7]), 2.0 ** -integers(4, 6, out_channels)
    sums = values.sum(1, dtype=torch.int32)
    plain = Layer(
        x,
        PackedWeight(pack_int4(values), weight_scale, sums),
        Quantizer(torch.ones(channels), scale, zero_points, index, 8),
    )
    if epilogue == "plain":
        return plain
    bias = integers(-64, 64, out_channels).half() / 8
    if epilogue == "residual":
        return plain._replace(bias=bias, residual=integers(-64, 64, *x.shape[:-1], out_channels).half() / 8)
    following = Quantizer(
        2.0 ** integers(0, 2, out_channels),
        torch.tensor([1.0, 2.0, 4.0]),
        torch.tensor([5, -9, 0], dtype=torch.int32),
        index,
        8,
    )
    return plain._replace(bias=bias, following=following)


def emulated(ptx, tile, problem):
    """The result of the compiled kernel on the CPU."""
    x, weight, quantizer, bias, residual, following = problem
    rows, half, out_channels = x.numel() // x.shape[-1], x.shape[-1] // 2, len(weight.values)
    out = torch.full_like(problem.expected, 77)
    halves = x.view(rows, 2, half).transpose(0, 1).numpy().view(np.uint8)
    arguments = {
        "x_desc": TensorMap(halves, (2, tile.block_m, tile.block_k), tile.block_k),
        "weight_desc": TensorMap(weight.values.numpy(), (tile.block_n, tile.block_k), tile.block_k),
        "weight_sum_ptr": weight.sum,
        "weight_scale_ptr": weight.scale,
        "act_scale_ptr": quantizer.scale,
        "act_zero_point_ptr": quantizer.zero_point,
        "timestep_index_ptr": quantizer.timestep_index,
        "bias_ptr": bias,
        "residual_ptr": residual,
        "next_dilation_ptr": following and following.dilation,
        "next_scale_ptr": following and following.scale,
        "next_zero_point_ptr": following and following.zero_point,
        "out_ptr": out,
        "num_rows": rows,
        "rows_per_sample": rows // len(x),
        "num_timesteps": len(quantizer.scale),
        "out_channels": out_channels,
        "half_channels": half,
    }
    parameters, position = {}, 0
    for value in (arguments.get(name) for name in hopper_gemm.hopper_gemm_kernel.arg_names):
        if value is not None:
            parameters[position] = value.view(-1).view(torch.uint8).numpy() if torch.is_tensor(value) else value
            # The sizes and strides of a tensor follow its map.
            position += 1 + (2 * value.data.ndim if isinstance(value, TensorMap) else 0)
    for number in range(-(-rows // tile.block_m) * -(-out_channels // tile.block_n)):
        Block(ptx, parameters, number, 32 * tile.num_warps).run()
    return out


# Odd and even numbers of steps, more and less than stages; ragged K, rows and channels.
@pytest.mark.parametrize(
    ("number", "problem"),
    [
        (0, ("residual", 154, 320, 144, 2)),
        (1, ("quantized", 128, 576, 144, 2)),
        (2, ("plain", 128, 64, 16, 2)),
        (2, ("plain", 128, 512, 144, 2)),
        (2, ("plain", 64, 1312, 128, 1)),
    ],
    ids=str,
)
def test_compiled_kernels_equal_the_oracle_at_the_worst_timing(compiled, number, problem):
    epilogue, *sizes = problem
    problem = layer(*sizes, epilogue)
    ptx = (compiled / f"{number}.ptx").read_text()
    assert torch.equal(emulated(ptx, report.SAMPLE[number][0], problem), problem.expected)


def test_the_worst_timing_shows_an_operand_that_is_overwritten_too_early(compiled):
    ptx, wait = (compiled / "2.ptx").read_text(), "wgmma.wait_group.sync.aligned 2"
    assert ptx.count(wait) == 2
    problem = layer(64, 1312, 128, 1)
    early = emulated(ptx.replace(wait, wait[:-1] + "4"), hopper_gemm.TILES[2], problem)
    assert not torch.equal(early, problem.expected)


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
    x, weight, quantizer, *_ = layer(rows, channels, 64, 2)
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


ON_A_DEVICE = [
    ("plain", 64, 64, 128, 1),
    ("residual", 154, 320, 136, 2),
    ("quantized", 300, 640, 264, 3),
    ("plain", 512, 1280, 256, 2),
    ("residual", 8192, 960, 640, 2),
]


@pytest.mark.cuda
@pytest.mark.parametrize("tile", hopper_gemm.TILES, ids=lambda tile: f"{tile.block_m}x{tile.block_n}")
@pytest.mark.parametrize("problem", ON_A_DEVICE, ids=str)
def test_results_on_a_device_equal_the_oracle(tile, problem):
    if (missing := tuning.missing_for_hopper_gemm(current_target())) is not None:
        pytest.skip(missing)
    epilogue, *sizes = problem
    rows, *_, batch = sizes
    if tile == hopper_gemm.TILES[0] and rows // batch % tile.block_m:
        pytest.skip("never launched: the largest tile has rows of one sample")
    problem = layer(*sizes, epilogue)
    expected = problem.expected
    x, weight, quantizer, bias, residual, following = problem.to("cuda")
    out = torch.full_like(expected, 77, device="cuda")
    hopper_gemm.launch(x, weight, quantizer, out, bias, residual, following, tile)
    assert torch.equal(out.cpu(), expected)
