"""The GEMM of every INT4 layer on GPUs: int8 activations x packed INT4 weights, summed in int32.

    y_mn = act_scale_t weight_scale_n (sum_k q_x q_w - zp_t sum_k q_w)

A linear layer is the GEMM itself. A convolution is the same loop over taps x channel blocks (an implicit GEMM, NHWC);
its image is padded already, so no tap needs a bounds check. The kernel is fast for five reasons:

- The weight is operand A: the kernel computes Y^T = W X^T. ``wgmma`` takes A from registers, so the unpacked nibbles
  never pass through shared memory. One packed block is multiplied with two activation blocks, the two halves of K; on
  Hopper in one product, since Triton waits for ``wgmma`` after each product whose operand A is in registers.
- The unpacked values are 16 q_w (see ``intrinsics``); the scale divides the sum by 16, exactly, at the end.
- The epilogue adds bias, time embedding and residual, applies GEGLU and quantizes the next layer's input, and sums the
  statistics of the next group norm. A separate kernel would read and write the tensor again.
- The first weights are fetched into the L2 cache before the previous kernel has ended (programmatic dependent launch).
- If there are few tiles, several programs share one (split-K). The last program adds the integers of all, whose sum
  does not depend on their order, and finishes the tile.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dq_kernels.records import PackedWeight, Quantizer
from dq_kernels.shapes import STATISTICS_ROWS, conv2d_output_size, statistics_shape
from dq_kernels.triton.intrinsics import exp2, follow_previous_kernel, prefetch, unpack_int4_x16
from dq_kernels.triton.launch import arrival_counters, cdiv, current_target, launch_options
from dq_kernels.triton.quantization import dequantize_sums, quantize_tile, select_timestep
from dq_kernels.triton.tuning import (
    LaunchConfig,
    Problem,
    adjusted,
    joins_halves,
    launch_config,
    register_limit,
    uses_hopper_gemm,
)


# Sizes that enter no address: specializing on their alignment would compile kernels that are equal.
@triton.jit(
    do_not_specialize=["num_rows", "rows_per_sample", "height", "width", "out_width", "num_timesteps", "group_m"]
)
def int4_gemm_kernel(
    x_ptr,
    weight_ptr,
    weight_sum_ptr,
    act_scale_ptr,
    act_zero_point_ptr,
    weight_scale_ptr,
    timestep_index_ptr,
    bias_ptr,
    channel_add_ptr,
    residual_ptr,
    next_dilation_ptr,
    next_scale_ptr,
    next_zero_point_ptr,
    out_ptr,
    statistics_ptr,
    partial_ptr,
    arrivals_ptr,
    num_rows,
    rows_per_sample,
    height,
    width,
    out_width,
    num_timesteps,
    out_channels,
    half_channels,
    channel_add_stride,
    group_m,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    UPSAMPLE: tl.constexpr,
    GEGLU: tl.constexpr,
    NEXT_BITS: tl.constexpr,
    STATISTICS_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    EVEN_K: tl.constexpr,
    JOIN_HALVES: tl.constexpr,
    TILE_IN_SAMPLE: tl.constexpr,
    PTX: tl.constexpr,
    PDL: tl.constexpr,
):
    """One [BLOCK_N, BLOCK_M] tile of Y^T.

    x [B, H, W, K] int8, weight [N, KH, KW, K/2] uint8, residual and out [M, N], statistics [M / ROWS, 2, N], M = the
    pixels of all samples. With GEGLU the weight has 2N rows: hidden, then gates. TILE_IN_SAMPLE: no tile has rows of
    two samples.
    """
    num_tiles_m = tl.cdiv(num_rows, BLOCK_M)
    num_tiles_n = tl.cdiv(out_channels, BLOCK_N)
    tile_m, tile_n = tl.swizzle2d(
        tl.program_id(0) // num_tiles_n, tl.program_id(0) % num_tiles_n, num_tiles_m, num_tiles_n, group_m
    )
    first_row = tile_m * BLOCK_M
    n = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    m = (first_row + tl.arange(0, BLOCK_M))[None, :]
    n_inside = n < out_channels
    # Rows and channels beyond the edge read a valid one instead; their results are never stored.
    pixel = tl.minimum(m, num_rows - 1)
    channel = tl.where(n_inside, n, 0)
    gate_rows = out_channels if GEGLU else 0

    accumulator, gate = _multiply(
        x_ptr, weight_ptr, pixel, channel, gate_rows, rows_per_sample, height, width, out_width, half_channels,
        KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W, DILATION_H, DILATION_W, UPSAMPLE, GEGLU,
        BLOCK_M, BLOCK_N, BLOCK_K, IS_SPLIT, EVEN_K, JOIN_HALVES, PTX, PDL,
    )  # fmt: skip

    last_sample = num_rows // rows_per_sample - 1
    sample = first_row // rows_per_sample if TILE_IN_SAMPLE else tl.minimum(m // rows_per_sample, last_sample)
    weight_scale = tl.load(weight_scale_ptr + channel)

    if IS_SPLIT:
        # The last program to arrive finishes the tile; the others return.
        tile = tl.program_id(0)
        within = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        mine = (tl.program_id(1) * tl.num_programs(0) + tile).to(tl.int64) * (BLOCK_N * BLOCK_M)
        tl.store(partial_ptr + mine + within, accumulator)
        tl.debug_barrier()
        if tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel") != tl.num_programs(1) - 1:
            return
        tl.store(arrivals_ptr + tile, 0)  # for the next launch, which does not fill it
        accumulator = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
        for split in range(tl.num_programs(1)):
            theirs = (split * tl.num_programs(0) + tile).to(tl.int64) * (BLOCK_N * BLOCK_M)
            accumulator += tl.load(partial_ptr + theirs + within, cache_modifier=".cg")

    timestep_index = tl.load(timestep_index_ptr + sample)
    t = select_timestep(timestep_index, num_timesteps)
    act_scale = tl.where(timestep_index < 0, float("nan"), tl.load(act_scale_ptr + t))
    y = dequantize_sums(accumulator, weight_sum_ptr + channel, weight_scale, act_scale, act_zero_point_ptr + t)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + channel).to(tl.float32)
    if channel_add_ptr is not None:
        y += tl.load(channel_add_ptr + sample * channel_add_stride + channel).to(tl.float32)
    offsets = m * out_channels + n
    inside = n_inside & (m < num_rows)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(tl.float32)

    if GEGLU:
        gate_scale = tl.load(weight_scale_ptr + out_channels + channel)
        z = dequantize_sums(
            gate, weight_sum_ptr + out_channels + channel, gate_scale, act_scale, act_zero_point_ptr + t
        )
        if bias_ptr is not None:
            z += tl.load(bias_ptr + out_channels + channel).to(tl.float32)
        y *= _gelu(z, PTX)
    if next_scale_ptr is not None:
        inverse_dilation = tl.math.div_rn(1.0, tl.load(next_dilation_ptr + channel))
        inverse_scale = tl.math.div_rn(1.0, tl.load(next_scale_ptr + t))
        y = quantize_tile(y, inverse_dilation, inverse_scale, tl.load(next_zero_point_ptr + t), NEXT_BITS, PTX)
    y = y.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offsets, y, mask=inside)

    if statistics_ptr is not None:
        # Sum and centred sum of squares of every STATISTICS_ROWS pixels, as they are stored.
        runs = tl.reshape(y.to(tl.float32), (BLOCK_N, BLOCK_M // STATISTICS_ROWS, STATISTICS_ROWS))
        total = tl.sum(runs, 2)
        centred = runs - (total / STATISTICS_ROWS)[:, :, None]
        run = first_row // STATISTICS_ROWS + tl.arange(0, BLOCK_M // STATISTICS_ROWS)[None, :]
        statistics_ptrs = statistics_ptr + run * (2 * out_channels) + n
        run_inside = n_inside & (run * STATISTICS_ROWS < num_rows)
        tl.store(statistics_ptrs, total, mask=run_inside)
        tl.store(statistics_ptrs + out_channels, tl.sum(centred * centred, 2), mask=run_inside)


@triton.jit
def _multiply(
    x_ptr, weight_ptr, pixel, channel, gate_rows, rows_per_sample, height, width, out_width, half_channels,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, UPSAMPLE: tl.constexpr, GEGLU: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, IS_SPLIT: tl.constexpr,
    EVEN_K: tl.constexpr, JOIN_HALVES: tl.constexpr, PTX: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """16 sum q_x q_w [BLOCK_N, BLOCK_M] over this program's share of taps x channels, and the same of GEGLU's gates.

    With JOIN_HALVES a step is one matrix product, of both halves of K and, for GEGLU, of the hidden rows and the gates.
    """
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    ROWS: tl.constexpr = 2 * BLOCK_N if GEGLU and JOIN_HALVES else BLOCK_N
    k = tl.arange(0, BLOCK_K)
    gate_offset = gate_rows * (TAPS * half_channels)
    if JOIN_HALVES:
        within = tl.arange(0, 2 * BLOCK_K) % BLOCK_K
        x_k = tl.arange(0, 2 * BLOCK_K) // BLOCK_K * half_channels + within
        if GEGLU:
            channel = tl.reshape(tl.permute(tl.join(channel, channel + gate_rows), (2, 0, 1)), (ROWS, 1))
    else:
        within = k
        x_k = k
    weight_rows = weight_ptr + channel * (TAPS * half_channels) + k[None, :]
    if PDL:
        _prefetch_first_weights(weight_ptr + channel * (TAPS * half_channels), half_channels, TAPS, BLOCK_K, IS_SPLIT)
    if TAPS * STRIDE_H * STRIDE_W == 1 and not UPSAMPLE:
        x_rows = x_ptr + pixel * (2 * half_channels) + x_k[:, None]
    else:
        image = x_ptr + pixel // rows_per_sample * (height * width) * (2 * half_channels) + x_k[:, None]
        top = pixel % rows_per_sample // out_width * STRIDE_H
        left = pixel % out_width * STRIDE_W
        x_rows = image + (top * width + left) * (2 * half_channels)

    accumulator = tl.zeros((ROWS, BLOCK_M), dtype=tl.int32)
    gate = accumulator
    blocks = tl.cdiv(half_channels, BLOCK_K)
    first, last = 0, TAPS * blocks
    if IS_SPLIT:
        share = tl.cdiv(TAPS * blocks, tl.num_programs(1))
        first = tl.program_id(1) * share
        last = tl.minimum(first + share, TAPS * blocks)
    # tap and start are counted, since dividing the step by the number of blocks is slow.
    tap = first // blocks if IS_SPLIT else 0
    start = first % blocks * BLOCK_K if IS_SPLIT else 0
    follow_previous_kernel(PDL)
    for _ in range(first, last):
        row, column = tap // KERNEL_W * DILATION_H, tap % KERNEL_W * DILATION_W
        if UPSAMPLE:
            # Pixel i of the doubled and then padded image is pixel (i + 1) // 2 of the padded one.
            source = (top + row + 1 >> 1) * width + (left + column + 1 >> 1)
            x_ptrs = image + (source * (2 * half_channels) + start)
        else:
            x_ptrs = x_rows + ((row * width + column) * (2 * half_channels) + start)
        x_high_ptrs = x_ptrs + half_channels
        weight_ptrs = weight_rows + (tap * half_channels + start)
        # The weight is 0 beyond K; the activation is masked too, so that no address is out of bounds.
        inside = start + k < half_channels
        x_inside = start + within < half_channels
        packed = _load(weight_ptrs, inside[None, :], EVEN_K)
        x = _load(x_ptrs, x_inside[:, None], EVEN_K)
        if not JOIN_HALVES:
            x_high = _load(x_high_ptrs, x_inside[:, None], EVEN_K)
        w_low, w_high = unpack_int4_x16(packed, PTX)
        if JOIN_HALVES:
            w = tl.reshape(tl.permute(tl.join(w_low, w_high), (0, 2, 1)), (ROWS, 2 * BLOCK_K))
            accumulator = tl.dot(w, x, accumulator, out_dtype=tl.int32)
        else:
            accumulator = tl.dot(w_low, x, accumulator, out_dtype=tl.int32)
            accumulator = tl.dot(w_high, x_high, accumulator, out_dtype=tl.int32)
            if GEGLU:
                w_low, w_high = unpack_int4_x16(_load(weight_ptrs + gate_offset, inside[None, :], EVEN_K), PTX)
                gate = tl.dot(w_low, x, gate, out_dtype=tl.int32)
                gate = tl.dot(w_high, x_high, gate, out_dtype=tl.int32)
        start += BLOCK_K
        tap = tl.where(start < half_channels, tap, tap + 1)
        start = tl.where(start < half_channels, start, 0)
    if GEGLU and JOIN_HALVES:
        accumulator, gate = tl.split(tl.permute(tl.reshape(accumulator, (2, BLOCK_N, BLOCK_M)), (1, 2, 0)))
    return accumulator, gate


@triton.jit
def _prefetch_first_weights(
    weight_rows, half_channels, TAPS: tl.constexpr, BLOCK_K: tl.constexpr, IS_SPLIT: tl.constexpr
):
    """Fetches 256 bytes a row, from this program's first step on; the previous kernel runs, but writes no weights."""
    blocks = tl.cdiv(half_channels, BLOCK_K)
    first = tl.program_id(1) * tl.cdiv(TAPS * blocks, tl.num_programs(1)) if IS_SPLIT else 0
    ahead = first // blocks * half_channels + first % blocks * BLOCK_K + 64 * tl.arange(0, 4)
    prefetch(weight_rows + tl.minimum(ahead, TAPS * half_channels - 1)[None, :])


