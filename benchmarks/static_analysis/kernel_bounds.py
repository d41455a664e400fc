"""The kernels of a UNet's forward pass, unfused and fused, and the least time that each takes on a device.

A kernel takes at least max(operations / peak, bytes / bandwidth); each tensor that it reads or writes crosses the
memory bus once. The model leaves out launches, the second pass of a norm over its input, biases, and copies that only
change a layout (in channels_last there are none). It also leaves out caches that keep a tensor from one kernel to the
next; with them a small model can be faster than its bound.

**unfused**: every operator of diffusers' forward is a kernel; it reads its inputs and writes its output in 16 bit. A
quantized layer is two kernels: the first reads x in 16 bit and writes it quantized, the second reads that and writes y
in 16 bit.

**fused**: the kernels are layers, norms and attention; all other operators are fused into these.
  - Activations, GEGLU, additions of residuals and time embedding, and scalings are an epilogue of the kernel that
    writes their largest input (of two equal ones, the later): that input is neither written nor read.
  - Upsampling, padding and the concatenation with skip connections are addressing in the kernels that read the result.
  - The kernel before a layer writes the layer's input in the layer's width. If norms, attention or residuals read the
    same tensor, it writes 16 bit, too. It also computes the statistics of a following norm.
  - Consecutive layers on the same tensor (q, k, v) are one kernel.

Precisions: in fp16 everything has 16 bits. In W4A8 and W4A4, layers have packed 4-bit weights with an fp32 scale and an
int32 sum per output channel, and read 8-bit or packed 4-bit activations. They compute in int8: there are no 4-bit
tensor cores since Hopper, and those of Ampere and Ada are not used. Norms and attention use 16 bit. In the int8
attention column both products of attention are int8; q, k and v are read in 16 bit.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from benchmarks.static_analysis.devices import Device
from benchmarks.unets import LayerShape, build, inputs, layers


@dataclass(frozen=True)
class Precision:
    """The bits of layers' operands, and the ``Device`` ceilings for the arithmetic of layers and of attention."""

    weight_bits: int
    activation_bits: int
    arithmetic: str
    attention: str = "fp16"


PRECISIONS = {
    "fp16": Precision(16, 16, "fp16"),
    "w4a8": Precision(4, 8, "int8"),
    "w4a8, int8 attention": Precision(4, 8, "int8", "int8"),
    "w4a4": Precision(4, 4, "int8"),
}
# Column of the tables -> precision, fused.
VARIANTS = {
    "fp16 unfused": ("fp16", False),
    "fp16 fused": ("fp16", True),
    "w4a8 unfused": ("w4a8", False),
    "w4a8 fused": ("w4a8", True),
    "w4a8 fused, int8 attention": ("w4a8, int8 attention", True),
    "w4a4 fused": ("w4a4", True),
}
# A single layer in fp16 has nothing to fuse, and no attention.
LAYER_VARIANTS = {"fp16": ("fp16", False)} | {
    v: choice for v, choice in VARIANTS.items() if choice[0] in ("w4a8", "w4a4")
}


@dataclass
class Kernel:
    """The operations and memory traffic of one launch."""

    kind: str
    arithmetic: str = "fp16"
    operations: int = 0
    weight_bytes: float = 0
    activation_bytes: float = 0

    def seconds(self, device: Device) -> float:
        """The least time on a device in seconds."""
        peak = getattr(device, self.arithmetic).per_second
        return max(self.operations / peak, (self.weight_bytes + self.activation_bytes) / device.memory.per_second)


def weight_bytes(shape: LayerShape, precision: Precision) -> int:
    """The bytes of a layer's weights; 4-bit weights are packed in pairs of channels and have two tables."""
    if precision.weight_bits == 16:
        return 2 * shape.out_channels * shape.reduction
    return shape.out_channels * (math.ceil(shape.in_channels / 2) * shape.taps + 8)


def layer_kernels(shape: LayerShape, precision: str, fused: bool) -> list[Kernel]:
    """The kernels of a single layer, from x to y in 16 bit; if fused, x already has the layer's width."""
    chosen = PRECISIONS[precision]
    in_size = shape.batch * shape.tokens * shape.in_channels
    x_bytes, y_bytes = in_size * chosen.activation_bits / 8, 2 * shape.rows * shape.out_channels
    quantized = precision != "fp16" and not fused
    quantize = [Kernel("quantize", activation_bytes=2 * in_size + x_bytes)] if quantized else []
    weights = weight_bytes(shape, chosen)
    return [*quantize, Kernel("layer", chosen.arithmetic, shape.operations, weights, x_bytes + y_bytes)]


def layer_bound(shape: LayerShape, device: Device, precision: str, fused: bool = True) -> float:
    """The least time of a single layer in seconds; if not fused, it includes the quantization of the input."""
    return sum(kernel.seconds(device) for kernel in layer_kernels(shape, precision, fused))


@dataclass(eq=False)
class Tensor:
    """A tensor of a traced forward pass; ``sources`` are the tensors that it gathers, if it needs only addressing."""

    size: int
    sources: tuple[Tensor, ...] = ()

    def resolve(self) -> list[Tensor]:
        """The tensors that a kernel reads instead of this one."""
        return [tensor for source in self.sources for tensor in source.resolve()] or [self]


