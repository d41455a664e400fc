"""The CPU operators' parts in C++, compiled at the first use.

``single_pass.cpp`` has the elementwise parts, each as one pass over memory; ``gemm.cpp`` the products, for processors
with AVX2 or AVX-512 VNNI.

Compilation takes a few seconds, once a machine: the library is kept in ``$XDG_CACHE_HOME/dq_runtime`` (by default
``~/.cache/dq_runtime``), under a name made from the source, the compiler and the processor's instruction set. Without a
C++ compiler ``library`` returns None, and the operators run their plain torch form.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dq_kernels.records import Norm, PackedWeight, Quantizer
from dq_kernels.shapes import quantized_shape

SOURCES = [Path(__file__).with_name(name) for name in ("single_pass.cpp", "gemm.cpp")]
# No fused multiply-add: the integers must be those of the oracle. The last two let compilers vectorize ``floor``.
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
# By dq_has_gemm: none, AVX2, VNNI. With AVX2 oneDNN computes large layers up to twice as fast.
MOST_PRODUCTS = (-1, 2**22, 2**63)
OPTIONAL_FLAGS = (("-march=native", "-fopenmp"), ("-fopenmp",), ())  # the first that the compiler takes
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _QuantizerArguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("dilation", "scale", "zero_point", "timestep_index")),
        *((name, ctypes.c_int64) for name in ("channels", "timesteps", "bits")),
    ]


class _GemmArguments(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            *("samples", "height", "width", "channels", "out_height", "out_width", "out_channels"),
            *("kernel_h", "kernel_w", "stride_h", "stride_w", "dilation_h", "dilation_w", "upsample", "timesteps"),
        )
    ]


_TENSOR, _SIZE, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_QUANTIZER = ctypes.POINTER(_QuantizerArguments)
_SIGNATURES = {
    "dq_quantize": [_INT, _TENSOR, *[_SIZE] * 6, _QUANTIZER, _TENSOR, _INT],
    "dq_group_norm_quantize": [
        _INT, _TENSOR, _TENSOR, *[_SIZE] * 6, _TENSOR, _TENSOR, _FLOAT, _INT, _TENSOR, _TENSOR, _SIZE, _SIZE,
        _QUANTIZER, _TENSOR, _QUANTIZER, _TENSOR, _INT,
    ],
    "dq_layer_norm_quantize": [_INT, _TENSOR, *[_SIZE] * 3, _TENSOR, _TENSOR, _FLOAT, _QUANTIZER, _TENSOR, _INT],
    "dq_geglu_quantize": [_TENSOR, *[_SIZE] * 3, _QUANTIZER, _TENSOR, _INT],
    "dq_finish": [_INT, _TENSOR, *[_SIZE] * 3, _TENSOR, _QUANTIZER, *[_TENSOR] * 5, _INT],
    "dq_multiply": [ctypes.POINTER(_GemmArguments), *[_TENSOR] * 9, _INT, *[_TENSOR] * 4, _INT],
}  # fmt: skip


def found_compiler() -> str | None:
    """The path of the C++ compiler, if there is one."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++"))), None)


@cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None, after a warning, without a C++ compiler."""
    compiler = found_compiler()
    if compiler is None:
        reason = "no C++ compiler was found ($CXX, c++, g++, clang++)"
    else:
        try:
            functions = ctypes.CDLL(str(_compile(compiler)))
        except (OSError, subprocess.SubprocessError) as error:
            reason = f"{compiler} failed: {getattr(error, 'stderr', None) or error}"
        else:
            for name, arguments in _SIGNATURES.items():
                getattr(functions, name).argtypes = arguments
                getattr(functions, name).restype = None
            functions.instructions = functions.dq_has_gemm()  # type: ignore[attr-defined]
            return functions
    warnings.warn(f"INT4 layers on the CPU run their plain form, which is several times slower: {reason}", stacklevel=2)
    return None


def gemm(products: int) -> ctypes.CDLL | None:
    """The compiled functions, if they compute so many products faster on this processor than oneDNN."""
    functions = library()
    if functions is None:
        return None
    instructions: Any = functions.instructions
    return functions if products <= MOST_PRODUCTS[instructions] else None


def _compile(compiler: str) -> Path:
    """The path of the compiled library."""
    source = b"".join(path.read_bytes() for path in SOURCES)
    failure: Exception | None = None
    for optional in OPTIONAL_FLAGS:
        flags = [*FLAGS, *optional]
        try:
            # The predefined macros name the compiler's version and the instruction sets.
            macros = _run([compiler, *flags, "-x", "c++", "-dM", "-E", os.devnull])
            name = hashlib.sha256(b"\0".join([source, macros, *map(str.encode, flags)])).hexdigest()[:24]
            path = _cache_folder() / f"single_pass_{name}.so"
            if not path.exists():
                with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                    made = Path(folder) / path.name
                    _run([compiler, *flags, *map(str, SOURCES), "-o", str(made)])
                    made.replace(path)  # other processes see all of the file, or none
        except (OSError, subprocess.SubprocessError) as error:
            failure = failure or error
        else:
            return path
    assert failure is not None
    raise failure


def _run(command: list[str]) -> bytes:
    return subprocess.run(command, check=True, capture_output=True, timeout=300).stdout


@cache
def _cache_folder() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dq_runtime"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="dq_runtime_"))  # a read-only home: compiled again in every process
    return folder


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _tables(quantizer: Quantizer) -> _QuantizerArguments:
    dilation, scale, zero_point, timestep_index, bits = quantizer
    return _QuantizerArguments(
        dilation.data_ptr(), scale.data_ptr(), zero_point.data_ptr(), timestep_index.data_ptr(), dilation.shape[0],
        scale.shape[0], bits,
    )  # fmt: skip


def _float(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.float().contiguous()


def _image_sizes(x: Tensor) -> tuple[int, int, int, int]:
    """Samples, height, width and channels of an image; other tensors [B, ..., K] are images of one row."""
    if x.ndim == 4:
        return x.shape[0], x.shape[1], x.shape[2], x.shape[3]
    return x.shape[0], 1, x.shape[1:-1].numel(), x.shape[-1]


def quantize(functions: ctypes.CDLL, x: Tensor, quantizer: Quantizer, padding: tuple[int, int]) -> Tensor:
    """As ``reference.quantize``."""
    source, _ = _readable(x)
    out = torch.empty(quantized_shape(x.shape, padding), dtype=torch.int8)
    functions.dq_quantize(
        _DTYPES[source.dtype], source.data_ptr(), *_image_sizes(x), *padding,
        _tables(quantizer), out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def _readable(x: Tensor, skip: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Both in one dtype, contiguous."""
    if skip is None:
        return x.contiguous(), None
    if skip.dtype != x.dtype:
        x, skip = x.float(), skip.float()
    return x.contiguous(), skip.contiguous()


