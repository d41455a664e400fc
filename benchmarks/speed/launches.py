"""Every GEMM that a fused UNet launches, read off one forward pass on the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import quantized_unets, unets
from dq_kernels.conv2d import gemm_name
from dq_runtime.fused import fuse


@dataclass(frozen=True)
class Launch:
    """One distinct launch: the key of the tuning table, and what it takes to repeat it.

    ``x`` is the int8 input's shape (a padded image for convolutions), ``weight`` the packed weight's.
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

    @property
    def operations(self) -> int:
        """Multiplications and additions; GEGLU has two products for each result."""
        return 2 * self.rows * self.out_channels * self.reduction * (2 if self.op == "linear_geglu" else 1)


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.launches: dict[Launch, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "dq_kernels" and func._opname.startswith("int4_"):
            launch = _launch(func._opname, args, result)
            self.launches[launch] = self.launches.get(launch, 0) + 1
        return result


def _launch(op: str, args: Any, result: Any) -> Launch:
    x, weight = args[0], args[1]
    out = result[0] if op == "int4_conv2d" else result
    geometry: dict[str, Any] = {}
    key = "linear"
    if op == "int4_conv2d":
        stride, upsample = tuple(args[15]), args[17]
        key = gemm_name(tuple(weight.shape[1:3]), stride)
        geometry = {"stride": stride, "upsample": upsample, "residual": args[9] is not None}
    elif op == "int4_linear":
        geometry = {"residual": args[8] is not None}
    elif args[8] == "geglu":
        key = "linear_geglu"
    channels = out.shape[-1]
    reduction = 2 * weight[0].numel()
    return Launch(key, out.numel() // channels, channels, reduction, tuple(x.shape), tuple(weight.shape), **geometry)


@torch.inference_mode()
def launches(name: str, batch: int) -> dict[Launch, int]:
    """The distinct launches of one forward, and how often each occurs."""
    unet = quantized_unets.build(name, "meta", torch.float16)
    fuse(unet)
    with _Recorder() as recorder:
        unet(**unets.inputs(name, batch, "meta", torch.float16))
    return recorder.launches
