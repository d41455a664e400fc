"""The GEMM of one launch with operands of its own, ready to be timed."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.speed.launches import Launch
from benchmarks.speed.timing import copies_to_rotate
from dq_kernels import gemm
from dq_kernels.conv2d import conv2d_output_size
from dq_kernels.packing import unpack_int4
from dq_kernels.tuning import LaunchConfig


class Problem:
    """A launch's operands, with copies of the weight to rotate."""

    def __init__(self, launch: Launch, device: str, copies: int | None = None) -> None:
        self.launch = launch
        # Weights come from memory in a real forward pass, activations from the layer before.
        self.copies = copies or copies_to_rotate(torch.Size(launch.weight).numel())
        self.weights = [
            torch.randint(0, 256, launch.weight, dtype=torch.uint8, device=device) for _ in range(self.copies)
        ]
        rows = launch.weight[0]
        self.x = torch.randint(-128, 128, launch.x, dtype=torch.int8, device=device)
        is_quantized = launch.op == "linear_geglu"
        shape = self._out_shape()
        self.out = torch.empty(shape, dtype=torch.int8 if is_quantized else torch.float16, device=device)
        self.tables = {
            "weight_scale": torch.full((rows,), 0.001, device=device),
            "weight_sum": unpack_int4(self.weights[0]).flatten(1).sum(1, dtype=torch.int32),
            "act_scale": torch.full((20,), 0.03, device=device),
            "act_zero_point": torch.full((20,), -3, dtype=torch.int32, device=device),
            "timestep_index": torch.full((launch.x[0],), 7, dtype=torch.int32, device=device),
            "bias": torch.randn(rows, dtype=torch.float16, device=device),
        }
        self.options: dict[str, Any] = {}
        if len(launch.weight) == 4:
            self.options = {"kernel_size": launch.weight[1:3], "stride": launch.stride, "upsample": launch.upsample}
        if launch.residual:
            self.options["residual"] = torch.randn(shape, dtype=torch.float16, device=device)
        if is_quantized:
            self.options |= {
                "activation": "geglu",
                "next_dilation": torch.ones(launch.out_channels, device=device),
                "next_scale": self.tables["act_scale"],
                "next_zero_point": self.tables["act_zero_point"],
            }

    def _out_shape(self) -> tuple[int, ...]:
        launch = self.launch
        if len(launch.weight) == 2:
            return (*launch.x[:-1], launch.out_channels)
        size = conv2d_output_size(launch.x[1:3], launch.weight[1:3], launch.stride, (1, 1), launch.upsample)
        return (launch.x[0], *size, launch.out_channels)

    def run(self, config: LaunchConfig, copy: int = 0) -> Any:
        """One launch; the compiled kernel."""
        return gemm.launch(config, self.x, self.weights[copy], out=self.out, **self.tables, **self.options)
