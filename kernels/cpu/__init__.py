"""The operators on CPUs: the same names and signatures as in ``reference``."""

from dq_kernels.cpu.attention import attention_quantize, int8_attention, int8_attention_quantize
from dq_kernels.cpu.onednn import free_prepacked, int4_conv2d, int4_geglu_quantize, int4_linear, prepacked_bytes
from dq_kernels.cpu.quantization import group_norm_quantize, layer_norm_quantize, quantize

__all__ = [
    "attention_quantize",
    "free_prepacked",
    "group_norm_quantize",
    "int4_conv2d",
    "int4_geglu_quantize",
    "int4_linear",
    "int8_attention",
    "int8_attention_quantize",
    "layer_norm_quantize",
    "prepacked_bytes",
    "quantize",
]
