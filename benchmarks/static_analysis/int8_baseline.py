"""The GEMM of ``dq_kernels.triton.gemm`` with int8 weights: the cost of its main loop without the unpacking.

It serves to count instructions: it is compiled, never launched. It has no epilogue. Its step has as many input channels
as our kernel's, in one matrix product or in two (either form can compile to fewer instructions).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_rows", "rows_per_sample", "height", "width", "out_width"])
def int8_gemm_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    num_rows,
    rows_per_sample,
    height,
    width,
    out_width,
    out_channels,
    channels,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    UPSAMPLE: tl.constexpr,
    GEGLU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One [BLOCK_N, BLOCK_M] tile of W X^T: x [B, H, W, K] int8, weight [N, KH, KW, K] int8, for GEGLU 2N rows."""
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M))[None, :]
    pixel = tl.minimum(m, num_rows - 1)
    channel = tl.where(n < out_channels, n, 0)
    # Our kernel's step has 2 BLOCK_K channels: BLOCK_K packed bytes, whose nibbles are half of the channels apart.
    BLOCK: tl.constexpr = 2 * BLOCK_K // PARTS
    part_channels = channels // PARTS
    k = tl.arange(0, BLOCK)
    weight_rows = weight_ptr + channel * (TAPS * channels) + k[None, :]
    gate_offset = out_channels * (TAPS * channels)
    if TAPS == 1:
        x_rows = x_ptr + pixel * channels + k[:, None]
    else:
        image = x_ptr + pixel // rows_per_sample * (height * width) * channels + k[:, None]
        top = pixel % rows_per_sample // out_width
        left = pixel % out_width
        x_rows = image + (top * width + left) * channels

    accumulator = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
    gate = accumulator
    tap, start = 0, 0
    for _ in range(0, TAPS * tl.cdiv(part_channels, BLOCK)):
        row, column = tap // KERNEL_W, tap % KERNEL_W
        if UPSAMPLE:
            source = (top + row + 1) // 2 * width + (left + column + 1) // 2
            x_ptrs = image + (source * channels + start)
        else:
            x_ptrs = x_rows + ((row * width + column) * channels + start)
        weight_ptrs = weight_rows + (tap * channels + start)
        inside = start + k < part_channels
        for part in tl.static_range(PARTS):
            x_part, weight_part = x_ptrs + part * part_channels, weight_ptrs + part * part_channels
            if EVEN_K:
                w = tl.load(weight_part)
                x = tl.load(x_part)
            else:
                w = tl.load(weight_part, mask=inside[None, :], other=0)
                x = tl.load(x_part, mask=inside[:, None], other=0)
            accumulator = tl.dot(w, x, accumulator, out_dtype=tl.int32)
            if GEGLU:
                if EVEN_K:
                    w = tl.load(weight_part + gate_offset)
                else:
                    w = tl.load(weight_part + gate_offset, mask=inside[None, :], other=0)
                gate = tl.dot(w, x, gate, out_dtype=tl.int32)
        start += BLOCK
        tap = tl.where(start < part_channels, tap, tap + 1)
        start = tl.where(start < part_channels, start, 0)
    mask = (n < out_channels) & (m < num_rows)
    tl.store(out_ptr + m * out_channels + n, accumulator, mask=mask)
    if GEGLU:
        tl.store(out_ptr + num_rows * out_channels + m * out_channels + n, gate, mask=mask)
