"""Post-training quantization of whole UNets by other libraries, on the CPU, for the quality tables.

Each peer takes a stock fp32 UNet and returns a quantized copy. It uses the library's public API as documented
(torchao's ``quantize_``; quanto's ``quantize``, ``Calibration`` and ``freeze``; SDNQ's ``sdnq_post_load_quant``). The
same rules hold for all peers, so that they quantize the same layers where possible:

- ``conv_in`` and ``conv_out`` stay in floating point, as in our own method; every library has an option for this.
- Every other linear and convolution is quantized if the library supports it, at any size. SDNQ's rules for large
  models, which skip layers by name or under 16,384 weights, are off.
- Norms, embeddings and biases stay in floating point.

Each peer's ``limits`` list the exceptions. Two schemes of torchao 0.18 are left out, because they do not run on an x86
CPU: ``Int4WeightOnlyConfig``, whose formats need the package mslk, CUDA or XPU, and the packed formats of
``Int8DynamicActivationIntxWeightConfig``, whose kernels the x86 wheel lacks. torchao's 4-bit values are therefore
stored as int8 here, one per byte.

None of the libraries is a dependency; ``pip install torchao optimum-quanto sdnq ninja`` installs them. quanto's 4-bit
weights compile a small C++ extension at their first use, which takes one or two minutes. ``linears.py`` has the linear
layers on a GPU (there, SDNQ's int4 has one scale per output channel).
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
from dq_runtime.layers import QuantizedLayer

KEPT = ("conv_in", "conv_out")
GROUP_SIZE = 32  # torchao's 4-bit weights: its default for dynamic activations; divides all channels of small UNets
SDNQ_CONVOLUTION_GROUP_SIZE = 32  # SDNQ's choice for 4-bit weights
INT4 = torch.int4  # type: ignore[attr-defined]
LAYERS = (nn.Linear, nn.Conv2d)

Quantize = Callable[[Any, CalibrationSet], Any]


@dataclass(frozen=True)
class Peer:
    """A library and a scheme.

    Attributes:
        package: the distribution that pip installs.
        weight_bits: bits of the quantized layers' weights.
        activation_bits: bits of the quantized layers' inputs; 32 if they are not quantized.
        quantize: returns a quantized copy of an fp32 UNet on the CPU; the UNet itself is unchanged. Libraries with
            static activation scales calibrate them on the calibration set, in the order of its calls; the others
            ignore it.
        limits: layers that stay in floating point beside ``KEPT``, and deviations from the scheme's name.
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
        quantized: the number of linears and convolutions with quantized weights.
        kept: the names of the linears and convolutions with floating-point weights.
        weight_share: the quantized share of all weights of linears and convolutions.
    """

    quantized: int
    kept: tuple[str, ...]
    weight_share: float


def late_layers(unet: Any) -> list[str]:
    """The last up block, and of the one before it the attentions, the upsampler and the shortcuts.

    These have few of the weights, and their errors reach the prediction almost unchanged.
    """
    last = len(unet.up_blocks) - 1
    before = f"up_blocks.{last - 1}"
    shortcuts = [f"{before}.resnets.{i}.conv_shortcut" for i in range(len(unet.up_blocks[-2].resnets))]
    return [f"up_blocks.{last}", f"{before}.attentions", f"{before}.upsamplers", *shortcuts]


def _torchao(unet: Any, config: Any, layers: Any = LAYERS) -> Any:
    from torchao.quantization import quantize_

    def wanted(module: Any, name: str) -> bool:
        return isinstance(module, layers) and name not in KEPT and module.weight.shape[1] % GROUP_SIZE == 0

    quantized = deepcopy(unet)
    quantize_(quantized, config, wanted)
    return quantized


def torchao_int8_dynamic(unet: Any, calibration_set: CalibrationSet) -> Any:
    """int8 weights, one scale per output channel; int8 activations, one scale per token, computed at run time."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    # set_inductor_config would change the matmul precision of the whole process
    return _torchao(unet, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False), (nn.Linear,))


def torchao_int4_int8_dynamic(unet: Any, calibration_set: CalibrationSet) -> Any:
    """4-bit weights in groups; int8 activations, one scale and zero point per token, computed at run time."""
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerGroup

    config = Int8DynamicActivationIntxWeightConfig(weight_dtype=INT4, weight_granularity=PerGroup(GROUP_SIZE))
    return _torchao(unet, config, (nn.Linear,))


