"""Compiles every Triton kernel for GPUs that need not be present, and reports what the machine code looks like.

    python benchmarks/static_kernels.py [--target sm_90]... [--output benchmarks/results/static_kernels.json]

Each kernel is compiled in each launch configuration of ``dq_kernels.tuning.CONFIGS``, specialised as SD1.5's layers
specialise it: pointers, channel counts and image sizes are multiples of 16. What the report says about time is only
what instructions can say; speed is measured elsewhere, on a GPU.

``loop_*`` columns look at the main loop alone: the innermost loop with a matrix instruction in it.
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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from dq_kernels.conv2d import int4_conv2d_kernel
from dq_kernels.linear import int4_linear_kernel
from dq_kernels.quantize import BLOCK_CHANNELS, BLOCK_LENGTH, quantize_kernel
from dq_kernels.tuning import CONFIGS, LaunchConfig

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
OUTPUT = Path(__file__).parent / "results" / "static_kernels.json"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

POINTERS = {
    "x_ptr": "*i8",
    "weight_ptr": "*u8",
    "weight_scale_ptr": "*fp32",
    "weight_sum_ptr": "*i32",
    "weight_dilation_ptr": "*fp32",
    "act_scale_ptr": "*fp32",
    "act_zero_point_ptr": "*i32",
    "timestep_index_ptr": "*i32",
    "bias_ptr": "*fp16",
    "channel_add_ptr": "*fp16",
    "residual_ptr": "*fp16",
    "out_ptr": "*fp16",
}
# Integers that Triton cannot take for multiples of 16 in SD1.5; it can all the others.
ODD_SIZES = ("batch", "num_timesteps")


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel, apart from launch configuration and target."""

    kernel: Any
    name: str
    constants: dict[str, Any]
    pointers: dict[str, str] = field(default_factory=dict)


class Instruction(NamedTuple):
    """One machine instruction; ``jump`` is the index of the instruction that a branch leads to."""

    name: str
    operands: str
    jump: int | None


def _convolution(size: int) -> dict[str, int]:
    shape = {"KERNEL": size, "STRIDE": 1, "PAD": size // 2, "DILATION": 1}
    return {f"{name}_{axis}": value for name, value in shape.items() for axis in "HW"}


# An even K: 640 or 1280 channels, without addends. A ragged K: 320 or 960 channels, with all of them.
GEMM_VARIANTS = (
    Variant(int4_linear_kernel, "even K", {"EVEN_K": True, "residual_ptr": None}),
    Variant(int4_linear_kernel, "ragged K, residual", {"EVEN_K": False}),
    Variant(
        int4_conv2d_kernel,
        "3x3, even K",
        {"EVEN_K": True, "channel_add_ptr": None, "residual_ptr": None, **_convolution(3)},
    ),
    Variant(int4_conv2d_kernel, "3x3, ragged K, addends", {"EVEN_K": False, **_convolution(3)}),
    Variant(int4_conv2d_kernel, "1x1, ragged K, addends", {"EVEN_K": False, **_convolution(1)}),
)
_QUANTIZE = {"BITS": 8, "BLOCK_L": BLOCK_LENGTH, "BLOCK_K": BLOCK_CHANNELS}
_QUANTIZE_POINTERS = {"x_ptr": "*fp16", "out_ptr": "*i8"}
QUANTIZE_VARIANTS = (
    Variant(quantize_kernel, "channels last", {"stride_k": 1, **_QUANTIZE}, _QUANTIZE_POINTERS),
    Variant(quantize_kernel, "channels first", {"stride_l": 1, **_QUANTIZE}, _QUANTIZE_POINTERS),
)


def compile_variant(
    variant: Variant, target: GPUTarget, constants: dict[str, Any], options: dict[str, Any]
) -> CompiledKernel:
    """Compiles as the JIT would at a launch: ``constants`` join the variant's own."""
    names = variant.kernel.arg_names
    constants = variant.constants | {name: value for name, value in constants.items() if name in names}
    types = POINTERS | variant.pointers
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    attrs = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if name not in constants and name not in ODD_SIZES
    }
    source = ASTSource(
        fn=variant.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=attrs,
    )
    return triton.compile(source, target=target, options=options)


def sass_instructions(text: str) -> list[Instruction]:
    """Parses ``cuobjdump -sass``."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)([^;]*);", text, re.MULTILINE)
    index = {int(address, 16): i for i, (address, _, _) in enumerate(lines)}

    def jump(name: str, operands: str) -> int | None:
        to = re.search(r"\b0x([0-9a-f]+)", operands) if name.startswith("BRA") else None
        return index.get(int(to.group(1), 16)) if to else None

    return [Instruction(name, operands, jump(name, operands)) for _, name, operands in lines]


def amdgcn_instructions(text: str) -> list[Instruction]:
    """Parses AMD's assembly."""
    labels: dict[str, int] = {}
    lines: list[tuple[str, str]] = []
    for line in text.splitlines():
        if label := re.match(r"(\.?L\w+):", line):
            labels[label.group(1)] = len(lines)
        elif instruction := re.match(r"\s+([a-z]+_\w+)\s*([^;]*)", line):
            lines.append((instruction.group(1), instruction.group(2).strip()))
    return [Instruction(name, to, labels.get(to) if "branch" in name else None) for name, to in lines]