def group_norm_quantize(
    functions: ctypes.CDLL, x: Tensor, num_groups: int, norm: Norm, quantizer: Quantizer, silu: bool,
    skip: Tensor | None, statistics: Tensor | None, skip_statistics: Tensor | None, padding: tuple[int, int],
    plain_quantizer: Quantizer | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As ``reference.group_norm_quantize``; reads the statistics that are given."""
    source, beside = _readable(x, skip)
    beside_channels = 0 if skip is None else skip.shape[-1]
    weight, bias = _float(norm.weight), _float(norm.bias)
    shape = [*x.shape[:-1], x.shape[-1] + beside_channels]
    out = torch.empty(quantized_shape(shape, padding), dtype=torch.int8)
    plain_out = torch.empty(0 if plain_quantizer is None else shape[0], *shape[1:], dtype=torch.int8)
    functions.dq_group_norm_quantize(
        _DTYPES[source.dtype], source.data_ptr(), _pointer(beside), *_image_sizes(x), beside_channels, num_groups,
        _pointer(weight), _pointer(bias), norm.eps, silu, _pointer(statistics), _pointer(skip_statistics), *padding,
        _tables(quantizer), out.data_ptr(), None if plain_quantizer is None else _tables(plain_quantizer),
        plain_out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out, plain_out


def layer_norm_quantize(functions: ctypes.CDLL, x: Tensor, norm: Norm, quantizer: Quantizer) -> Tensor:
    """As ``reference.layer_norm_quantize``."""
    source, _ = _readable(x)
    weight, bias = _float(norm.weight), _float(norm.bias)
    out = torch.empty(quantized_shape(x.shape, (0, 0)), dtype=torch.int8)
    functions.dq_layer_norm_quantize(
        _DTYPES[source.dtype], source.data_ptr(), x.shape[0], x.shape[1:-1].numel(), x.shape[-1], _pointer(weight),
        _pointer(bias), norm.eps, _tables(quantizer), out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def geglu_quantize(functions: ctypes.CDLL, product: Tensor, quantizer: Quantizer) -> Tensor:
    """fp32 [B, ..., 2 N], hidden beside gates -> int8 [B, ..., N padded to even]."""
    channels = product.shape[-1] // 2
    out = torch.empty(quantized_shape((*product.shape[:-1], channels), (0, 0)), dtype=torch.int8)
    functions.dq_geglu_quantize(
        product.data_ptr(), product.shape[0], product.shape[1:-1].numel(), channels, _tables(quantizer),
        out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def panels(weight: Tensor) -> Tensor:
    """int8 [N, taps, K] -> [N / 64, ...]: the layout that ``multiply`` reads, padded with zeros.

    64 output channels have their sums in int32, then [taps, K / 4, 64, 4].
    """
    out_channels, taps, channels = weight.shape
    padded = F.pad(weight, (0, -channels % 4, 0, 0, 0, -out_channels % 64))
    values = padded.view(-1, 64, taps, padded.shape[2] // 4, 4).permute(0, 2, 3, 1, 4).flatten(1)
    sums = padded.sum((1, 2), dtype=torch.int32).view(-1, 64).view(torch.int8)
    return torch.cat([sums, values], dim=1)


@lru_cache(maxsize=4096)
def _gemm_arguments(*sizes: int) -> _GemmArguments:
    return _GemmArguments(*sizes)


def multiply(
    functions: ctypes.CDLL, x: Tensor, prepacked: Tensor, weight: PackedWeight, quantizer: Quantizer,
    bias: Tensor | None, out_shape: tuple[int, ...], geometry: tuple[int, ...], out_dtype: torch.dtype,
    channel_add: Tensor | None = None, residual: Tensor | None = None, statistics: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The product of an int8 image or [B, ..., K], its zero point, scales and bias: [B, ..., N], and ``finish``.

    Args:
        prepacked: from ``panels``.
        out_shape: [B, ..., N], of an image [B, OH, OW, N].
        geometry: heights and widths of the kernel, the strides and the dilations, and 1 for an image to be doubled.
        out_dtype: also that of channel_add and residual.
    """
    _, scale, zero_point, timestep_index, _ = quantizer
    product = torch.empty(out_shape, dtype=torch.float32)
    out = product if out_dtype == torch.float32 else torch.empty(out_shape, dtype=out_dtype)
    bias = _float(bias)
    finishes = out is not product or channel_add is not None or residual is not None or statistics is not None
    channel_add = None if channel_add is None else channel_add.contiguous()
    size = out_shape[1:3] if x.ndim == 4 else (1, x.shape[1:-1].numel())
    functions.dq_multiply(
        _gemm_arguments(*_image_sizes(x), *size, out_shape[-1], *geometry, scale.shape[0]),
        x.data_ptr(), prepacked.data_ptr(), weight.sum.data_ptr(), weight.scale.data_ptr(), scale.data_ptr(),
        zero_point.data_ptr(), timestep_index.data_ptr(), _pointer(bias), product.data_ptr(), _DTYPES[out_dtype],
        _pointer(channel_add), _pointer(residual), out.data_ptr() if finishes else None, _pointer(statistics),
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def finish(
    functions: ctypes.CDLL, product: Tensor, out_dtype: torch.dtype, correction: Tensor | None = None,
    quantizer: Quantizer | None = None, bias: Tensor | None = None, channel_add: Tensor | None = None,
    residual: Tensor | None = None, statistics: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The end of a GEMM: product fp32 [B, ..., N] -> its sum with the addends, in ``out_dtype``; fills the statistics.

    Args:
        correction: [N], if the product lacks its activation scale and zero point: the weight's sum times its scale.
        quantizer: the tables that the correction needs.
    """
    out = product if out_dtype == torch.float32 else torch.empty(product.shape, dtype=out_dtype)
    bias = _float(bias)
    channel_add, residual = (
        None if addend is None else addend.to(out_dtype).contiguous() for addend in (channel_add, residual)
    )
    functions.dq_finish(
        _DTYPES[out_dtype], product.data_ptr(), product.shape[0], product.shape[1:-1].numel(), product.shape[-1],
        _pointer(correction), None if quantizer is None else _tables(quantizer), _pointer(bias),
        _pointer(channel_add), _pointer(residual), out.data_ptr(), _pointer(statistics), torch.get_num_threads(),
    )  # fmt: skip
    return out
