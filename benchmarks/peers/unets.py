"""Post-training quantization of whole UNets by other libraries, on the CPU: what a quality table compares us with.

Each peer takes a stock fp32 UNet and returns a quantized copy, made through the library's own public API as its
documentation says (torchao's ``quantize_``; quanto's ``quantize``, ``Calibration`` and ``freeze``; SDNQ's
``sdnq_post_load_quant``). Rules for all of them, so that they quantize the same layers as far as they can:

- ``conv_in`` and ``conv_out`` stay in floating point, as with our own method; every library has an option for it.
- Every other linear and convolution is quantized where the library can do so, whatever its size: SDNQ's rules to skip
  layers under 16,384 weights and by name, meant for big models, are off.
- Norms, embeddings and biases stay in floating point.

What they cannot do is in each peer's ``limits``. Left out, because it does not run on an x86 CPU: torchao
0.18's ``Int4WeightOnlyConfig``, whose formats need the package mslk, CUDA or XPU, and the packed formats of its
``Int8DynamicActivationIntxWeightConfig``, whose kernels the x86 wheel lacks. So torchao's 4-bit values lie in int8
here, one a byte.

None of the libraries is a dependency; ``pip install torchao optimum-quanto sdnq ninja`` installs them. quanto's 4-bit
weights compile a small C++ extension when they are first used, which takes a minute or two. Linear layers on a GPU are
in ``linears.py`` (there, SDNQ's int4 has a scale for each output channel).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import cpp_extension

from dq_runtime import CalibrationSet

KEPT = ("conv_in", "conv_out")
GROUP_SIZE = 32  # of torchao's 4-bit weights, its default for dynamic activations; divides all channels of small UNets
SDNQ_CONVOLUTION_GROUP_SIZE = 32  # SDNQ's choice for 4-bit weights
INT4 = torch.int4  # type: ignore[attr-defined]
LAYERS = (nn.Linear, nn.Conv2d)

Quantize = Callable[[Any, CalibrationSet], Any]


@dataclass(frozen=True)
class Peer:
    """A library and a scheme.

    Attributes:
        package: the distribution that pip installs.
        weight_bits: of the quantized layers' weights.
        activation_bits: of the quantized layers' inputs; 32: they are not quantized.
        quantize: a quantized copy of an fp32 UNet on the CPU; the UNet itself stays as it is. Who has static
            activation scales finds them with the calibration set, in the order of its calls; the others ignore it.
        limits: what stays in floating point beside ``KEPT``, and what is not as the name suggests.
    """

    name: str
    package: str
    weight_bits: int
    activation_bits: int
    quantize: Quantize
    limits: tuple[str, ...] = ()


@dataclass(frozen=True)
class Coverage:
    """How much of a UNet is quantized.

    Attributes:
        quantized: the number of linears and convolutions whose weights are.
        kept: the names of those whose weights are not.
        weight_share: of all weights of linears and convolutions, those that are quantized.
    """

    quantized: int
    kept: tuple[str, ...]
    weight_share: float


def _torchao(unet: Any, config: Any, layers: Any = LAYERS) -> Any:
    from torchao.quantization import quantize_

    def wanted(module: Any, name: str) -> bool:
        return isinstance(module, layers) and name not in KEPT and module.weight.shape[1] % GROUP_SIZE == 0

    quantized = deepcopy(unet)
    quantize_(quantized, config, wanted)
    return quantized


def torchao_int8_dynamic(unet: Any, calibration_set: CalibrationSet) -> Any:
    """int8 weights, a scale for each output channel; int8 activations, a scale for each token at run time."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    # set_inductor_config would change the matmul precision of the whole process
    return _torchao(unet, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False), (nn.Linear,))


def torchao_int4_int8_dynamic(unet: Any, calibration_set: CalibrationSet) -> Any:
    """4-bit weights in groups; int8 activations, a scale and zero point for each token at run time."""
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerGroup

    config = Int8DynamicActivationIntxWeightConfig(weight_dtype=INT4, weight_granularity=PerGroup(GROUP_SIZE))
    return _torchao(unet, config, (nn.Linear,))


def torchao_int4_weight_only(unet: Any, calibration_set: CalibrationSet) -> Any:
    """4-bit weights in groups along the input channels, for each tap of a convolution."""
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup

    return _torchao(unet, IntxWeightOnlyConfig(weight_dtype=INT4, granularity=PerGroup(GROUP_SIZE)))


def _quanto(weights: str, activations: str | None = None) -> Quantize:
    """quanto's qtypes by name. int8 weights have a scale for each output channel, 4-bit ones groups of up to 128."""

    def quantize(unet: Any, calibration_set: CalibrationSet) -> Any:
        from optimum import quanto

        quantized = deepcopy(unet)
        quanto.quantize(quantized, weights=weights, activations=activations, exclude=list(KEPT))
        if activations is not None:
            with quanto.Calibration(momentum=0.9):
                for call in calibration_set.calls:
                    call.run(quantized)
        quanto.freeze(quantized)
        return quantized

    return quantize


