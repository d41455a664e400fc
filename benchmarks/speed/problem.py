"""The GEMM of one launch with its operands, for timing."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.speed.launches import Launch
from benchmarks.speed.timing import copies_to_rotate
from dq_kernels.packing import unpack_int4
from dq_kernels.records import PackedWeight, Quantizer
from dq_kernels.shapes import conv2d_output_size, statistics_shape
from dq_kernels.triton.gemm import LINEAR, Epilogue, Geometry, launch
from dq_kernels.triton.tuning import LaunchConfig


class Problem:
    """The operands of one launch, with copies of the weight to rotate."""

    def __init__(self, shape: Launch, device: str, copies: int | None = None) -> None:
        self.launch = shape
        # In a real forward pass weights come from memory, and activations from the previous layer.
        self.copies = copies or copies_to_rotate(torch.Size(shape.weight).numel())
        rows, batch = shape.weight[0], shape.x[0]
        values = [torch.randint(0, 256, shape.weight, dtype=torch.uint8, device=device) for _ in range(self.copies)]
        sums = unpack_int4(values[0]).flatten(1).sum(1, dtype=torch.int32)
        self.weights = [PackedWeight(copy, torch.full((rows,), 0.001, device=device), sums) for copy in values]
        self.x = torch.randint(-128, 128, shape.x, dtype=torch.int8, device=device)
        self.quantizer = Quantizer(
            torch.ones(shape.x[-1], device=device),
            torch.full((20,), 0.03, device=device),
            torch.full((20,), -3, dtype=torch.int32, device=device),
            torch.full((batch,), 7, dtype=torch.int32, device=device),
            8,
        )
        self.geometry = LINEAR
        out_shape = (*shape.x[:-1], shape.out_channels)
        if len(shape.weight) == 4:
            kernel_size = shape.weight[1], shape.weight[2]
            self.geometry = Geometry(kernel_size, shape.stride, upsample=shape.upsample)
            size = conv2d_output_size(shape.x[1:3], *self.geometry)
            out_shape = (batch, *size, shape.out_channels)
        to_int8 = shape.op == "linear_geglu"
        self.out = torch.empty(out_shape, dtype=torch.int8 if to_int8 else torch.float16, device=device)

        def floats(*size: int) -> torch.Tensor:
            return torch.randn(size, dtype=torch.float16, device=device)

        statistics = None
        if shape.statistics:
            statistics = torch.empty(statistics_shape(batch, out_shape[1:3], shape.out_channels, True), device=device)
        self.epilogue = Epilogue(
            floats(rows),
            floats(batch, shape.out_channels) if shape.channel_add else None,
            floats(*out_shape) if shape.residual else None,
            statistics,
            geglu=to_int8,
            next_quantizer=self.quantizer._replace(dilation=torch.ones(shape.out_channels, device=device))
            if to_int8
            else None,
        )

    def run(self, config: LaunchConfig, copy: int = 0) -> Any:
        """Launches once, with the configuration as adjusted by the runtime; returns the compiled kernel."""
        return launch(self.x, self.weights[copy], self.quantizer, self.out, self.epilogue, self.geometry, config)
