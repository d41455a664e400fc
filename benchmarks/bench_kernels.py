"""The operators against PyTorch's own, layer by layer, on shapes of SD1.5 at 512x512 (batch 2).

    pytest benchmarks/bench_kernels.py                                            # a table, one group a layer
    pytest benchmarks/bench_kernels.py --benchmark-json benchmarks/results/bench_kernels_cpu.json

Runs where it is: on a GPU ours against fp16, on a CPU against fp32 and bf16. Ours counts the quantization of the input;
tensors are channels_last, values random. One JSON holds the times of all, with the machine.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from dq_kernels import ops

BATCH, TIMESTEPS = 2, 20
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
BASELINES = {"fp16": torch.float16} if CUDA else {"fp32": torch.float32, "bf16": torch.bfloat16}
IMPLEMENTATIONS = ("int4", *BASELINES)
COMPUTE_DTYPE = torch.float16 if CUDA else torch.float32

CONVOLUTIONS = ((320, 320, 64), (640, 640, 32), (1280, 1280, 16), (2560, 1280, 8))  # K, N, height and width; 3x3
LINEARS = ((320, 320, 4096), (320, 2560, 4096), (640, 640, 1024), (5120, 1280, 256), (768, 320, 77), (1280, 320, 1))


def int4_operands(shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random packed weights [N, ..., K] with their tables."""
    values = torch.randint(-8, 8, shape, dtype=torch.int8)
    operands = {
        "weight": ops.pack_int4(values),
        "weight_scale": torch.rand(shape[0]) + 0.5,
        "weight_sum": values.flatten(1).sum(1, dtype=torch.int32),
        "act_scale": torch.full((TIMESTEPS,), 0.03),
        "act_zero_point": torch.zeros(TIMESTEPS, dtype=torch.int32),
        "timestep_index": torch.full((BATCH,), 3, dtype=torch.int32),
    }
    return {name: tensor.to(DEVICE) for name, tensor in operands.items()}


def quantizer(operands: dict[str, torch.Tensor], channels: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """The quantization of a layer's input."""
    tables = [operands[name] for name in ("act_scale", "act_zero_point", "timestep_index")]
    dilation = torch.ones(channels, device=DEVICE)
    return lambda x: ops.quantize(x, dilation, *tables, 8)


def measure(benchmark, run: Callable[[], torch.Tensor]) -> None:
    """Times ``run``, and on a GPU the work that it starts as well."""

    def finished() -> None:
        run()
        if CUDA:
            torch.cuda.synchronize()

    finished()
    benchmark.pedantic(finished, rounds=20, warmup_rounds=3)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("channels", "out_channels", "size"), CONVOLUTIONS)
def test_conv2d(benchmark, channels, out_channels, size, implementation):
    benchmark.group = f"conv2d 3x3 {channels} -> {out_channels}, {size}x{size}"
    x = torch.randn(BATCH, size, size, channels, device=DEVICE, dtype=COMPUTE_DTYPE)
    if implementation == "int4":
        operands = int4_operands((out_channels, 3, 3, channels))
        quantize = quantizer(operands, channels)
        measure(benchmark, lambda: ops.int4_conv2d(quantize(x), **operands, padding=(1, 1), out_dtype=COMPUTE_DTYPE))
    else:
        dtype = BASELINES[implementation]
        weight = torch.randn(out_channels, channels, 3, 3, device=DEVICE, dtype=dtype)
        weight = weight.contiguous(memory_format=torch.channels_last)
        image = x.to(dtype).permute(0, 3, 1, 2)
        measure(benchmark, lambda: F.conv2d(image, weight, padding=1))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("channels", "out_channels", "tokens"), LINEARS)
def test_linear(benchmark, channels, out_channels, tokens, implementation):
    benchmark.group = f"linear {channels} -> {out_channels}, {tokens} tokens"
    x = torch.randn(BATCH, tokens, channels, device=DEVICE, dtype=COMPUTE_DTYPE)
    if implementation == "int4":
        operands = int4_operands((out_channels, channels))
        quantize = quantizer(operands, channels)
        measure(benchmark, lambda: ops.int4_linear(quantize(x), **operands, out_dtype=COMPUTE_DTYPE))
    else:
        dtype = BASELINES[implementation]
        weight = torch.randn(out_channels, channels, device=DEVICE, dtype=dtype)
        tokens_in = x.to(dtype)
        measure(benchmark, lambda: F.linear(tokens_in, weight))