def _sdnq(weights_dtype: str, matmul: bool) -> Quantize:
    """SDNQ's dtypes by name; ``matmul``: int8 x int8, with a scale for each row of activations at run time.

    Groups are SDNQ's choice: 64 4-bit weights in linears, 32 in convolutions, for each tap. Its int8 product takes
    a scale for each output channel, so 4-bit weights in several groups are rounded once more, to int8, at each call.
    """

    def quantize(unet: Any, calibration_set: CalibrationSet) -> Any:
        os.environ.setdefault("SDNQ_USE_TORCH_COMPILE", "0")  # would compile for every shape, for the same values
        from sdnq import sdnq_post_load_quant

        # SDNQ 0.2.8's int8 convolution fails on 4-bit weights that are a single group
        halves = {
            f"{name}.weight": {"group_size": module.in_channels // 2}
            for name, module in unet.named_modules()
            if matmul and weights_dtype == "int4" and name not in KEPT
            if isinstance(module, nn.Conv2d) and module.in_channels <= SDNQ_CONVOLUTION_GROUP_SIZE
        }
        return sdnq_post_load_quant(
            deepcopy(unet),
            weights_dtype=weights_dtype,
            quant_conv=True,
            use_quantized_matmul=matmul,
            use_quantized_matmul_conv=matmul,
            add_skip_keys=False,
            minimum_allowed_numel=0,
            modules_to_not_convert=list(KEPT),
            modules_quant_config=halves,
        )

    return quantize


CONVOLUTIONS = "convolutions stay in floating point"
UNPACKED = "4-bit values lie in int8"
CONVOLUTION_INPUTS = "inputs of convolutions stay in floating point"
FEW_ROWS = "inputs of fewer than 32 rows stay in floating point"

PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("torchao int8 dynamic", "torchao", 8, 8, torchao_int8_dynamic, (CONVOLUTIONS,)),
        Peer("torchao int4, int8 dynamic", "torchao", 4, 8, torchao_int4_int8_dynamic, (CONVOLUTIONS, UNPACKED)),
        Peer("torchao int4 weight-only", "torchao", 4, 32, torchao_int4_weight_only, (UNPACKED,)),
        Peer("quanto qint8 weight-only", "optimum-quanto", 8, 32, _quanto("qint8")),
        Peer("quanto qint4 weight-only", "optimum-quanto", 4, 32, _quanto("qint4")),
        Peer("quanto qint8, qint8 static", "optimum-quanto", 8, 8, _quanto("qint8", "qint8"), (CONVOLUTION_INPUTS,)),
        Peer("quanto qint4, qint8 static", "optimum-quanto", 4, 8, _quanto("qint4", "qint8"), (CONVOLUTION_INPUTS,)),
        Peer("sdnq int8 weight-only", "sdnq", 8, 32, _sdnq("int8", matmul=False)),
        Peer("sdnq int8 dynamic", "sdnq", 8, 8, _sdnq("int8", matmul=True), (FEW_ROWS,)),
        Peer("sdnq uint4 weight-only", "sdnq", 4, 32, _sdnq("uint4", matmul=False)),
        Peer("sdnq int4, int8 dynamic", "sdnq", 4, 8, _sdnq("int4", matmul=True), (FEW_ROWS,)),
    )
}


def missing(peer: Peer) -> str | None:
    """Why a peer cannot run here, if it cannot."""
    try:
        version(peer.package)
    except PackageNotFoundError:
        return f"{peer.package} is not installed"
    compiles = peer.package == "optimum-quanto" and peer.weight_bits == 4
    if compiles and not (cpp_extension.is_ninja_available() and shutil.which(cpp_extension.get_cxx_compiler())):
        return "optimum-quanto's 4-bit weights need ninja and a C++ compiler on the PATH"
    return None


def coverage(unet: nn.Module, stock: nn.Module) -> Coverage:
    """Which linears and convolutions of the stock UNet hold integers in the quantized one."""
    weights = {name: module.weight.numel() for name, module in stock.named_modules() if isinstance(module, LAYERS)}
    kept = [name for name in weights if all(map(torch.is_floating_point, _stored(unet.get_submodule(name).weight)))]
    share = 1 - sum(weights[name] for name in kept) / sum(weights.values())
    return Coverage(len(weights) - len(kept), tuple(kept), share)


def size_mb(unet: nn.Module) -> float:
    """What all parameters and buffers take as they are stored, scales included, in 10^6 bytes."""
    tensors = [*unet.parameters(), *unet.buffers()]
    return sum(stored.numel() * stored.element_size() for tensor in tensors for stored in _stored(tensor)) / 1e6


def _stored(tensor: Any) -> Iterator[Tensor]:
    """The plain tensors that a tensor consists of: itself, or those inside a subclass, however deep."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _stored(getattr(tensor, name))
