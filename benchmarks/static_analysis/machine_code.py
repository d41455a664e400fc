"""Reads machine code of GPU kernels: instructions, the main loop, allocated resources, and occupancy.

NVIDIA's SASS comes from ``nvdisasm`` and ``cuobjdump``, which Triton ships. AMD's assembly comes from the compiler. The
list of kernels is in ``kernel_uses``.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import triton

NVIDIA = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

MMA = r"I(G)?MMA|UTCIMMA|v_mfma_i32"
LOCAL_MEMORY = r"(STL|LDL)\b|scratch_"
# Registers to shared memory. With asynchronous copies, such a store in the loop is an avoidable round trip.
SHARED_STORE = r"(STS|STSM)\b|ds_write"
# A warp waits for other warps, for copies or for a matrix instruction.
WAIT = r"BAR\b|DEPBAR|WARPGROUP\.DEPBAR|WARPSYNC|s_barrier|SYNCS\.PHASECHK"
# The asynchronous int8 matrix instruction of Hopper, and a warp group's wait for its own.
WGMMA = "IGMMA"
WGMMA_WAIT = r"WARPGROUP\.DEPBAR"
INTEGER = (
    r"(IADD|IMAD|IABS|IMNMX|ISETP|ISCADD|LOP|PLOP|SHF|LEA|PRMT|SEL|SGXT|VIADD|VIMNMX|BMSK|MOV)|"
    r"v_(add|sub|mul|mad|lsh|ash|and|or|xor|not|perm|bfe|bfi|align|cndmask|cmp|mov)"
)
# With programmatic dependent launch: a kernel waits for the previous one, and what it may do before.
PREVIOUS_KERNEL_WAIT = r"ACQBULK\b"
PREFETCH = r"CCTL\S*\.PF2\b"
GLOBAL_ACCESS = r"(LD|ST|ATOM|RED)G?(STS)?\b"
GLOBAL_LOAD = r"LDG(STS)?\b|(global|buffer)_load"
LOAD_BYTES = (
    (r"\.128|dwordx4", 16),
    (r"dwordx3", 12),
    (r"\.64\b|dwordx2", 8),
    (r"dword|lds_dword", 4),
    (r"\.[US]16|short", 2),
    (r"\.[US]8|byte", 1),
)
NIBBLE_MASK = "0xf0f0f0f0"
NIBBLE_SHIFT = r"SHF\.L\S*\s+\S+\s+\S+\s+0x4\b|IMAD\.SHL\S*\s+\S+\s+\S+\s+0x10\b"


class Instruction(NamedTuple):
    """One machine instruction; ``jump`` is the index of a branch's target; with a predicate it may not be executed."""

    name: str
    operands: str
    jump: int | None
    has_predicate: bool = False


def parse(text: str) -> list[Instruction]:
    """Parses the output of nvdisasm, or AMD's assembly."""
    labels: dict[str, int] = {}
    lines: list[tuple[str, str, bool]] = []
    for line in text.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label.group(1)] = len(lines)
        elif code := re.match(r"\s+(?:/\*\w+\*/\s+)?(@!?U?P\w+ +)?([A-Za-z][\w.]*)([^;]*)", line):
            lines.append((code.group(2), code.group(3), code.group(1) is not None))
    targets = (re.search(r"\.L\w+", to) if re.match("BRA|s_c?branch", name) else None for name, to, _ in lines)
    return [
        Instruction(name, operands, to and labels.get(to.group()), has_predicate)
        for (name, operands, has_predicate), to in zip(lines, targets, strict=True)
    ]


def main_loop(instructions: list[Instruction]) -> list[Instruction]:
    """The shortest loop with a matrix instruction; all instructions if there is none."""
    jumps = ((line.jump, end + 1) for end, line in enumerate(instructions) if line.jump is not None)
    loops = (instructions[start:end] for start, end in jumps if start < end)
    return min((loop for loop in loops if count(loop, MMA)), key=len, default=instructions)


def before_wait(instructions: list[Instruction]) -> list[Instruction]:
    """The instructions before the wait for the previous kernel; none if there is no such wait."""
    waits = (i for i, line in enumerate(instructions) if re.match(PREVIOUS_KERNEL_WAIT, line.name))
    return instructions[: next(waits, 0)]


def count(instructions: list[Instruction], pattern: str) -> int:
    """The number of instructions whose name starts with ``pattern``."""
    return sum(re.match(pattern, instruction.name) is not None for instruction in instructions)


