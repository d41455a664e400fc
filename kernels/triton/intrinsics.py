"""PTX instructions that Triton does not expose, each with a plain form.

With ``PTX`` each function is one instruction or two. The plain form, for AMD GPUs and Triton's interpreter, has the
same results, up to the last bits of a reciprocal or a power.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def floor_to_int(x, PTX: tl.constexpr):
    """floor(x) as int32, for |x| < 2^22: read from the mantissa of x + 1.5 2^23, rounded down."""
    if PTX:
        shifted = tl.inline_asm_elementwise(
            "add.rm.f32 $0, $1, 0f4B400000;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
        return shifted.to(tl.int32, bitcast=True) - 0x4B400000
    return tl.floor(x).to(tl.int32)


@triton.jit
def round_to_int(x, PTX: tl.constexpr):
    """The integer nearest to x as int32, for |x| < 2^22; halves round either way. It saves one instruction."""
    if PTX:
        shifted = tl.inline_asm_elementwise(
            "add.rn.f32 $0, $1, 0f4B400000;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
        return shifted.to(tl.int32, bitcast=True) - 0x4B400000
    return tl.floor(x + 0.5).to(tl.int32)


@triton.jit
def reciprocal(x, PTX: tl.constexpr):
    """1 / x; x must not be subnormal."""
    if PTX:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return 1 / x


@triton.jit
def exp2(x, PTX: tl.constexpr):
    """2^x; results below the smallest normal number may be 0."""
    if PTX:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.exp2(x)


@triton.jit
def exp(x, PTX: tl.constexpr):
    """e^x; results below the smallest normal number may be 0."""
    return exp2(x * 1.4426950408889634, PTX) if PTX else tl.exp(x)


@triton.jit
def follow_previous_kernel(PDL: tl.constexpr):
    """With programmatic dependent launch: waits for the previous kernel, and allows the next one to launch.

    It stands before any memory access of a kernel but ``prefetch``. So only the launches overlap, about a microsecond
    each, and prefetches of what no kernel writes.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch(pointers):
    """PTX only: fetches the cache lines of these addresses into the L2 cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def unpack_int4_x16(packed, PTX: tl.constexpr):
    """uint8 tile -> two int8 tiles that hold 16 times the values of the low and of the high nibbles.

    A nibble in the upper half of a byte *is* the int8 number 16 q, so no sign extension is needed; the sum of
    their products is divided by 16, exactly. With ``PTX`` one instruction works on four bytes at once.
    """
    if PTX:
        # One statement for each result: Triton 3.8 moves the second result of a single one through shared memory.
        low = tl.inline_asm_elementwise(
            "shl.b32 $0, $1, 4; and.b32 $0, $0, 0xF0F0F0F0;", "=r,r", [packed], tl.int8, is_pure=True, pack=4
        )
        high = tl.inline_asm_elementwise("and.b32 $0, $1, 0xF0F0F0F0;", "=r,r", [packed], tl.int8, is_pure=True, pack=4)
    else:
        low = (packed << 4).to(tl.int8, bitcast=True)
        high = (packed & 0xF0).to(tl.int8, bitcast=True)
    return low, high
