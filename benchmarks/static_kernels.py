"""Compiles every Triton kernel for GPUs that need not be present, and reports what the machine code looks like.

    python benchmarks/static_kernels.py [--target sm_90]... [--output benchmarks/results/static_kernels.json]

Each kernel is compiled in each launch configuration of ``dq_kernels.tuning.CONFIGS``, specialised as SD1.5's layers
specialise it at its larger levels: pointers, channel counts and image sizes are multiples of 16. The ``loop_*``
columns look at the main loop alone: the innermost loop around a matrix instruction, or the whole kernel where there
is none. Instructions are counted here, not timed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from dq_kernels.conv2d import int4_conv2d_kernel
from dq_kernels.linear import int4_linear_kernel
from dq_kernels.quantize import BLOCK_CHANNELS, BLOCK_LENGTH, quantize_kernel
from dq_kernels.tuning import CONFIGS

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
OUTPUT = Path(__file__).parent / "results" / "static_kernels.json"
NVIDIA = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

INT8, INT32, FP16, FP32 = "*i8", "*i32", "*fp16", "*fp32"
POINTERS = {
    "x_ptr": INT8,
    "zero_rows_ptr": INT8,
    "weight_ptr": "*u8",
    "weight_scale_ptr": FP32,
    "weight_sum_ptr": INT32,
    "weight_dilation_ptr": FP32,
    "act_scale_ptr": FP32,
    "act_zero_point_ptr": INT32,
    "timestep_index_ptr": INT32,
    "bias_ptr": FP16,
    "channel_add_ptr": FP16,
    "residual_ptr": FP16,
    "out_ptr": FP16,
}
# Not a multiple of 16 even at those levels.
ODD_SIZES = ("num_timesteps",)


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel, apart from launch configuration and target."""

    kernel: Any
    name: str
    constants: dict[str, Any]


class Instruction(NamedTuple):
    """One machine instruction; ``jump`` is the index of the instruction that a branch leads to."""

    name: str
    jump: int | None


def _convolution(size: int) -> dict[str, int]:
    shape = {"KERNEL": size, "STRIDE": 1, "PAD": size // 2, "DILATION": 1}
    return {f"{name}_{axis}": value for name, value in shape.items() for axis in "HW"}


# Even K: 640 or 1280 channels. Ragged K: 320 or 960 channels. The cheapest epilogue, and the dearest.
PLAIN = {"EVEN_K": True, "TILE_IN_SAMPLE": True, "channel_add_ptr": None, "residual_ptr": None}
FULL = {"EVEN_K": False, "TILE_IN_SAMPLE": False}
GEMM_VARIANTS = (
    Variant(int4_linear_kernel, "even K", PLAIN),
    Variant(int4_linear_kernel, "ragged K, residual", FULL),
    Variant(int4_conv2d_kernel, "3x3, even K", {**PLAIN, **_convolution(3)}),
    Variant(int4_conv2d_kernel, "3x3, ragged K, addends", {**FULL, **_convolution(3)}),
    Variant(int4_conv2d_kernel, "1x1, ragged K, addends", {**FULL, "TILE_IN_SAMPLE": True, **_convolution(1)}),
)
QUANTIZE = {"BITS": 8, "BLOCK_L": BLOCK_LENGTH, "BLOCK_K": BLOCK_CHANNELS}
QUANTIZE_VARIANTS = (
    Variant(quantize_kernel, "channels last", {**QUANTIZE, "stride_k": 1}),
    Variant(quantize_kernel, "channels first", {**QUANTIZE, "stride_l": 1}),
)


def compile_variant(
    variant: Variant, target: GPUTarget, constants: dict[str, Any], options: dict[str, Any]
) -> CompiledKernel:
    """Compiles as the JIT does at a launch; of the constants, the kernel takes those that it knows."""
    names = variant.kernel.arg_names
    values = {(names.index(name),): value for name, value in (variant.constants | constants).items() if name in names}
    types = POINTERS | ({"x_ptr": FP16, "out_ptr": INT8} if variant.kernel is quantize_kernel else {})
    signature = {
        name: "constexpr" if (index,) in values else types.get(name, "i32") for index, name in enumerate(names)
    }
    attrs = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if (index,) not in values and name not in ODD_SIZES
    }
    source = ASTSource(fn=variant.kernel, signature=signature, constexprs=values, attrs=attrs)
    return triton.compile(source, target=target, options=options)


def parse(text: str) -> list[Instruction]:
    """Reads the output of nvdisasm, or AMD's assembly."""
    labels: dict[str, int] = {}
    lines: list[tuple[str, str]] = []
    for line in text.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label.group(1)] = len(lines)
        elif code := re.match(r"\s+(?:/\*\w+\*/\s+)?(?:@!?U?P\w+ +)?([A-Za-z][\w.]*)([^;]*)", line):
            lines.append((code.group(1), code.group(2)))
    targets = (re.search(r"\.L\w+", to) if re.match("BRA|s_c?branch", name) else None for name, to in lines)
    return [Instruction(name, to and labels.get(to.group())) for (name, _), to in zip(lines, targets, strict=True)]


