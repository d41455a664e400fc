"""The GEMM of linear layers for Hopper alone, in Gluon: a second ``gemm``, off by default.

    DQ_HOPPER_GEMM=1    # before dq_kernels is imported; read in ``tuning``

Triton waits for ``wgmma`` after each product whose operand A is in registers, so its loop alternates between unpacking
and multiplying. Here the products of two steps are in flight:

- TMA copies the packed weight [BLOCK_N, BLOCK_K] and both halves of the activations, one box [2, BLOCK_M, BLOCK_K], to
  one of STAGES stages. Beyond the edges it writes zeros, so neither K nor the rows need masks.
- A stage is filled again when all warps have passed a barrier behind their wait for the products that read it.
- **Register safety.** ``wgmma`` reads operand A from registers while it runs, so these must not change until a wait has
  covered it. The wait of Gluon does not take int8 operands among its ``deps``; and it would hold values for LLVM only,
  since PTX's ``wgmma.wait_group`` names no registers. So the loop has two steps with a set of registers each: a set is
  written again only behind the wait that leaves the other set's products in flight. With one step a turn the same
  registers were written while they were read. ``machine_code.in_flight_conflicts`` shows on the machine code of every
  tile that no path from a product to its wait writes its operand, nor touches its accumulators.

The sums are integers and equal ``gemm``'s; the epilogue has its formula and order: zero point and scales, bias,
residual, the next layer's quantizer. Everything else is left to ``gemm``: convolutions, GEGLU, the time embedding,
statistics of a group norm, fewer rows than a tile, split-K. It never ran on a device: ``benchmarks/gpu`` decides.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from dq_kernels.records import PackedWeight, Quantizer
from dq_kernels.triton.intrinsics import follow_previous_kernel, unpack_int4_x16
from dq_kernels.triton.launch import cdiv, launch_options
from dq_kernels.triton.quantization import dequantize_sums, quantize_tile, select_timestep
from dq_kernels.triton.tuning import LaunchConfig

# The names of Triton 3.9, or else of 3.6.
_copy = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

# From large to small; stages are powers of 2. A larger tile draws less from L2, a smaller one fills more
# multiprocessors: of an H100 and an H200 there are 132.
TILES = (LaunchConfig(256, 128, 64, 8, 4), LaunchConfig(128, 128, 64, 8, 4), LaunchConfig(64, 128, 64, 8, 4))
MULTIPROCESSORS = 132
ALIGNMENT = 16  # bytes, of TMA's addresses and row strides


@gluon.jit
def _fill_stage(step, steps, x_desc, weight_desc, x_tiles, weight_tiles, filled, first_row, first_channel):
    """Starts the copies of a step, if there is such a step."""
    stage = step % x_tiles.shape[0]
    start = step * weight_tiles.shape[2]
    exists = step < steps
    mbarrier.expect(filled.index(stage), x_desc.block_type.nbytes + weight_desc.block_type.nbytes, pred=exists)
    _copy(weight_desc, [first_channel, start], filled.index(stage), weight_tiles.index(stage), pred=exists)
    _copy(x_desc, [0, first_row, start], filled.index(stage), x_tiles.index(stage), pred=exists)


@gluon.jit
def _start_products(step, x_tiles, weight_tiles, filled, accumulator, OPERAND: gl.constexpr):
    """Waits for the copies of a step, unpacks its weights and starts its two products, low and high nibbles."""
    STAGES: gl.constexpr = x_tiles.shape[0]
    BLOCK_M: gl.constexpr = x_tiles.shape[2]
    stage = step % STAGES
    mbarrier.wait(filled.index(stage), step // STAGES & 1)
    low, high = unpack_int4_x16(weight_tiles.index(stage).load(OPERAND), True)
    x = x_tiles.index(stage).reshape((2 * BLOCK_M, x_tiles.shape[3]))
    accumulator = warpgroup_mma(low, x.slice(0, BLOCK_M).permute((1, 0)), accumulator, is_async=True)
    return warpgroup_mma(high, x.slice(BLOCK_M, BLOCK_M).permute((1, 0)), accumulator, is_async=True)


# Sizes that enter no address: specializing on their alignment would compile kernels that are equal.
@gluon.jit(do_not_specialize=["num_rows", "rows_per_sample", "num_timesteps"])
def hopper_gemm_kernel(
    x_desc,
    weight_desc,
    weight_sum_ptr,
    act_scale_ptr,
    act_zero_point_ptr,
    weight_scale_ptr,
    timestep_index_ptr,
    bias_ptr,
    residual_ptr,
    next_dilation_ptr,
    next_scale_ptr,
    next_zero_point_ptr,
    out_ptr,
    num_rows,
    rows_per_sample,
    num_timesteps,
    out_channels,
    half_channels,
    NEXT_BITS: gl.constexpr,
    TILE_IN_SAMPLE: gl.constexpr,
    STAGES: gl.constexpr,
    PDL: gl.constexpr,
    num_warps: gl.constexpr,
):
    """One [BLOCK_N, BLOCK_M] tile of Y^T; the sizes are those of the descriptors' boxes.

    x_desc: the halves of K [2, M, K/2] int8; weight_desc: [N, K/2] uint8; residual and out [M, N].
    """
    BLOCK_N: gl.constexpr = weight_desc.block_type.shape[0]
    BLOCK_M: gl.constexpr = x_desc.block_type.shape[1]
    BLOCK_K: gl.constexpr = weight_desc.block_type.shape[1]
    # Triton has no int8 wgmma of 256 columns; two of 128 take its place.
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, 128 if BLOCK_M > 128 else BLOCK_M, 32])
    OPERAND: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SUMS, k_width=4)
    num_tiles_n = gl.cdiv(out_channels, BLOCK_N)
    first_row = gl.program_id(0) // num_tiles_n * BLOCK_M
    first_channel = gl.program_id(0) % num_tiles_n * BLOCK_N

    x_tiles = gl.allocate_shared_memory(gl.int8, [STAGES, 2, BLOCK_M, BLOCK_K], x_desc.layout)
    weight_tiles = gl.allocate_shared_memory(gl.uint8, [STAGES, BLOCK_N, BLOCK_K], weight_desc.layout)
    filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(filled.index(stage), count=1)
    fence_async_shared()
    follow_previous_kernel(PDL)

    steps = gl.cdiv(half_channels, BLOCK_K)
    for first_step in gl.static_range(STAGES - 1):
        _fill_stage(first_step, steps, x_desc, weight_desc, x_tiles, weight_tiles, filled, first_row, first_channel)
    accumulator = gl.zeros([BLOCK_N, BLOCK_M], gl.int32, SUMS)
    for even_step in range(0, steps - 1, 2):
        for odd in gl.static_range(2):  # unrolled: each has its own registers for operand A
            step = even_step + odd
            accumulator = _start_products(step, x_tiles, weight_tiles, filled, accumulator, OPERAND)
            # The products of the step before are finished. Behind the barrier they are in all warps: the stage is free.
            accumulator = warpgroup_mma_wait(num_outstanding=2, deps=(accumulator,))
            _barrier()
            _fill_stage(
                step + STAGES - 1, steps, x_desc, weight_desc, x_tiles, weight_tiles, filled, first_row, first_channel
            )
    accumulator = warpgroup_mma_wait(num_outstanding=0, deps=(accumulator,))
    if steps % 2 == 1:
        last = _start_products(steps - 1, x_tiles, weight_tiles, filled, accumulator, OPERAND)
        accumulator = warpgroup_mma_wait(num_outstanding=0, deps=(last,))

    n = first_channel + gl.arange(0, BLOCK_N, gl.SliceLayout(1, SUMS))[:, None]
    m = first_row + gl.arange(0, BLOCK_M, gl.SliceLayout(0, SUMS))[None, :]
    # Channels beyond the edge read a valid one instead; their results are never stored.
    channel = gl.where(n < out_channels, n, 0)
    last_sample = num_rows // rows_per_sample - 1
    sample = first_row // rows_per_sample if TILE_IN_SAMPLE else gl.minimum(m // rows_per_sample, last_sample)
    timestep_index = gl.load(timestep_index_ptr + sample)
    t = select_timestep(timestep_index, num_timesteps)
    act_scale = gl.where(timestep_index < 0, float("nan"), gl.load(act_scale_ptr + t))
    weight_scale = gl.load(weight_scale_ptr + channel)
    y = dequantize_sums(accumulator, weight_sum_ptr + channel, weight_scale, act_scale, act_zero_point_ptr + t)
    if bias_ptr is not None:
        y += gl.load(bias_ptr + channel).to(gl.float32)

    # Global memory is read and written along the channels.
    MEMORY: gl.constexpr = gl.BlockedLayout([8, 1], [16, 2], [1, num_warps], [0, 1])
    n = first_channel + gl.arange(0, BLOCK_N, gl.SliceLayout(1, MEMORY))[:, None]
    m = first_row + gl.arange(0, BLOCK_M, gl.SliceLayout(0, MEMORY))[None, :]
    offsets = m * out_channels + n
    inside = (n < out_channels) & (m < num_rows)
    if residual_ptr is not None:
        residual = gl.load(residual_ptr + offsets, mask=inside, other=0.0)
        y += gl.convert_layout(residual, SUMS).to(gl.float32)
    if next_scale_ptr is not None:
        inverse_dilation = tl.math.div_rn(1.0, gl.load(next_dilation_ptr + channel))
        inverse_scale = tl.math.div_rn(1.0, gl.load(next_scale_ptr + t))
        y = quantize_tile(y, inverse_dilation, inverse_scale, gl.load(next_zero_point_ptr + t), NEXT_BITS, True)
    y = y.to(out_ptr.dtype.element_ty)
    gl.store(out_ptr + offsets, gl.convert_layout(y, MEMORY), mask=inside)


def serves(x: Tensor, packed: Tensor) -> bool:
    """True for a linear layer that this GEMM computes: x [..., K] int8, packed weight [N, K/2], both contiguous."""
    num_rows, half_channels = x.numel() // x.shape[-1], x.shape[-1] // 2
    is_aligned = (half_channels | x.data_ptr() | packed.data_ptr()) % ALIGNMENT == 0
    return is_aligned and num_rows >= TILES[-1].block_m


def tile_for(num_rows: int, out_channels: int, rows_per_sample: int) -> LaunchConfig:
    """The largest tile of which there is one for each multiprocessor, otherwise the smallest.

    Rows of several samples have a scale each, for which the threads of the largest tile have no registers.
    """
    tiles = TILES[1:] if rows_per_sample % TILES[0].block_m else TILES
    counts = ((tile, cdiv(num_rows, tile.block_m) * cdiv(out_channels, tile.block_n)) for tile in tiles)
    return next((tile for tile, number in counts if number >= MULTIPROCESSORS), TILES[-1])


@cache
def layouts(tile: LaunchConfig) -> tuple[Any, Any]:
    """The layouts in shared memory of a step's activations [2, BLOCK_M, BLOCK_K] and weights [BLOCK_N, BLOCK_K]."""
    x = gl.NVMMASharedLayout.get_default_for([2, tile.block_m, tile.block_k], gl.int8)
    return x, gl.NVMMASharedLayout.get_default_for([tile.block_n, tile.block_k], gl.uint8)


