"""Linear layers of other libraries, for ``bench_kernels.py``. None of the libraries is a dependency.

Each function takes the weight [N, K] of a bias-free linear on the GPU and returns a callable for x [B, ..., K]. Errors
of the library pass through. Activations are fp16, or bf16 if a library's kernel supports nothing else. The calls follow
the libraries' documentation (docs.pytorch.org/ao; the READMEs of gemlite and SDNQ).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor, nn

GROUP_SIZE = 64
Linear = Callable[[Tensor], Tensor]


def _module(weight: Tensor) -> nn.Sequential:
    """A container: the libraries replace the linears *inside* a module."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return nn.Sequential(linear).eval()


def torchao_int4_weight_only(weight: Tensor) -> Linear:
    """tinygemm's kernel, groups of 64; it supports bf16 alone."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    module = _module(weight.to(torch.bfloat16))
    quantize_(module, Int4WeightOnlyConfig(group_size=GROUP_SIZE, int4_packing_format="tile_packed_to_4d"))
    return module


def torchao_int8_dynamic(weight: Tensor) -> Linear:
    """int8 x int8, one scale per row of x; compiled, as torchao's documentation recommends."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    module = _module(weight)
    quantize_(module, Int8DynamicActivationInt8WeightConfig())
    return torch.compile(module, dynamic=False)


def gemlite_int4_weight_only(weight: Tensor) -> Linear:
    """Groups of 64 in HQQ's format: w = (q - zero) scale, q in 0...15."""
    from gemlite.core import DType, GemLiteLinear

    out_features, in_features = weight.shape
    groups = weight.float().reshape(-1, GROUP_SIZE)
    low, high = groups.aminmax(dim=1, keepdim=True)
    scales = (high - low) / 15
    zeros = -low / scales
    values = (groups / scales + zeros).round().clamp(0, 15).to(torch.uint8).view(out_features, in_features)
    linear = GemLiteLinear(
        4,
        group_size=GROUP_SIZE,
        in_features=in_features,
        out_features=out_features,
        input_dtype=DType.FP16,
        output_dtype=DType.FP16,
    )
    linear.pack(values, scales.to(weight.dtype), zeros.to(weight.dtype), None)
    return linear


def gemlite_int8_dynamic(weight: Tensor) -> Linear:
    """int8 x int8, one scale per row of x."""
    from gemlite.helper import A8W8_INT8_dynamic

    return A8W8_INT8_dynamic(device=str(weight.device), dtype=weight.dtype).from_linear(_module(weight)[0])


def sdnq_int4_weight_only(weight: Tensor) -> Linear:
    """Unpacks to fp16, then multiplies in fp16."""
    return _sdnq(weight, weights_dtype="int4", use_quantized_matmul=False)


def sdnq_int4_int8_dynamic(weight: Tensor) -> Linear:
    """4-bit storage, int8 x int8, one scale per row of x: the scheme closest to our kernels."""
    return _sdnq(weight, weights_dtype="int4", group_size=-1, use_quantized_matmul=True)


def sdnq_int8_dynamic(weight: Tensor) -> Linear:
    """int8 x int8, one scale per row of x."""
    return _sdnq(weight, weights_dtype="int8", use_quantized_matmul=True)


def _sdnq(weight: Tensor, **options: object) -> Linear:
    from sdnq import sdnq_post_load_quant

    return sdnq_post_load_quant(_module(weight), **options)


PEERS: dict[str, Callable[[Tensor], Linear]] = {
    "torchao int4 weight-only": torchao_int4_weight_only,
    "torchao int8 dynamic": torchao_int8_dynamic,
    "gemlite int4 weight-only": gemlite_int4_weight_only,
    "gemlite int8 dynamic": gemlite_int8_dynamic,
    "sdnq int4 weight-only": sdnq_int4_weight_only,
    "sdnq int4, int8 dynamic": sdnq_int4_int8_dynamic,
    "sdnq int8 dynamic": sdnq_int8_dynamic,
}


def activation_dtype(name: str) -> torch.dtype:
    """The dtype of x that a peer takes."""
    return torch.bfloat16 if name == "torchao int4 weight-only" else torch.float16


def weight_bits(name: str) -> int:
    """The number of bits of a peer's weights."""
    return 4 if "int4" in name else 8


def missing(name: str) -> str | None:
    """The reason why a peer cannot run here, or None."""
    package = name.split()[0]
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    return None if torch.cuda.is_available() else "needs a GPU"
