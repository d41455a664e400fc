"""The number of kernels that one forward pass of a fused UNet starts on a GPU."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from benchmarks.static_analysis.launch_count import counted_kernels, kernels_of
from dq_kernels import ops


def test_kernels_of_pytorch_and_triton_are_counted_and_views_are_not():
    x = torch.empty(2, 4, 4, 8, dtype=torch.float16, device="meta")
    tables = [torch.empty(size, device="meta") for size in (8, 3)]
    indices = [torch.empty(size, dtype=torch.int32, device="meta") for size in (3, 2)]
    quantizer = ops.Quantizer(*tables, *indices, 8)

    with counted_kernels() as count:
        y = F.silu(x).permute(0, 3, 1, 2).flatten(2)  # a view
        y = torch.cat([y, y.contiguous()]).unflatten(1, (2, 4)).transpose(2, 3)
        F.scaled_dot_product_attention(y, y, y)
        ops.quantize(x, quantizer)
        ops.quantize(x, quantizer)

    expected = {"silu": 1, "clone": 1, "cat": 1, "scaled_dot_product_attention": 1, "quantize": 2}
    assert count == Counter(expected)


@pytest.mark.parametrize(
    ("unet", "int8_attention", "most"),
    [
        ("sd15", (), 380),
        ("sdxl", (), 1010),
        ("sd15", ("attn1", "attn2"), 380),
        ("sdxl", ("attn1", "attn2"), 1010),
    ],
)
def test_kernels_of_one_forward_pass(unet, int8_attention, most):
    count = kernels_of(unet, int8_attention=int8_attention)

    assert count.total() <= most, count
    assert count["int4_gemm"] > most / 3  # the layers did run