@triton.jit
def _load(pointers, inside, EVEN_K: tl.constexpr):
    return tl.load(pointers) if EVEN_K else tl.load(pointers, mask=inside, other=0)


@triton.jit
def _gelu(x, PTX: tl.constexpr):
    """x Phi(x) as max(x, 0) - u (1 - Phi(u)), u = |x|; 1 - Phi(u) is 2 to the power of a polynomial.

    The polynomial has the least error of u (1 - Phi(u)), 4.4e-7; with rounding in fp32 it is 6.4e-7. A form with
    ``tanh.approx`` saves an instruction or two, but its relative error of 2^-11 changes 6 of 10 000 int8 results.
    """
    u = tl.abs(x)
    exponent = (((-0.00047329405 * u + 0.0070844616) * u - 0.05182717) * u - 0.45999264) * u - 1.1507878
    return tl.maximum(x, 0.0) - u * exp2(exponent * u - 1.0000376, PTX)


class Geometry(NamedTuple):
    """The geometry of a convolution; by default that of a linear layer, a 1x1 convolution of its rows."""

    kernel_size: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    upsample: bool = False

    @property
    def is_linear(self) -> bool:
        return (*self.kernel_size, *self.stride, self.upsample) == (1, 1, 1, 1, False)


LINEAR = Geometry()


