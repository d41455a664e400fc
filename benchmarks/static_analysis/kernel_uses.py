"""The operators' uses of each Triton kernel, in every shipped configuration, and their compilation.

A use has the specialisation of SD1.5's layers at the larger levels: pointers, channel counts and image sizes are
multiples of 16, the sizes of padded images are not.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from benchmarks.static_analysis.int8_baseline import int8_gemm_kernel
from dq_kernels.shapes import BLOCK_KEYS, STATISTICS_ROWS
from dq_kernels.triton import attention, float_attention, norm, quantization
from dq_kernels.triton.gemm import int4_gemm_kernel
from dq_kernels.triton.launch import options_of
from dq_kernels.triton.tuning import (
    AMD_FILE,
    FILES,
    LaunchConfig,
    Problem,
    adjusted,
    joins_halves,
    register_limit,
    tuned_shapes,
)

TARGETS = {
    **{f"sm_{capability}": GPUTarget("cuda", capability, 32) for capability in (80, 86, 89, 90, 100)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

INT8, INT32, FP16, FP32 = "*i8", "*i32", "*fp16", "*fp32"
TYPES = {
    **dict.fromkeys(("x_ptr", "skip_ptr"), INT8),
    "weight_ptr": "*u8",
    **dict.fromkeys(("weight_sum_ptr", "timestep_index_ptr"), INT32),
    **dict.fromkeys(("partial_ptr", "arrivals_ptr"), INT32),
    **dict.fromkeys(("act_zero_point_ptr", "next_zero_point_ptr", "plain_zero_point_ptr"), INT32),
    **dict.fromkeys(("weight_scale_ptr", "act_scale_ptr", "next_scale_ptr", "plain_scale_ptr"), FP32),
    **dict.fromkeys(("weight_dilation_ptr", "next_dilation_ptr", "plain_dilation_ptr"), FP32),
    **dict.fromkeys(("statistics_ptr", "skip_statistics_ptr"), FP32),
    **dict.fromkeys(("bias_ptr", "channel_add_ptr", "residual_ptr", "out_ptr"), FP16),
    **dict.fromkeys(("query_ptr", "key_ptr", "value_ptr"), FP16),
    **dict.fromkeys(("key8_ptr", "value8_ptr"), INT8),
    **dict.fromkeys(("key_sums_ptr", "value_sums_ptr", "value_mean_ptr", "scales_ptr"), FP32),
    "value8_sums_ptr": INT32,
    "plain_out_ptr": INT8,
    **dict.fromkeys(("eps", "score_scale"), "fp32"),
}  # fmt: skip


# The optional pointers of the GEMM.
OPTIONAL = (
    *("bias_ptr", "channel_add_ptr", "residual_ptr", "statistics_ptr", "partial_ptr", "arrivals_ptr"),
    *("next_dilation_ptr", "next_scale_ptr", "next_zero_point_ptr"),
)
PARTIAL, NEXT = OPTIONAL[4:6], OPTIONAL[6:]


@dataclass(frozen=True)
class Use:
    """One specialisation of a kernel, apart from launch configuration and target.

    ``op`` is its name in the tuning files, None for a kernel without tuning. ``odd`` are integer arguments that are not
    multiples of 16, beside those that the kernel does not specialise. ``types`` are argument types that differ from
    ``TYPES``.
    """

    kernel: Any
    name: str
    constants: Mapping[str, Any]
    op: str | None = None
    odd: tuple[str, ...] = ("num_timesteps",)
    types: Mapping[str, str] = field(default_factory=dict)
    fp_fusion: bool = True
    num_warps: int = 4
    num_stages: int | None = None

    def configs(self, target: str) -> list[LaunchConfig | None]:
        """The shipped configurations for the target that the compiler distinguishes."""
        if self.op is None:
            return [None]
        shapes = (shape for shape in tuned_shapes(tuning_file(target)) if shape.op == self.op)
        return list(dict.fromkeys(self._compiled(shape.config) for shape in shapes))

    @property
    def problem(self) -> Problem:
        """The problem of a use with tuning, as far as it decides the launch."""
        rows_per_sample = 0 if self.constants["TILE_IN_SAMPLE"] else 1  # a multiple of every tile size, or of none
        return Problem(self.op or "", 1, 1, 1, rows_per_sample, "statistics_ptr" not in self.constants)

    def _compiled(self, config: LaunchConfig) -> LaunchConfig:
        """The adjusted configuration as launched; ``group_m`` is 1, and ``split_k`` above 1 is 2."""
        config = adjusted(config, self.problem)
        return replace(config, group_m=1, split_k=2 if config.split_k > 1 else 1)


def tuning_file(target: str) -> str:
    """The tuning file for a target."""
    return AMD_FILE if TARGETS[target].backend == "hip" else FILES[TARGETS[target].arch]


def _gemm(
    name: str, op: str, *present: str, size: int = 1, types: Mapping[str, str] | None = None, **other: Any
) -> Use:
    """A use of the GEMM with some optional arguments, as a convolution with ``size`` x ``size`` taps."""
    constants: dict[str, Any] = {"KERNEL_H": size, "KERNEL_W": size, "STRIDE_H": 1, "STRIDE_W": 1}
    constants |= {"DILATION_H": 1, "DILATION_W": 1, "UPSAMPLE": False, "GEGLU": False, "NEXT_BITS": 8}
    constants |= {"STATISTICS_ROWS": STATISTICS_ROWS, "EVEN_K": True, "TILE_IN_SAMPLE": True} | other
    constants |= {address: None for address in OPTIONAL if address not in present}
    return Use(int4_gemm_kernel, name, constants, op, types=types or {})


# Even K: 640 or 1280 channels. Ragged K: 320 or 960 channels. Across samples: a tile has rows of two samples.
RAGGED, ACROSS = {"EVEN_K": False}, {"TILE_IN_SAMPLE": False}
TO_INT8 = {"out_ptr": INT8}
GEMM_USES = (
    _gemm("linear, even K", "linear", "bias_ptr"),
    _gemm("linear, ragged K, residual", "linear", "bias_ptr", "residual_ptr", **RAGGED),
    _gemm("linear, ragged K, residual, across samples", "linear", "bias_ptr", "residual_ptr", **RAGGED, **ACROSS),
    _gemm("linear, GEGLU, quantized", "linear_geglu", "bias_ptr", *NEXT, types=TO_INT8, GEGLU=True, **RAGGED),
    _gemm(
        "linear, GEGLU, quantized, across samples", "linear_geglu", "bias_ptr", *NEXT, types=TO_INT8,
        GEGLU=True, **RAGGED, **ACROSS,
    ),
    _gemm("conv 1x1, residual, statistics", "linear", "bias_ptr", "residual_ptr", "statistics_ptr"),
    _gemm("conv 3x3, even K, addend, statistics", "conv2d", "bias_ptr", "channel_add_ptr", "statistics_ptr", size=3),
    _gemm(
        "conv 3x3, ragged K, residual, statistics", "conv2d", "bias_ptr", "residual_ptr", "statistics_ptr", size=3,
        **RAGGED,
    ),
    _gemm(
        "conv 3x3, ragged K, addend, across samples", "conv2d", "bias_ptr", "channel_add_ptr", size=3,
        **RAGGED, **ACROSS,
    ),
    _gemm("conv 3x3, stride 2", "conv2d", "bias_ptr", size=3, STRIDE_H=2, STRIDE_W=2),
    _gemm("conv 3x3, upsampled, statistics", "conv2d", "bias_ptr", "statistics_ptr", size=3, UPSAMPLE=True),
)  # fmt: skip
_TO_INT8 = {"x_ptr": FP16, "skip_ptr": FP16, "weight_ptr": FP16, "out_ptr": INT8}
_TO_STATISTICS = {"x_ptr": FP16, "out_ptr": FP32}
_QUANTIZE = partial(Use, quantization.quantize_kernel, types=_TO_INT8, fp_fusion=False)
_QUANTIZE_TILE = {"BITS": 8, "BLOCK_L": quantization.BLOCK_LENGTH, "BLOCK_K": quantization.BLOCK_CHANNELS}
_UNPADDED, _PADDED = {"PAD_H": 0, "PAD_W": 0}, {"PAD_H": 1, "PAD_W": 1}
_CHANNELS_LAST, _CHANNELS_FIRST = {"stride_k": 1}, {"stride_l": 1}
_CHANNEL_STATISTICS = partial(Use, norm.channel_statistics_kernel, types=_TO_STATISTICS)
_STATISTICS_TILE = {"ROWS": STATISTICS_ROWS, "BLOCK_K": norm.STATISTICS_CHANNELS}
_MERGE_RUNS = partial(Use, norm.merge_runs_kernel, types={"out_ptr": FP32})
_GROUP_NORM = partial(Use, norm.group_norm_quantize_kernel, types=_TO_INT8, odd=(), fp_fusion=False)
_NORM = _PADDED | {"SILU": True, "BITS": 8, "PLAIN_BITS": 8, "stride_k": 1, "skip_stride_k": 1}
_NO_SKIP = dict.fromkeys(("skip_ptr", "skip_statistics_ptr"))
_NO_PLAIN = dict.fromkeys(("plain_dilation_ptr", "plain_scale_ptr", "plain_zero_point_ptr", "plain_out_ptr"))
_LAYER_NORM = partial(
    Use, norm.layer_norm_quantize_kernel, types=_TO_INT8, fp_fusion=False, num_warps=norm.LAYER_NORM_WARPS
)
_NEXT_TABLES = (*NEXT, "timestep_index_ptr")
_PREPARED = ("scales_ptr", "value8_sums_ptr", "value_mean_ptr")


def _head_tile(head_channels: int) -> dict[str, Any]:
    """The attention constants for heads of ``head_channels`` channels, channels last."""
    block_d = attention.padded_head_channels(head_channels)
    tile = {"HEAD_CHANNELS": head_channels, "BLOCK_N": BLOCK_KEYS, "BLOCK_D": block_d}
    return tile | dict.fromkeys(("stride_k", "key_stride_k", "value_stride_k"), 1)


def _attention(name: str, head_channels: int, even: bool = True, quantized: bool = True, few_keys: bool = False) -> Use:
    tile = _head_tile(head_channels)
    block_m, num_warps, num_stages = attention.tile_of(tile["BLOCK_D"], few_keys)
    constants = tile | {"NEXT_BITS": 8, "EVEN_KEYS": even, "BLOCK_M": block_m}
    constants |= {} if quantized else dict.fromkeys(_NEXT_TABLES)
    constants |= dict.fromkeys(_PREPARED) if few_keys else {}
    types = (TO_INT8 if quantized else {}) | ({} if few_keys else {"key_ptr": INT8, "value_ptr": INT8})
    return Use(
        attention.int8_attention_kernel, name, constants, odd=(), types=types,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip


def _keys_values(name: str, head_channels: int) -> Use:
    tile = _head_tile(head_channels) | {"BLOCK_RUNS": attention.BLOCK_RUNS}
    return Use(
        attention.quantize_keys_values_kernel, name, tile, odd=(), fp_fusion=False,
        num_warps=attention.quantizer_warps(tile["BLOCK_D"]),
    )  # fmt: skip


def _float_attention(name: str, head_channels: int) -> Use:
    """Attention to the 77 tokens of a prompt."""
    constants = {"HEAD_CHANNELS": head_channels, "NEXT_BITS": 8, "BLOCK_M": float_attention.BLOCK_QUERIES}
    constants |= {"BLOCK_N": 128, "CHUNK": float_attention.CHUNK}
    constants |= dict.fromkeys(("stride_k", "key_stride_k", "value_stride_k"), 1)
    return Use(
        float_attention.attention_quantize_kernel, name, constants, odd=(), types=TO_INT8, fp_fusion=False,
        num_warps=float_attention.NUM_WARPS,
    )  # fmt: skip


ATTENTION_USES = (
    *(_float_attention(f"heads of {channels} channels", channels) for channels in (40, 64, 80, 160)),
    *(_keys_values(f"heads of {channels} channels", channels) for channels in (40, 64, 80)),
    _attention("heads of 64 channels", 64, quantized=False),
    _attention("heads of 64 channels, quantized", 64),
    _attention("heads of 32 channels, quantized", 32),
    _attention("heads of 40 channels, ragged keys, quantized", 40, even=False),
    _attention("heads of 80 channels, quantized", 80),
    _attention("heads of 80 channels, ragged keys, quantized", 80, even=False),
    *(
        _attention(f"heads of {channels} channels, few keys, quantized", channels, even=False, few_keys=True)
        for channels in (40, 64, 80)
    ),
)
OTHER_USES = (
    _QUANTIZE("channels last", _QUANTIZE_TILE | _UNPADDED | _CHANNELS_LAST),
    _QUANTIZE("channels last, padded", _QUANTIZE_TILE | _PADDED | _CHANNELS_LAST),
    _QUANTIZE("channels first", _QUANTIZE_TILE | _UNPADDED | _CHANNELS_FIRST),
    _QUANTIZE("channels first, padded", _QUANTIZE_TILE | _PADDED | _CHANNELS_FIRST),
    _CHANNEL_STATISTICS("channels last", _STATISTICS_TILE | _CHANNELS_LAST),
    _CHANNEL_STATISTICS("channels first", _STATISTICS_TILE | _CHANNELS_FIRST),
    _MERGE_RUNS("channels last", _STATISTICS_TILE | {"MERGED": norm.MERGED_RUNS}),
    _GROUP_NORM("320 channels, padded", norm.group_tile(10) | _NORM | _NO_SKIP | _NO_PLAIN),
    _GROUP_NORM("1920 channels, padded, skip", norm.group_tile(60) | _NORM | _NO_PLAIN),
    _GROUP_NORM("960 channels, padded, skip, plain", norm.group_tile(30) | _NORM),
    *(
        _LAYER_NORM(f"{channels} channels", {"BITS": 8, "BLOCK_M": norm.LAYER_NORM_TILE // block, "BLOCK_K": block})
        for channels, block in ((320, 512), (640, 1024), (1280, 2048))
    ),
)
USES = {
    (use.kernel.__name__.removesuffix("_kernel"), use.name): use for use in (*GEMM_USES, *ATTENTION_USES, *OTHER_USES)
}


def compile_use(use: Use, target: str, config: LaunchConfig | None) -> CompiledKernel:
    """Compiles a use like the JIT at a launch."""
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 replaces the compiler by the interpreter; unset it to compile kernels")
    constants = dict(use.constants) | options_of(TARGETS[target]) | {"JOIN_HALVES": joins_halves(TARGETS[target])}
    options: dict[str, Any] = {"num_warps": use.num_warps, "enable_fp_fusion": use.fp_fusion}
    options |= {"launch_pdl": constants.get("launch_pdl", False)}
    options |= {} if use.num_stages is None else {"num_stages": use.num_stages}
    if config is not None:
        constants |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
        constants |= {"IS_SPLIT": config.split_k > 1}
        options |= {"num_warps": config.num_warps, "num_stages": config.num_stages}
        options |= register_limit(config, use.problem, TARGETS[target])
        if config.split_k > 1:
            constants = {name: value for name, value in constants.items() if name not in PARTIAL}
    return _compile(use.kernel, target, constants, use.odd, TYPES | dict(use.types), options)


def compile_int8(use: Use, target: str, config: LaunchConfig, parts: int) -> CompiledKernel:
    """Compiles the int8 baseline of a use of the GEMM."""
    constants = dict(use.constants)
    constants |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "PARTS": parts}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    types = {"x_ptr": INT8, "weight_ptr": INT8, "out_ptr": INT32}
    return _compile(int8_gemm_kernel, target, constants, use.odd, types, options)


def _compile(
    kernel: Any,
    target: str,
    constants: Mapping[str, Any],
    odd: tuple[str, ...],
    types: Mapping[str, str],
    options: dict[str, Any],
) -> CompiledKernel:
    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    divisible = (
        parameter.name
        for parameter in kernel.params
        if signature[parameter.name][0] in "*i" and not parameter.do_not_specialize and parameter.name not in odd
    )
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    return triton.compile(source, target=TARGETS[target], options=options)


def shipped(target: str) -> Iterator[tuple[tuple[str, str], LaunchConfig | None]]:
    """Every key of ``USES`` with each of its shipped configurations for a target."""
    for key, use in USES.items():
        for config in use.configs(target):
            yield key, config