def main_loop(instructions: list[Instruction]) -> list[Instruction]:
    """The shortest backward jump around a matrix instruction; empty where there is none."""
    loops = (
        instructions[i.jump : end + 1] for end, i in enumerate(instructions) if i.jump is not None and i.jump <= end
    )
    return min((loop for loop in loops if any(map(is_mma, loop))), key=len, default=[])


def is_mma(instruction: Instruction) -> bool:
    """Whether it is an integer matrix instruction."""
    return re.match(r"IMMA|IGMMA|v_mfma_i32", instruction.name) is not None


def is_global_load(instruction: Instruction) -> bool:
    """Whether it reads global memory, into registers or into shared memory."""
    return re.match(r"LDG(STS)?\b|(global|buffer)_load", instruction.name) is not None


def is_wide(load: Instruction) -> bool:
    """Whether each thread reads 16 bytes."""
    return re.search(r"\.128|dwordx4", load.name) is not None


def is_shared_store(instruction: Instruction) -> bool:
    """Whether registers go to shared memory: such data took a detour, unless the GPU has no asynchronous copy."""
    return re.match(r"STSM?\b|ds_write", instruction.name) is not None


def nvidia_report(kernel: CompiledKernel) -> tuple[list[Instruction], dict[str, Any]]:
    """Instructions, and what ptxas allocated."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        sass, usage = (
            subprocess.run([CUOBJDUMP, option, cubin.name], check=True, capture_output=True, text=True).stdout
            for option in ("-sass", "--dump-resource-usage")
        )
    registers, stack, local = (int(n) for n in re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage).groups())
    mma = re.findall(r"\b(?:wgmma\.mma_async|mma\.sync)[\w.]*", kernel.asm["ptx"])
    return sass_instructions(sass), {
        "registers": registers,
        "spilled_registers": 0,
        "stack_bytes": stack + local,
        "mma": dict(Counter(mma)),
    }


def amd_report(kernel: CompiledKernel) -> tuple[list[Instruction], dict[str, Any]]:
    """Instructions, and what LLVM allocated."""
    text = kernel.asm["amdgcn"]

    def metadata(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text).group(1))

    instructions = amdgcn_instructions(text)
    return instructions, {
        "registers": metadata("vgpr_count"),
        "spilled_registers": metadata("vgpr_spill_count") + metadata("sgpr_spill_count"),
        "stack_bytes": metadata("private_segment_fixed_size"),
        "mma": dict(Counter(i.name for i in instructions if is_mma(i))),
    }


def report(kernel: CompiledKernel, target: GPUTarget) -> dict[str, Any]:
    """The columns that describe machine code."""
    instructions, row = amd_report(kernel) if target.backend == "hip" else nvidia_report(kernel)
    loop = main_loop(instructions)
    loads = [i for i in loop if is_global_load(i)]
    return row | {
        "shared_bytes": kernel.metadata.shared,
        "instructions": len(instructions),
        "wide_loads": sum(is_global_load(i) and is_wide(i) for i in instructions),
        "loop_instructions": len(loop),
        "loop_mma": sum(map(is_mma, loop)),
        "loop_wide_loads": sum(map(is_wide, loads)),
        "loop_narrow_loads": len(loads) - sum(map(is_wide, loads)),
        "loop_shared_stores": sum(map(is_shared_store, loop)),
    }


def gemm_rows(variant: Variant, config: LaunchConfig, target: GPUTarget) -> dict[str, Any]:
    """One row: a GEMM-shaped kernel in one launch configuration."""
    constants = {name.upper(): getattr(config, name) for name in ("block_m", "block_n", "block_k")}
    constants["PTX"] = target.backend == "cuda"
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return vars(config) | report(compile_variant(variant, target, constants, options), target)


def compile_rows(target: GPUTarget) -> Iterator[tuple[Variant, dict[str, Any]]]:
    """All rows of one target."""
    for variant in GEMM_VARIANTS:
        for config in CONFIGS:
            yield variant, gemm_rows(variant, config, target)
    for variant in QUANTIZE_VARIANTS:
        options = {"num_warps": 4, "enable_fp_fusion": False}
        yield variant, {"num_warps": 4} | report(compile_variant(variant, target, {}, options), target)


def compile_all(targets: Sequence[str]) -> list[dict[str, Any]]:
    """Compiles all kernels for the named targets; one row per kernel, variant, launch configuration and target."""
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 replaces the compiler by the interpreter; unset it to compile kernels")
    return [
        {"kernel": variant.kernel.__name__, "variant": variant.name, "target": name} | row
        for name in targets
        for variant, row in compile_rows(TARGETS[name])
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Rows for the reader of a terminal."""
    header = ("kernel", "variant", "target", "tile", "warps x stages", "registers", "spilled", "stack B", "shared B")
    header += ("matrix instructions", "loop instr.", "mma", "16 B loads", "narrow", "shared stores")
    lines = [header]
    for row in rows:
        gemm = "block_m" in row
        lines.append(
            (
                row["kernel"].removesuffix("_kernel"),
                row["variant"],
                row["target"],
                "{block_m}x{block_n}x{block_k}".format(**row) if gemm else "",
                "{num_warps}x{num_stages}".format(**row) if gemm else str(row["num_warps"]),
                *(str(row[name]) for name in ("registers", "spilled_registers", "stack_bytes", "shared_bytes")),
                ", ".join(f"{count} {name}" for name, count in row["mma"].items()),
                *(
                    str(row[f"loop_{name}"])
                    for name in ("instructions", "mma", "wide_loads", "narrow_loads", "shared_stores")
                ),
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


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