class Epilogue(NamedTuple):
    """The operations on a product after its scale, in this order but for the statistics, which are of the result."""

    bias: Tensor | None = None
    channel_add: Tensor | None = None
    residual: Tensor | None = None
    statistics: Tensor | None = None
    geglu: bool = False
    next_quantizer: Quantizer | None = None


def launch(
    x: Tensor,
    weight: PackedWeight,
    quantizer: Quantizer,
    out: Tensor,
    epilogue: Epilogue,
    geometry: Geometry = LINEAR,
    tuned: LaunchConfig | None = None,
) -> Any:
    """Launches ``int4_gemm_kernel``, which fills ``out`` [B, ..., N] and the statistics; returns the compiled kernel.

    x is [B, ..., K] for a linear layer, otherwise the padded image [B, H, W, K]; all tensors are contiguous and have
    been checked (see ``ops``). ``tuned`` takes the place of the tuning file's configuration. If it was asked for
    (``uses_hopper_gemm``), ``hopper_gemm_kernel`` computes the linear layers that it serves.
    """
    bias, channel_add, residual, statistics, geglu, following = epilogue
    out_channels, num_rows = out.shape[-1], out.numel() // out.shape[-1]
    rows_per_sample = num_rows // x.shape[0]
    half_channels = x.shape[-1] // 2
    reduction = 2 * weight.values.numel() // weight.values.shape[0]
    op = "linear_geglu" if geglu else "linear" if geometry.is_linear else "conv2d"
    target = current_target()
    if tuned is None and uses_hopper_gemm(target) and op == "linear":
        from dq_kernels.triton import hopper_gemm  # Gluon is imported by those who ask for it

        if channel_add is None and statistics is None and hopper_gemm.serves(x, weight.values):
            return hopper_gemm.launch(x, weight, quantizer, out, bias, residual, following)
    problem = Problem(op, num_rows, out_channels, reduction, rows_per_sample, statistics is not None)
    config = launch_config(problem) if tuned is None else adjusted(tuned, problem)
    num_tiles = cdiv(out_channels, config.block_n) * cdiv(num_rows, config.block_m)
    partial = arrivals = None
    if config.split_k > 1:
        tile = (config.block_n, config.block_m)
        partial = torch.empty(config.split_k, num_tiles, *tile, dtype=torch.int32, device=x.device)
        arrivals = arrival_counters(num_tiles, x.device)
    return int4_gemm_kernel[(num_tiles, config.split_k)](
        x,
        weight.values,
        weight.sum,
        quantizer.scale,
        quantizer.zero_point,
        weight.scale,
        quantizer.timestep_index,
        bias,
        channel_add,
        residual,
        None if following is None else following.dilation,
        None if following is None else following.scale,
        None if following is None else following.zero_point,
        out,
        statistics,
        partial,
        arrivals,
        num_rows,
        rows_per_sample,
        x.shape[1] if x.ndim == 4 else 1,
        x.shape[2] if x.ndim == 4 else 1,
        out.shape[-2],
        quantizer.scale.numel(),
        out_channels,
        half_channels,
        0 if channel_add is None else channel_add.stride(0),
        config.group_m,
        KERNEL_H=geometry.kernel_size[0],
        KERNEL_W=geometry.kernel_size[1],
        STRIDE_H=geometry.stride[0],
        STRIDE_W=geometry.stride[1],
        DILATION_H=geometry.dilation[0],
        DILATION_W=geometry.dilation[1],
        UPSAMPLE=geometry.upsample,
        GEGLU=geglu,
        NEXT_BITS=8 if following is None else following.bits,
        STATISTICS_ROWS=STATISTICS_ROWS,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        IS_SPLIT=config.split_k > 1,
        EVEN_K=half_channels % config.block_k == 0,
        JOIN_HALVES=joins_halves(target),
        TILE_IN_SAMPLE=rows_per_sample % config.block_m == 0,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch_options(),
        **register_limit(config, problem, target),
        enable_fp_fusion=True,  # the default until Triton 3.10
    )


