"""Compiles the Hopper GEMM without a GPU, in all its tiles and epilogues, and checks its registers.

    python -m benchmarks.static_analysis.hopper_gemm [--sample] [--output FILE]

The columns are those of ``static_kernels``, and: ``waits``, how many groups of matrix instructions the waits leave
running, 2 in the loop (the products of a step) and 0 behind it; ``conflicts``, the uses of registers while a matrix
instruction may still read or write them (``machine_code.in_flight_conflicts``). ``--sample`` compiles
three of them.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.compiler import CompiledKernel
from triton.experimental.gluon._runtime import GluonASTSource

from benchmarks.command_line import new_parser
from benchmarks.result_files import RESULTS
from benchmarks.static_analysis import machine_code
from benchmarks.static_analysis.kernel_uses import FP16, FP32, INT8, NEXT, TARGETS, TYPES
from benchmarks.static_analysis.static_report import Row, describe, write
from dq_kernels.triton import hopper_gemm
from dq_kernels.triton.tuning import LaunchConfig

TARGET = "sm_90"
OUTPUT = RESULTS / "static_hopper_gemm.json"


@dataclass(frozen=True)
class Use:
    """An epilogue: the pointers that are None, the result's type, and whether a tile has rows of several samples."""

    name: str
    absent: tuple[str, ...]
    out: str = FP16
    across: bool = False


RESIDUAL = Use("bias, residual", NEXT)
ACROSS = Use("bias, residual, across samples", NEXT, across=True)
QUANTIZED = Use("bias, quantized", ("residual_ptr",), INT8)
PLAIN = Use("plain, fp32", ("bias_ptr", "residual_ptr", *NEXT), FP32)
USES = (RESIDUAL, ACROSS, QUANTIZED, PLAIN)
# Few of the jobs, for the tests.
SAMPLE = ((hopper_gemm.TILES[1], ACROSS), (hopper_gemm.TILES[2], QUANTIZED), (hopper_gemm.TILES[2], PLAIN))


def compiled(tile: LaunchConfig, use: Use) -> CompiledKernel:
    """The kernel with SD1.5's specialisation: addresses and channels are multiples of 16, numbers of rows are not."""
    x_layout, weight_layout = hopper_gemm.layouts(tile)
    kernel = hopper_gemm.hopper_gemm_kernel
    constants: dict[str, Any] = dict.fromkeys(use.absent)
    constants |= {"NEXT_BITS": 8, "TILE_IN_SAMPLE": not use.across, "PDL": True}
    constants |= {"STAGES": tile.num_stages, "num_warps": tile.num_warps}
    types = TYPES | {
        "x_desc": f"tensordesc<i8{[2, tile.block_m, tile.block_k]},{x_layout!r}>",
        "weight_desc": f"tensordesc<u8{[tile.block_n, tile.block_k]},{weight_layout!r}>",
        "out_ptr": use.out,
    }
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    divisible = (
        parameter.name
        for parameter in kernel.params
        if signature[parameter.name][0] in "*i" and not parameter.do_not_specialize
    )
    source = GluonASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    options = {"num_warps": tile.num_warps, "enable_fp_fusion": True, "launch_pdl": True}
    return triton.compile(source, target=TARGETS[TARGET], options=options)


def shipped() -> list[tuple[LaunchConfig, Use]]:
    """All that can be launched: the largest tile never has rows of several samples."""
    return [
        (tile, use) for tile in hopper_gemm.TILES for use in USES if not (use.across and tile == hopper_gemm.TILES[0])
    ]


def row(tile: LaunchConfig, use: Use) -> Row:
    """The properties of one compiled kernel."""
    kernel = compiled(tile, use)
    instructions, _ = machine_code.read_nvidia(kernel.asm)
    columns, _ = describe(TARGET, kernel)
    waits = [line.operands for line in instructions if re.match(machine_code.WGMMA_WAIT, line.name)]
    return {
        **asdict(tile),
        "use": use.name,
        **columns,
        "waits": [int(wait.split(",")[1], 16) for wait in waits],
        "conflicts": machine_code.in_flight_conflicts(instructions),
    }


def main() -> None:
    """Runs the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--sample", action="store_true", help="compile each tile once, like the tests")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the JSON file (default: %(default)s)")
    arguments = parser.parse_args()
    rows = [row(tile, use) for tile, use in (SAMPLE if arguments.sample else shipped())]
    for each in rows:
        names = ("use", "registers", "spills", "shared_bytes", "blocks", "loop_instructions", "loop_mma", "waits")
        numbers = ", ".join(f"{name} {each[name]}" for name in names)
        print(f"{each['block_m']}x{each['block_n']}x{each['block_k']}: {numbers}, conflicts {len(each['conflicts'])}")
    write(rows, arguments.output)


if __name__ == "__main__":
    main()