def main_loop(instructions: list[Instruction]) -> list[Instruction]:
    """The shortest jump backwards over a matrix instruction; everything, where there is none."""
    jumps = ((to, end + 1) for end, (_, to) in enumerate(instructions) if to is not None and to <= end)
    loops = (instructions[start:end] for start, end in jumps)
    return min((loop for loop in loops if count(loop, MMA)), key=len, default=instructions)


MMA = r"I(G)?MMA|v_mfma_i32"
# From global memory, into registers or into shared memory; 16 bytes per thread, or fewer.
WIDE_LOAD = r"LDG\w*\..*128|(global|buffer)_load_dwordx4"
NARROW_LOAD = rf"(?!{WIDE_LOAD})(LDG(STS)?\b|(global|buffer)_load)"
# From registers to shared memory. Where there is an asynchronous copy, whatever does this in the loop took a detour.
SHARED_STORE = r"STSM?\b|ds_write"


def count(instructions: list[Instruction], pattern: str) -> int:
    """How many instructions have a name that begins like ``pattern``."""
    return sum(re.match(pattern, instruction.name) is not None for instruction in instructions)


def find(pattern: str, text: str) -> int:
    """The number in the first match of ``pattern``."""
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"the compiler's output has nothing like {pattern!r}; its format must have changed")
    return int(match.group(1))


def nvidia_report(kernel: CompiledKernel) -> tuple[list[Instruction], dict[str, Any]]:
    """Instructions, and what ptxas allocated."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        sass, usage = (
            subprocess.run([NVIDIA / command[0], *command[1:], cubin.name], check=True, capture_output=True, text=True)
            for command in (("nvdisasm", "-c", "-ndf"), ("cuobjdump", "--dump-resource-usage"))
        )
    spilled = find(r"STACK:(\d+)", usage.stdout) + find(r"LOCAL:(\d+)", usage.stdout)
    mma = Counter(re.findall(r"\b(?:wgmma\.mma_async|mma\.sync)[\w.]*", kernel.asm["ptx"]))
    return parse(sass.stdout), {"registers": find(r"REG:(\d+)", usage.stdout), "spill_bytes": spilled, "mma": mma}


def amd_report(kernel: CompiledKernel) -> tuple[list[Instruction], dict[str, Any]]:
    """Instructions, and what LLVM allocated."""
    text = kernel.asm["amdgcn"]
    instructions = parse(text)
    spilled = find(r"\.vgpr_spill_count:\s+(\d+)", text) + find(r"\.sgpr_spill_count:\s+(\d+)", text)
    return instructions, {
        "registers": find(r"\.vgpr_count:\s+(\d+)", text),
        "spill_bytes": 4 * spilled + find(r"\.private_segment_fixed_size:\s+(\d+)", text),
        "mma": Counter(name for name, _ in instructions if re.match(MMA, name)),
    }


def compile_row(variant: Variant, target: str, constants: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Compiles, and describes the machine code."""
    kernel = compile_variant(variant, TARGETS[target], constants, options)
    instructions, allocated = amd_report(kernel) if "amdgcn" in kernel.asm else nvidia_report(kernel)
    loop = main_loop(instructions)
    return {
        "kernel": variant.kernel.__name__.removesuffix("_kernel"),
        "variant": variant.name,
        "target": target,
        **allocated,
        "shared_bytes": kernel.metadata.shared,
        "instructions": len(instructions),
        "loop_instructions": len(loop),
        "loop_mma": count(loop, MMA),
        "loop_wide_loads": count(loop, WIDE_LOAD),
        "loop_narrow_loads": count(loop, NARROW_LOAD),
        "loop_shared_stores": count(loop, SHARED_STORE),
    }


def compile_all(targets: Sequence[str]) -> list[dict[str, Any]]:
    """Compiles all kernels for the named targets; one row per kernel, variant, launch configuration and target."""
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 replaces the compiler by the interpreter; unset it to compile kernels")
    rows = []
    for target in targets:
        for variant in GEMM_VARIANTS:
            for config in CONFIGS:
                constants = {name.upper(): value for name, value in asdict(config).items()}
                constants["PTX"] = TARGETS[target].backend == "cuda"
                options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
                rows.append(compile_row(variant, target, constants, options) | asdict(config))
        for variant in QUANTIZE_VARIANTS:
            rows.append(compile_row(variant, target, {}, {"num_warps": 4, "enable_fp_fusion": False}))
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Rows for the reader of a terminal: a launch configuration in one column, matrix instructions by mnemonic."""
    config = "{block_m}x{block_n}x{block_k}, {num_warps} warps, {num_stages} stages"
    lines = []
    for row in rows:
        cells = {name: value for name, value in row.items() if not name.startswith(("block_", "num_"))}
        cells["mma"] = ", ".join(f"{number} {name}" for name, number in row["mma"].items())
        lines.append({"config": config.format(**row) if "block_m" in row else "", **cells})
    columns = [[name, *(str(line[name]) for line in lines)] for name in lines[0]]
    widths = [max(map(len, column)) for column in columns]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in zip(*columns, strict=True))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", choices=TARGETS, help="may be repeated; all of them by default")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where the JSON goes (default: %(default)s)")
    arguments = parser.parse_args()
    rows = compile_all(arguments.target or list(TARGETS))
    print(table(rows))
    document = {"triton": triton.__version__, "date": datetime.date.today().isoformat(), "rows": rows}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
