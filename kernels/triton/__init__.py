"""The operators on CUDA and HIP devices, as Triton kernels: the same names and signatures as in ``reference``.

Without the package triton (macOS, Windows) each operator raises ImportError when it is called.
"""

from __future__ import annotations

from typing import Any

try:
    from dq_kernels.triton.attention import int8_attention, int8_attention_quantize
    from dq_kernels.triton.float_attention import attention_quantize
    from dq_kernels.triton.gemm import int4_conv2d, int4_geglu_quantize, int4_linear
    from dq_kernels.triton.norm import group_norm_quantize, layer_norm_quantize
    from dq_kernels.triton.quantization import quantize
except ModuleNotFoundError as _error:
    if str(_error.name).partition(".")[0] != "triton":
        raise

__all__ = [
    "attention_quantize",
    "group_norm_quantize",
    "int4_conv2d",
    "int4_geglu_quantize",
    "int4_linear",
    "int8_attention",
    "int8_attention_quantize",
    "layer_norm_quantize",
    "quantize",
]


def __getattr__(name: str) -> Any:
    """An operator that was not imported."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def unavailable(*arguments: Any) -> Any:
        raise ImportError(
            f"{name} needs Triton on a GPU, and the package triton is not installed: pip install triton "
            "(triton-windows on Windows), or move the model to the CPU"
        )

    return unavailable