def launch(
    x: Tensor,
    weight: PackedWeight,
    quantizer: Quantizer,
    out: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    following: Quantizer | None,
    tile: LaunchConfig | None = None,
) -> Any:
    """Launches ``hopper_gemm_kernel`` for a layer that it ``serves``: fills ``out`` [B, ..., N]; returns the kernel.

    Arguments are those of ``gemm.launch``; ``tile`` takes the place of ``tile_for``.
    """
    out_channels, half_channels = out.shape[-1], x.shape[-1] // 2
    num_rows = out.numel() // out_channels
    rows_per_sample = num_rows // x.shape[0]
    tile = tile_for(num_rows, out_channels, rows_per_sample) if tile is None else tile
    x_layout, weight_layout = layouts(tile)
    x_shape, x_strides, x_box = [2, num_rows, half_channels], [half_channels, 2 * half_channels, 1], [2, tile.block_m]
    weight_shape, weight_box = [out_channels, half_channels], [tile.block_n, tile.block_k]
    num_tiles = cdiv(out_channels, tile.block_n) * cdiv(num_rows, tile.block_m)
    return hopper_gemm_kernel[(num_tiles,)](
        TensorDescriptor(x, x_shape, x_strides, [*x_box, tile.block_k], x_layout),
        TensorDescriptor(weight.values, weight_shape, [half_channels, 1], weight_box, weight_layout),
        weight.sum,
        quantizer.scale,
        quantizer.zero_point,
        weight.scale,
        quantizer.timestep_index,
        bias,
        residual,
        None if following is None else following.dilation,
        None if following is None else following.scale,
        None if following is None else following.zero_point,
        out,
        num_rows,
        rows_per_sample,
        quantizer.scale.numel(),
        out_channels,
        half_channels,
        NEXT_BITS=8 if following is None else following.bits,
        TILE_IN_SAMPLE=rows_per_sample % tile.block_m == 0,
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
        **launch_options(ptx=False),
        enable_fp_fusion=True,  # as in ``gemm``
    )
