"""Every GEMM launch of a fused UNet, recorded in one forward pass on the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import quantized_unets, unets
from dq_kernels.triton.gemm import Geometry
from dq_runtime.fused import fuse


@dataclass(frozen=True)
class Launch:
    """One distinct launch: the key of the tuning table, and the fields to repeat it.

    ``x`` is the int8 input's shape (a padded image for convolutions), ``weight`` the packed weight's shape.
    """

    op: str
    rows: int
    out_channels: int
    reduction: int
    x: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, int] = (1, 1)
    upsample: bool = False
    residual: bool = False
    channel_add: bool = False
    statistics: bool = False

    @property
    def operations(self) -> int:
        """Multiplications and additions; GEGLU has two products per result."""
        return 2 * self.rows * self.out_channels * self.reduction * (2 if self.op == "linear_geglu" else 1)


TINY = (  # one of each operator, for runs in Triton's interpreter
    Launch("linear", 24, 32, 32, (2, 12, 32), (32, 16)),
    Launch("linear_geglu", 24, 32, 32, (2, 12, 32), (64, 16)),
    Launch("conv2d", 32, 32, 288, (2, 6, 6, 32), (32, 3, 3, 16)),
)


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.launches: dict[Launch, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "dq_kernels" and func._opname.startswith("int4_"):
            names = [argument.name for argument in func._schema.arguments]
            launch = _launch(func._opname, dict(zip(names, args, strict=True)), result)
            self.launches[launch] = self.launches.get(launch, 0) + 1
        return result


def _launch(op: str, arguments: dict[str, Any], result: Any) -> Launch:
    x, weight, key = arguments["x"], arguments["weight_values"], "linear"
    out, statistics = result if op == "int4_conv2d" else (result, None)
    options: dict[str, Any] = {"residual": arguments.get("residual") is not None}
    if op == "int4_conv2d":
        stride, upsample = tuple(arguments["stride"]), arguments["upsample"]
        key = "linear" if Geometry(tuple(weight.shape[1:3]), stride, upsample=upsample).is_linear else "conv2d"
        options |= {"stride": stride, "upsample": upsample, "statistics": statistics.numel() > 0}
        options |= {"channel_add": arguments["channel_add"] is not None}
    elif op == "int4_geglu_quantize":
        key = "linear_geglu"
    channels = out.shape[-1]
    reduction = 2 * weight[0].numel()
    return Launch(key, out.numel() // channels, channels, reduction, tuple(x.shape), tuple(weight.shape), **options)


@torch.inference_mode()
def launches(name: str, batch: int) -> dict[Launch, int]:
    """The distinct launches of one forward pass, and the number of each."""
    unet = quantized_unets.build(name, "meta", torch.float16)
    fuse(unet)
    with _Recorder() as recorder:
        unet(**unets.inputs(name, batch, "meta", torch.float16))
    return recorder.launches
