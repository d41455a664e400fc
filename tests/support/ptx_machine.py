"""Runs one block of a Hopper kernel from its PTX, on a CPU: what a GPU computes if it takes every liberty it has.

All threads execute an instruction before the next one, so threads must branch alike. Operations that a GPU executes
asynchronously happen at the worst time: copies (TMA) at once, matrix products (``wgmma``) not before a wait demands
them, with the registers and the shared memory of that moment. So a stage that is filled too early, and an operand that
is overwritten while a product may read it, give wrong results. Races between warps are not seen.

Only the instructions of the kernels under test are known. Source: PTX ISA 8.8, "Data Movement and Conversion
Instructions", "mbarrier" and "Asynchronous Warpgroup Level Matrix Instructions" (fragments and swizzled tiles).
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

TYPES = {
    **{"s16": np.int16, "s32": np.int32, "s64": np.int64, "u16": np.uint16, "u32": np.uint32, "u64": np.uint64},
    **{"b8": np.uint8, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64},
    **{"f16": np.float16, "f32": np.float32, "pred": np.bool_},
}
COMPARISONS = {name: getattr(operator, name) for name in ("lt", "le", "gt", "ge", "eq", "ne")}
BINARY: dict[str, Callable[..., Any]] = {
    **{"add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum, "div": np.divide},
    **{"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "shl": np.left_shift, "shr": np.right_shift},
}  # fmt: skip
SHARED_BYTES = 227 * 1024


@dataclass
class TensorMap:
    """What TMA knows of a tensor: its bytes, in any number of dimensions, and the box that is copied."""

    data: np.ndarray
    box: tuple[int, ...]
    swizzle: int  # bytes


@dataclass
class Barrier:
    """An mbarrier: arrivals and bytes that the current phase waits for, and the number of finished phases."""

    count: int
    pending: int
    bytes: int = 0
    finished: int = 0

    def advance(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.pending, self.finished = self.count, self.finished + 1


def swizzled(address: np.ndarray, width: int) -> np.ndarray:
    """The place in shared memory of a byte of a tile whose rows have ``width`` bytes."""
    return address ^ (address >> 7 & {32: 1, 64: 3, 128: 7}[width]) << 4


def parsed(ptx: str) -> tuple[list[tuple[str, str, list[str]]], dict[str, int]]:
    """The kernel's instructions (predicate, name, operands), and the instruction behind each label."""
    body = re.sub(r"//.*", "", ptx)
    body = body[body.index("\n{", body.index(".visible .entry")) + 2 : body.rindex("ret;") + 4]
    body = re.sub(r"^\s*(\.(loc|pragma)\b.*|[{}])$", "", body, flags=re.M)
    instructions, labels = [], {}
    for statement in body.split(";"):
        statement = statement.strip()
        while label := re.match(r"([$\w]+):\s*", statement):
            labels[label[1]] = len(instructions)
            statement = statement[label.end() :]
        match = re.match(r"(?:@(!?%?\w+)\s+)?([a-z][\w.:]*)\s*(.*)$", statement, re.S)
        if match and not statement.startswith("."):
            operands = [part.strip() for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", match[3])]
            instructions.append((match[1] or "", match[2], operands))
    return instructions, labels


def listed(operand: str) -> list[str]:
    """The registers of a vector operand."""
    return [part.strip() for part in operand.strip("{} ").split(",")]


class Block:
    """One block; a register holds the bits of each thread as uint64."""

    def __init__(self, ptx: str, parameters: Mapping[int, Any], block: int, threads: int) -> None:
        """``parameters`` by their position: numbers, arrays of bytes (addresses) or ``TensorMap``."""
        self.instructions, self.labels = parsed(ptx)
        self.threads, self.lane = threads, np.arange(threads) % 32
        self.objects = dict(parameters)
        self.registers = {"%tid.x": np.arange(threads), "%ctaid.x": np.full(threads, block)}
        self.registers = {name: value.astype(np.uint64) for name, value in self.registers.items()}
        self.shared = np.full(SHARED_BYTES, 0xA5, np.uint8)
        self.barriers: dict[int, Barrier] = {}
        self.groups: list[list[list[str]]] = []  # of products, the last one open

    def run(self) -> None:
        """Runs the kernel to its end."""
        index, self.groups = 0, [[]]
        while self.instructions[index][1] != "ret":
            predicate, name, operands = self.instructions[index]
            mask = np.ones(self.threads, bool)
            if predicate:
                mask = self.read(predicate.lstrip("!"), "pred") ^ predicate.startswith("!")
            index += 1
            if name.startswith("bra"):
                assert mask.all() or not mask.any(), f"threads branch apart: {operands}"
                index = self.labels[operands[0]] if mask.all() else index
            elif mask.any():
                self.execute(name, operands, mask)
        assert self.groups == [[]], "products without a wait"

    def read(self, operand: str, kind: str) -> np.ndarray:
        """An operand's value in each thread."""
        if operand in self.registers:
            bits = self.registers[operand]
        elif position := re.search(r"_param_(\d+)", operand):
            number, value = int(position[1]), self.objects[int(position[1])]
            # The address of an array is its number in the upper half; that of a tensor map has 32 bits.
            if not isinstance(value, int):
                value = number if isinstance(value, TensorMap) else number << 32
            bits = np.full(self.threads, value, np.uint64)
        else:
            number = 0 if operand == "global_smem" else int(operand.replace("0f", "0x").rstrip("U"), 0)
            bits = np.full(self.threads, number % 2**64, np.uint64)
        kind_of_bits = TYPES[kind]
        if kind == "pred":
            return bits != 0
        return bits.astype(f"u{np.dtype(kind_of_bits).itemsize}").view(kind_of_bits)

    def write(self, register: str, value: np.ndarray, mask: np.ndarray) -> None:
        """Sets a register in the threads of the mask."""
        bits = value if value.dtype == bool else value.view(f"u{value.dtype.itemsize}")
        old = self.registers.get(register, np.zeros(self.threads, np.uint64))
        self.registers[register] = np.where(mask, bits.astype(np.uint64), old)

    def address(self, operand: str) -> np.ndarray:
        base, offset = re.match(r"\[\s*(\S+?)\s*(?:\+\s*(-?\w+)\s*)?\]", operand).groups()
        return self.read(base, "s64") + int(offset or "0", 0)

    def execute(self, name: str, operands: list[str], mask: np.ndarray) -> None:
        """Executes an instruction that is no branch in the threads of the mask."""
        words = name.split(".")
        method = getattr(self, f"do_{'_'.join(words[:2])}", None) or getattr(self, f"do_{words[0]}", None)
        if method is not None:
            method(words, operands, mask)
        elif name.startswith(("bar.sync", "fence", "griddepcontrol", "wgmma.fence")):
            return
        elif words[0] in BINARY:
            kind = words[-1]
            a, b = self.read(operands[1], kind), self.read(operands[2], "u32" if words[0] in ("shl", "shr") else kind)
            if words[0] == "div" and kind[0] != "f":
                result = np.trunc(a / b)  # exact: the operands have 32 bits
            elif words[0] in ("shl", "shr"):
                result = BINARY[words[0]](a, b.astype(a.dtype))
            elif words[1] == "rm":
                exact = a.astype(np.float64) + b
                result = exact.astype(np.float32)
                result = np.where(result > exact, np.nextafter(result, np.float32(-np.inf)), result)
            else:
                result = BINARY[words[0]](a, b)
            self.write(operands[0], result.astype(a.dtype), mask)
        else:
            raise NotImplementedError(f"{name} {operands}")

    def do_mov(self, words: list[str], operands: list[str], mask: np.ndarray) -> None:
        whole, half = (np.uint64, np.uint32) if words[1] == "b64" else (np.uint32, np.uint16)
        bits = 8 * np.dtype(half).itemsize
        if operands[0].startswith("{"):
            for part, register in enumerate(listed(operands[0])):
                self.write(register, (self.read(operands[1], words[1]) >> whole(bits * part)).astype(half), mask)
        elif operands[1].startswith("{"):
            low, high = (self.read(register, "u64").astype(half).astype(whole) for register in listed(operands[1]))
            self.write(operands[0], low | high << whole(bits), mask)
        else:
            self.write(operands[0], self.read(operands[1], words[1]), mask)

    def do_cvta(self, words: list[str], operands: list[str], mask: np.ndarray) -> None:
        self.write(operands[0], self.read(operands[1], "u64"), mask)

    def do_mul(self, words: list[str], operands: list[str], mask: np.ndarray) -> None:
        kind = TYPES[words[-1].replace("32", "64") if words[1] == "wide" else words[-1]]
        a, b = (self.read(operand, words[-1]).astype(kind) for operand in operands[1:3])
        self.write(operands[0], a * b, mask)

    def do_mad(self, words: list[str], operands: list[str], mask: np.ndarray) -> None:
        kind = words[-1].replace("32", "64") if words[1] == "wide" else words[-1]
        a, b = (self.read(operand, words[-1]).astype(TYPES[kind]) for operand in operands[1:3])
        self.write(operands[0], a * b + self.read(operands[3], kind), mask)

    def do_fma(self, words: list[str], operands: list[str], mask: np.ndarray) -> None:
        a, b, c = (self.read(operand, "f32").astype(np.float64) for operand in operands[1:])
        self.write(operands[0], (a * b + c).astype(np.float32), mask)

    def do_cvt(self, words: list[str], operands: list[str], mask: np.ndarray) -> None:
        if "f16x2" in words:
            high, low = (self.read(operand, "f32").astype(np.float16).view(np.uint16) for operand in operands[1:])
            self.write(operands[0], low.astype(np.uint32) | high.astype(np.uint32) << 16, mask)
        else:
            self.write(operands[0], self.read(operands[1], words[-1]).astype(TYPES[words[-2]]), mask)

    def do_setp(self, words: list[str], operands: list[str], mask: np.ndarray) -> None:
        a, b = (self.read(operand, words[2]) for operand in operands[1:])
        self.write(operands[0], COMPARISONS[words[1]](a, b), mask)

    def do_selp(self, words: list[str], operands: list[str], mask: np.ndarray) -> None:
        a, b = (self.read(operand, words[1]) for operand in operands[1:3])
        self.write(operands[0], np.where(self.read(operands[3], "pred"), a, b), mask)

    def do_bfe(self, words: list[str], operands: list[str], mask: np.ndarray) -> None:
        start, length = int(operands[2]), int(operands[3])
        a = self.read(operands[1], "u32") << 32 - start - length
        self.write(operands[0], a.view(TYPES[words[1]]) >> 32 - length, mask)

    def do_prmt(self, words: list[str], operands: list[str], mask: np.ndarray) -> None:
        pair = self.read(operands[1], "u32").astype(np.uint64) | self.read(operands[2], "u64") << np.uint64(32)
        result = np.zeros(self.threads, np.uint32)
        for part in range(4):
            selector = self.read(operands[3], "u64") >> np.uint64(4 * part) & np.uint64(15)
            assert (selector < 8).all()
            result |= (pair >> 8 * selector & np.uint64(255)).astype(np.uint32) << 8 * part
        self.write(operands[0], result, mask)

    def do_elect(self, words: list[str], operands: list[str], mask: np.ndarray) -> None:
        self.write(operands[0].split("|")[1], self.lane == 0, mask)

    def do_shfl(self, words: list[str], operands: list[str], mask: np.ndarray) -> None:
        assert words[2] == "idx"
        source = np.arange(self.threads) - self.lane + self.read(operands[2], "s32")
        self.write(operands[0], self.read(operands[1], "u32")[source], mask)

    def memory(self, address: np.ndarray, words: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The bytes of a space, and where in it each thread's address points to."""
        if words[1].startswith("shared"):
            return self.shared, address
        (number,) = set((address >> 32).tolist())
        return self.objects[number], address & 0xFFFFFFFF

    def do_ld(self, words: list[str], operands: list[str], mask: np.ndarray) -> None:
        if words[1] == "param":
            self.write(operands[0], self.read(operands[1].strip("[]"), words[2]), mask)
            return
        kind = TYPES[words[-1]]
        size = np.dtype(kind).itemsize
        data, place = self.memory(self.address(operands[1])[mask], words)
        for part, register in enumerate(listed(operands[0])):
            where = place[:, None] + size * part + np.arange(size)
            value = np.zeros(self.threads, kind)
            value[mask] = data[where].view(kind)[:, 0]
            self.write(register, value, mask)

    def do_st(self, words: list[str], operands: list[str], mask: np.ndarray) -> None:
        data, place = self.memory(self.address(operands[0])[mask], words)
        for part, register in enumerate(listed(operands[1])):
            value = self.read(register, words[-1])[mask]
            size = value.dtype.itemsize
            data[place[:, None] + size * part + np.arange(size)] = value[:, None].view(np.uint8)

    def matrix_rows(self, operand: str, number: int) -> np.ndarray:
        """The 16 bytes of the 8 rows of each warp's matrix, as indices [warps, 8, 16]."""
        rows = self.address(operand).reshape(-1, 32)[:, 8 * number : 8 * number + 8]
        return rows[:, :, None] + np.arange(16)

    def matrix_places(self, transposed: bool) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
        """Row and column of the two elements of each lane."""
        lane = np.arange(32)
        places = ((lane // 4, lane % 4 * 2 + part) for part in range(2))
        return tuple((column, row) if transposed else (row, column) for row, column in places)

    def do_ldmatrix(self, words: list[str], operands: list[str], mask: np.ndarray) -> None:
        for number, register in enumerate(listed(operands[0])):
            matrix = self.shared[self.matrix_rows(operands[1], number)].view(np.uint16)
            low, high = (matrix[:, row, column] for row, column in self.matrix_places("trans" in words))
            self.write(register, (low | high.astype(np.uint32) << 16).ravel(), mask)

    def do_stmatrix(self, words: list[str], operands: list[str], mask: np.ndarray) -> None:
        for number, register in enumerate(listed(operands[1])):
            value = self.read(register, "u32").reshape(-1, 32)
            matrix = np.zeros((len(value), 8, 8), np.uint16)
            for part, (row, column) in enumerate(self.matrix_places("trans" in words)):
                matrix[:, row, column] = value >> 16 * part
            self.shared[self.matrix_rows(operands[0], number)] = matrix.view(np.uint8)

    def only(self, values: np.ndarray, mask: np.ndarray) -> int:
        """The value of the only thread of the mask."""
        (value,) = values[mask].tolist()
        return value

    def do_mbarrier_init(self, words: list[str], operands: list[str], mask: np.ndarray) -> None:
        self.barriers[self.only(self.address(operands[0]), mask)] = Barrier(int(operands[1]), int(operands[1]))

    def do_mbarrier_arrive(self, words: list[str], operands: list[str], mask: np.ndarray) -> None:
        barrier = self.barriers[self.only(self.address(operands[1]), mask)]
        barrier.pending, barrier.bytes = barrier.pending - 1, barrier.bytes + int(operands[2])
        barrier.advance()

    def do_mbarrier_try_wait(self, words: list[str], operands: list[str], mask: np.ndarray) -> None:
        barrier = self.barriers[int(self.address(operands[1])[0])]
        assert barrier.finished % 2 != self.read(operands[2], "u32")[0], "waits for a copy that was not started"
        self.write(operands[0], mask, mask)

    def do_cp(self, words: list[str], operands: list[str], mask: np.ndarray) -> None:
        """A copy of a box by TMA; what lies outside of the tensor is 0."""
        register, coordinates = re.match(r"\[\s*(\S+), \{(.*)\}\s*\]", operands[1]).groups()
        source = self.objects[self.only(self.read(register, "u64"), mask)]
        first = [self.only(self.read(part, "s32"), mask) for part in reversed(listed(coordinates))]
        box = np.zeros(source.box, np.uint8)
        part = source.data[tuple(slice(start, start + size) for start, size in zip(first, source.box, strict=True))]
        box[tuple(slice(size) for size in part.shape)] = part
        place = self.only(self.address(operands[0]), mask) + np.arange(box.size)
        self.shared[swizzled(place, source.swizzle)] = box.ravel()
        barrier = self.barriers[self.only(self.address(operands[2]), mask)]
        barrier.bytes -= box.size
        barrier.advance()

    def do_wgmma_mma_async(self, words: list[str], operands: list[str], mask: np.ndarray) -> None:
        columns = int(re.match(r"m64n(\d+)k32", words[4])[1])
        self.groups[-1].append([columns, *map(listed, operands[:2]), self.read(operands[2], "u64")])

    def do_wgmma_commit_group(self, words: list[str], operands: list[str], mask: np.ndarray) -> None:
        self.groups.append([])

    def do_wgmma_wait_group(self, words: list[str], operands: list[str], mask: np.ndarray) -> None:
        while len(self.groups) - 1 > int(operands[0]):
            for product in self.groups.pop(0):
                self.multiply(*product)

    def multiply(self, columns: int, sums: list[str], operand: list[str], descriptors: np.ndarray) -> None:
        """D [64, columns] += A [64, 32] B [32, columns] in each warp group; A and D are in registers, B in a tile."""
        thread = np.arange(128)
        row, pair = thread // 32 * 16 + thread % 32 // 4, thread % 4
        for first in range(0, self.threads, 128):
            group = slice(first, first + 128)
            descriptor = int(descriptors[first])
            start, stride = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
            width = {1: 128, 2: 64, 3: 32}[descriptor >> 62]
            n = np.arange(columns)[:, None]
            place = start + n // 8 * stride + n % 8 * width + np.arange(32)
            b = self.shared[swizzled(place, width)].view(np.int8)
            a = np.zeros((64, 32), np.int64)
            for number, register in enumerate(operand):
                values = self.read(register, "u32")[group, None].view(np.int8)
                k = 4 * pair[:, None] + 16 * (number // 2) + np.arange(4)
                a[row[:, None] + 8 * (number % 2), k] = values
            product = (a @ b.T.astype(np.int64)).astype(np.int32)
            for number, register in enumerate(sums):
                total = self.read(register, "s32").copy()
                total[group] += product[row + 8 * (number // 2 % 2), number // 4 * 8 + 2 * pair + number % 2]
                self.write(register, total, np.ones(self.threads, bool))