def multiply_adds(instructions: list[Instruction]) -> int:
    """int8 multiply-adds of the matrix instructions, per warp or warp group; 0 if the names have no shape."""
    shapes = (re.search(r"(\d+)x(\d+)x(\d+)|\.(16)(8)(\d\d)", line.name) for line in instructions)
    total = 0
    for line, shape in zip(instructions, shapes, strict=True):
        if shape and re.match(MMA, line.name):
            m, n, k = (int(size) for size in shape.groups() if size)
            total += m * n * k
    return total


def global_loads(instructions: list[Instruction]) -> dict[int, int]:
    """Loads from global memory to registers or shared memory: bytes per thread -> number of loads."""
    names = (line.name for line in instructions if re.match(GLOBAL_LOAD, line.name))
    widths = (next((size for pattern, size in LOAD_BYTES if re.search(pattern, name)), 4) for name in names)
    return dict(sorted(Counter(widths).items(), reverse=True))


def nibble_instructions(instructions: list[Instruction]) -> int:
    """SASS instructions that unpack nibbles: masks with 0xf0f0f0f0, and shifts by 4 whose result such a mask reads.

    The three PTX instructions of ``packing.unpack_int4_x16`` (one shift, two masks, for four packed bytes of a thread)
    compile to these. The constant appears nowhere else in the kernels. A shift counts only if a mask reads its result,
    since shifts also compute addresses.
    """
    total, shifted = 0, set()
    for line in instructions:
        text = f"{line.name} {line.operands}"
        registers = re.findall(r"\bU?R\d+\b", line.operands)
        if line.name.startswith("LOP3") and NIBBLE_MASK in line.operands:
            total += 1 + (registers[1] in shifted)
        if registers:
            shifted.discard(registers[0])
            if re.match(NIBBLE_SHIFT, text):
                shifted.add(registers[0])
    return total


def in_flight_conflicts(instructions: list[Instruction]) -> list[str]:
    """Uses of registers while one of Hopper's asynchronous matrix instructions may still read or write them.

    While an IGMMA may run, no instruction may write its operand A or touch its accumulators. Other IGMMAs may: they
    accumulate in order.
    """
    conflicts = []
    for start, line in enumerate(instructions):
        if not line.name.startswith(WGMMA):
            continue
        registers = re.match(r"\s+R(\d+), (?:R(\d+), )?gdesc", line.operands)
        assert registers is not None, line
        first, width = int(registers.group(1)), int(line.name.split("x")[1]) // 2
        accumulators = set(range(first, first + width))
        operand_a = set(range(int(registers.group(2)), int(registers.group(2)) + 4)) if registers.group(2) else set()
        for other in (instructions[index] for index in in_flight(instructions, start)):
            used = {int(number) for number in re.findall(r"\bR(\d+)", other.operands)} | written(other)
            if not other.name.startswith(WGMMA) and (written(other) & operand_a or used & accumulators):
                conflicts.append(f"{other.name}{other.operands} while {line.name}{line.operands} may run")
    return conflicts


def in_flight(instructions: list[Instruction], start: int) -> set[int]:
    """The instructions, on all paths, that are executed while the IGMMA at ``start`` may run.

    An IGMMA with ``gsb0`` closes a group. A ``WARPGROUP.DEPBAR.LE gsb0, n`` waits for all groups but the n last.
    """
    # Indices, with the number of groups closed after that of the IGMMA: -1 while its own is open.
    paths, seen = [(start + 1, 0 if "gsb0" in instructions[start].operands else -1)], set[tuple[int, int]]()
    while paths:
        index, later = paths.pop()
        line = instructions[index]
        wait = re.match(r"\s+gsb0, (\w+)", line.operands) if re.match(WGMMA_WAIT, line.name) else None
        if (index, later) in seen or (wait and later >= int(wait.group(1), 16)):
            continue
        seen.add((index, later))
        if line.name.startswith(WGMMA) and "gsb0" in line.operands:
            later = min(later + 1, 7)  # no wait lets more groups run
        if line.jump is not None:
            paths.append((line.jump, later))
        # A branch depends on a predicate in front of it or among its operands.
        is_conditional = line.has_predicate or "P" in line.operands.split("`")[0]
        if is_conditional or not re.match("BRA|EXIT", line.name):
            paths.append((index + 1, later))
    return {index for index, _ in seen}