@dataclass
class Step:
    """One operator of a forward pass; ``read_size`` counts all elements read, which can be parts of the inputs."""

    kind: str
    reads: list[Tensor]
    read_size: int
    writes: Tensor
    operations: int = 0
    shape: LayerShape | None = None


KINDS = {
    **dict.fromkeys(("linear", "conv2d"), "layer"),
    **dict.fromkeys(("group_norm", "layer_norm"), "norm"),
    **dict.fromkeys(("cat", "concat", "interpolate", "pad"), "gather"),
    **dict.fromkeys(("reshape", "contiguous"), "layout"),
    "scaled_dot_product_attention": "attention",
}


class Tracer(TorchFunctionMode):
    """Records the operators that compute a new tensor from others; operators outside ``KINDS`` are elementwise."""

    def __init__(self, shapes: dict[torch.Tensor, LayerShape]) -> None:
        super().__init__()
        self.shapes = shapes  # by weight
        self.steps: list[Step] = []
        self.tensors: dict[torch.UntypedStorage, Tensor] = {}  # a view shares its base's storage

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        inputs = [operand for operand in operands if not isinstance(operand, nn.Parameter)]
        if isinstance(result, torch.Tensor) and inputs:
            kind = KINDS.get(function.__name__, "elementwise")
            shape = next((self.shapes[operand] for operand in operands if operand in self.shapes), None)
            self._record(kind, inputs, result, shape)
        return result

    def _record(self, kind: str, inputs: list[torch.Tensor], result: torch.Tensor, shape: LayerShape | None) -> None:
        reads = [self.tensors.setdefault(x.untyped_storage(), Tensor(x.numel())) for x in inputs]
        if result.untyped_storage() in self.tensors:  # a view
            return
        if kind == "layout":
            self.tensors[result.untyped_storage()] = reads[0]
            return
        operations = shape.operations if shape else 0
        if kind == "attention":
            query, key = inputs[:2]  # [batch, heads, tokens, channels]; two products, with k and v
            operations = 4 * query.numel() * key.shape[-2]
        writes = Tensor(result.numel(), tuple(reads) if kind == "gather" else ())
        self.tensors[result.untyped_storage()] = writes
        self.steps.append(Step(kind, reads, sum(x.numel() for x in inputs), writes, operations, shape))


def trace(name: str, batch: int) -> list[Step]:
    """The operators of one forward pass of a UNet, on the meta device."""
    unet, arguments = build(name, "meta"), inputs(name, batch, "meta")
    shapes = {unet.get_submodule(layer).weight: shape for shape in layers(name, batch) for layer in shape.names}
    tracer = Tracer(shapes)
    with torch.no_grad(), tracer:
        unet(**arguments)
    return tracer.steps


def unfused_kernels(steps: list[Step], precision: str) -> list[Kernel]:
    """One kernel per step, and a quantizing kernel before each quantized layer."""
    kernels = []
    for step in steps:
        if step.shape is not None:
            kernels += layer_kernels(step.shape, precision, fused=False)
        else:
            traffic = 2 * (step.read_size + step.writes.size)
            kernels.append(Kernel(step.kind, operations=step.operations, activation_bytes=traffic))
    return kernels


def fused_kernels(steps: list[Step], precision: str) -> list[Kernel]:
    """Layers, norms and attention with all other operators fused; the module's docstring has the rules."""
    chosen = PRECISIONS[precision]
    kernels: list[Kernel] = []
    maker: dict[Tensor, int] = {}  # index of the kernel; inputs of the forward pass have none
    read: set[tuple[int, Tensor, int]] = set()  # (kernel, tensor, bits)
    consumed: set[Tensor] = set()
    shared: list[Tensor] | None = None  # the inputs of the previous step, if it was a layer
    for step in steps:
        if step.kind == "gather":
            continue
        sources = [source for tensor in step.reads for source in tensor.resolve()]
        consumed.update(sources)
        is_layer = step.shape is not None
        if step.kind == "elementwise":
            index = maker.get(max(sources, key=lambda tensor: (tensor.size, maker.get(tensor, -1))))
            if index is None:  # the timestep embedding, before the first layer
                continue
        else:
            if not is_layer or sources != shared:
                arithmetic = {"layer": chosen.arithmetic, "attention": chosen.attention}.get(step.kind, "fp16")
                kernels.append(Kernel(step.kind, arithmetic))
            index = len(kernels) - 1
            kernels[index].operations += step.operations
            kernels[index].weight_bytes += weight_bytes(step.shape, chosen) if step.shape else 0
        shared = sources if is_layer else None
        maker[step.writes] = index
        bits = chosen.activation_bits if is_layer else 16
        read.update((index, source, bits) for source in sources if maker.get(source) != index)

    widths: dict[Tensor, set[int]] = defaultdict(set)
    for index, tensor, bits in read:
        kernels[index].activation_bytes += tensor.size * bits / 8
        widths[tensor].add(bits)
    for tensor, index in maker.items():
        written = widths[tensor] if tensor in consumed else {16}  # no kernel reads the result of the forward pass
        kernels[index].activation_bytes += tensor.size * sum(written) / 8
    return kernels


def forward_kernels(steps: list[Step], precision: str, fused: bool) -> list[Kernel]:
    """The kernels of one forward pass."""
    return (fused_kernels if fused else unfused_kernels)(steps, precision)