def torchao_int4_weight_only(unet: Any, calibration_set: CalibrationSet) -> Any:
    """4-bit weights in groups along the input channels, separately for each tap of a convolution."""
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup

    return _torchao(unet, IntxWeightOnlyConfig(weight_dtype=INT4, granularity=PerGroup(GROUP_SIZE)))


def _quanto(weights: str, activations: str | None = None) -> Quantize:
    """quanto's qtypes by name. int8 weights have one scale per output channel, 4-bit weights groups of up to 128."""

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


def _sdnq(weights_dtype: str, matmul: bool, late_layers_kept: bool = False) -> Quantize:
    """SDNQ's dtypes by name; ``matmul``: int8 x int8, with one scale per row of activations, computed at run time.

    SDNQ chooses the groups: 64 4-bit weights in linears, 32 in convolutions, separately for each tap. Its int8 product
    takes one scale per output channel, so each call rounds 4-bit weights in several groups once more, to int8.
    """

    def quantize(unet: Any, calibration_set: CalibrationSet) -> Any:
        os.environ.setdefault("SDNQ_USE_TORCH_COMPILE", "0")  # it would compile for every shape, with equal results
        from sdnq import sdnq_post_load_quant

        # SDNQ 0.2.8's int8 convolution fails on 4-bit weights that are a single group
        halves = {
            f"{name}.weight": {"group_size": module.in_channels // 2}
            for name, module in unet.named_modules()
            if matmul and weights_dtype == "int4" and name not in KEPT
            if isinstance(module, nn.Conv2d) and module.in_channels <= SDNQ_CONVOLUTION_GROUP_SIZE
        }
        # A leading dot makes a prefix of a name
        late = [f".{name}." for name in late_layers(unet)] if late_layers_kept else []
        return sdnq_post_load_quant(
            deepcopy(unet),
            weights_dtype=weights_dtype,
            quant_conv=True,
            use_quantized_matmul=matmul,
            use_quantized_matmul_conv=matmul,
            add_skip_keys=False,
            minimum_allowed_numel=0,
            modules_to_not_convert=[*KEPT, *late],
            modules_quant_config=halves,
        )

    return quantize


CONVOLUTIONS = "convolutions stay in floating point"
UNPACKED = "4-bit values lie in int8"
CONVOLUTION_INPUTS = "inputs of convolutions stay in floating point"
LATE_LAYERS = "layers close to the output stay in floating point (``late_layers``)"
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
        Peer("sdnq uint4 weight-only, late layers kept", "sdnq", 4, 32, _sdnq("uint4", False, True), (LATE_LAYERS,)),
        Peer(
            "sdnq int4, int8 dynamic, late layers kept",
            "sdnq",
            4,
            8,
            _sdnq("int4", True, True),
            (FEW_ROWS, LATE_LAYERS),
        ),
    )
}


def missing(peer: Peer) -> str | None:
    """The reason why a peer cannot run here, or None."""
    try:
        version(peer.package)
    except PackageNotFoundError:
        return f"{peer.package} is not installed"
    compiles = peer.package == "optimum-quanto" and peer.weight_bits == 4
    if compiles and not (cpp_extension.is_ninja_available() and shutil.which(cpp_extension.get_cxx_compiler())):
        return "optimum-quanto's 4-bit weights need ninja and a C++ compiler on the PATH"
    return None


def coverage(unet: nn.Module, stock: nn.Module) -> Coverage:
    """The linears and convolutions of the stock UNet whose weights are integers in the quantized UNet."""
    weights = {name: module.weight.numel() for name, module in stock.named_modules() if isinstance(module, LAYERS)}
    kept = [name for name in weights if all(map(torch.is_floating_point, _stored_weight(unet.get_submodule(name))))]
    share = 1 - sum(weights[name] for name in kept) / sum(weights.values())
    return Coverage(len(weights) - len(kept), tuple(kept), share)


def _stored_weight(layer: Any) -> Iterator[Tensor]:
    """The plain tensors of a layer's weight. Our layers compute ``weight``, the rounded one, when it is read."""
    return _stored(layer.packed_weight if isinstance(layer, QuantizedLayer) else layer.weight)


def size_mb(unet: nn.Module) -> float:
    """The storage of all parameters and buffers, scales included, in 10^6 bytes."""
    tensors = [*unet.parameters(), *unet.buffers()]
    return sum(stored.numel() * stored.element_size() for tensor in tensors for stored in _stored(tensor)) / 1e6


def _stored(tensor: Any) -> Iterator[Tensor]:
    """The plain tensors of a tensor: itself, or the tensors inside a subclass at any depth."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _stored(getattr(tensor, name))