def int4_linear(
    x: Tensor, weight: PackedWeight, quantizer: Quantizer, bias: Tensor | None, residual: Tensor | None,
    out_dtype: torch.dtype, next_quantizer: Quantizer | None = None,
) -> Tensor:  # fmt: skip
    """As ``reference.int4_linear``."""
    dtype = out_dtype if next_quantizer is None else torch.int8
    out = torch.empty(*x.shape[:-1], weight.values.shape[0], dtype=dtype, device=x.device)
    launch(x, weight, quantizer, out, Epilogue(bias, residual=residual, next_quantizer=next_quantizer))
    return out


def int4_geglu_quantize(
    x: Tensor, weight: PackedWeight, quantizer: Quantizer, next_quantizer: Quantizer, bias: Tensor | None
) -> Tensor:
    """As ``reference.int4_geglu_quantize``."""
    out = torch.empty(*x.shape[:-1], next_quantizer.dilation.numel(), dtype=torch.int8, device=x.device)
    launch(x, weight, quantizer, out, Epilogue(bias, geglu=True, next_quantizer=next_quantizer))
    return out


def int4_conv2d(
    x: Tensor, weight: PackedWeight, quantizer: Quantizer, bias: Tensor | None, channel_add: Tensor | None,
    residual: Tensor | None, stride: tuple[int, int], dilation: tuple[int, int], upsample: bool,
    out_dtype: torch.dtype, with_statistics: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As ``reference.int4_conv2d``."""
    batch, out_channels, kernel_h, kernel_w = x.shape[0], *weight.values.shape[:3]
    geometry = Geometry((kernel_h, kernel_w), (stride[0], stride[1]), (dilation[0], dilation[1]), upsample)
    size = conv2d_output_size(x.shape[1:3], *geometry)
    out = torch.empty(batch, *size, out_channels, dtype=out_dtype, device=x.device)
    shape = statistics_shape(batch, size, out_channels, with_statistics)
    statistics = torch.empty(shape, dtype=torch.float32, device=x.device)
    epilogue = Epilogue(bias, channel_add, residual, statistics if with_statistics else None)
    launch(x, weight, quantizer, out, epilogue, geometry)
    return out, statistics