def written(instruction: Instruction) -> set[int]:
    """The registers that a SASS instruction may write: its first operand and, if it is wide, those that follow."""
    destination = re.match(r"\s+(?:U?P\w+, )?R(\d+)\b", instruction.operands)
    if destination is None or re.match(r"(ST|STS|STG|STL|STSM|RED|BAR|SYNCS|R2UR)\b", instruction.name):
        return set()
    first = int(destination.group(1))
    if re.search(r"\.128\b|\.MT?88\.4\b", instruction.name):
        return set(range(first, first + 4))
    return set(range(first, first + 2)) if re.search(r"\.(WIDE|64|MT?88\.2)\b|^CS2R", instruction.name) else {first}


class Allocation(NamedTuple):
    """The resources of one thread; ``spills`` are the instructions that access local memory."""

    registers: int
    spills: int
    stack_bytes: int
    mma: dict[str, int]


def read_nvidia(asm: dict[str, Any]) -> tuple[list[Instruction], Allocation]:
    """Instructions and allocation of a compiled kernel's cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(asm["cubin"])
        cubin.flush()
        sass, usage = (
            subprocess.run([NVIDIA / command[0], *command[1:], cubin.name], check=True, capture_output=True, text=True)
            for command in (("nvdisasm", "-c", "-ndf"), ("cuobjdump", "--dump-resource-usage"))
        )
    instructions = parse(sass.stdout)
    stack = _find(r"STACK:(\d+)", usage.stdout) + _find(r"LOCAL:(\d+)", usage.stdout)
    mma = Counter(re.findall(r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\.[\w.:]*", asm["ptx"]))
    return instructions, Allocation(
        _find(r"REG:(\d+)", usage.stdout), count(instructions, LOCAL_MEMORY), stack, dict(sorted(mma.items()))
    )


def read_amd(asm: dict[str, Any]) -> tuple[list[Instruction], Allocation]:
    """Instructions and allocation of a compiled kernel's assembly; registers are VGPRs, AGPRs among them."""
    text = asm["amdgcn"]
    instructions = parse(text)
    spills = _find(r"\.vgpr_spill_count:\s+(\d+)", text) + _find(r"\.sgpr_spill_count:\s+(\d+)", text)
    stack = _find(r"\.private_segment_fixed_size:\s+(\d+)", text)
    mma = Counter(line.name for line in instructions if re.match(MMA, line.name))
    return instructions, Allocation(_find(r"TotalNumVgprs: (\d+)", text), spills, stack, dict(sorted(mma.items())))


def _find(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"the compiler's output has nothing like {pattern!r}; its format must have changed")
    return int(match.group(1))


@dataclass(frozen=True)
class Limits:
    """The limits of one multiprocessor (AMD: compute unit), memory in bytes; ``registers`` of all threads together."""

    warps: int
    blocks: int
    shared: int
    shared_per_block: int
    registers: int = 65536
    warp_size: int = 32
    register_unit: int = 256  # allocation unit of a warp's registers
    warp_unit: int = 4  # allocation unit of warps, one per scheduler
    reserved: int = 1024  # shared memory that the system reserves per block


KIB = 1024
# NVIDIA: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; the units are those of the
# occupancy calculator. AMD: "MI300 instruction set architecture" (CDNA 3): 4 SIMDs of 8 waves and 512 x 64 VGPRs.
LIMITS = {
    "sm_80": Limits(64, 32, 164 * KIB, 163 * KIB),
    "sm_86": Limits(48, 16, 100 * KIB, 99 * KIB),
    "sm_89": Limits(48, 24, 100 * KIB, 99 * KIB),
    "sm_90": Limits(64, 32, 228 * KIB, 227 * KIB),
    "sm_100": Limits(64, 32, 228 * KIB, 227 * KIB),
    "gfx942": Limits(32, 32, 64 * KIB, 64 * KIB, 4 * 512 * 64, warp_size=64, register_unit=512, reserved=0),
}
TENSOR_MEMORY_COLUMNS = 512  # per multiprocessor of sm_100


def occupancy(target: str, registers: int, num_warps: int, shared: int, tensor_columns: int = 0) -> tuple[int, float]:
    """The number of resident blocks per multiprocessor, and their share of the maximum number of warps."""
    limits = LIMITS[target]
    warp_registers = triton.cdiv(registers * limits.warp_size, limits.register_unit) * limits.register_unit
    warps = min(limits.warps, limits.registers // warp_registers // limits.warp_unit * limits.warp_unit)
    blocks = min(limits.blocks, warps // num_warps)
    if shared + limits.reserved:
        blocks = min(blocks, limits.shared // (triton.cdiv(shared + limits.reserved, 128) * 128))
    if tensor_columns:
        blocks = min(blocks, TENSOR_MEMORY_COLUMNS // tensor_columns)
    return blocks, blocks * num_warps / limits.warps
