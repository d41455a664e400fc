"""The operators on CUDA and HIP devices, as Triton kernels: the same names and signatures as in ``reference``."""

from dq_kernels.triton.attention import int8_attention, int8_attention_quantize
from dq_kernels.triton.float_attention import attention_quantize
from dq_kernels.triton.gemm import int4_conv2d, int4_geglu_quantize, int4_linear
from dq_kernels.triton.norm import group_norm_quantize, layer_norm_quantize
from dq_kernels.triton.quantization import quantize

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
