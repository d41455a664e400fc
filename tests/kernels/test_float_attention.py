"""Attention to few keys in floating point, quantized: the reference's int8, for every strides and head size."""

import pytest
import torch
import torch.nn.functional as F
from flat_operators import reference

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# (queries, keys, heads, channels of a head)
SHAPES = [(5, 7, 2, 3), (130, 77, 2, 40), (3, 128, 1, 64), (1, 1, 3, 2), (9, 16, 1, 160), (129, 33, 2, 32)]


def assert_close(q, expected, dtype):
    """Rounding of the probabilities to the dtype moves some values, at a rounding boundary, by one step."""
    assert q.dtype == torch.int8
    assert q.is_contiguous()
    assert q.shape == expected.shape
    steps = (q.int() - expected.int()).abs()
    assert steps.max() <= (2 if dtype == torch.bfloat16 else 1)
    share = {torch.float16: 0.02, torch.bfloat16: 0.15, torch.float32: 0.001}[dtype]
    assert steps.count_nonzero() <= max(1, share * steps.numel())


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((shape, torch.float16) for shape in SHAPES), *((SHAPES[1], dtype) for dtype in DTYPES[1:])],
    ids=str,
)
def test_equals_the_reference(run, implementation, triton_device, attention_quantize_arguments, shape, dtype):
    if dtype == torch.bfloat16 and (implementation, triton_device) == ("triton", "cpu"):
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16 values")
    arguments = attention_quantize_arguments(3, *shape, dtype=dtype)

    assert_close(run("attention_quantize", arguments), reference.attention_quantize(**arguments), dtype)


def test_takes_chunks_of_one_tensor(run, attention_quantize_arguments):
    arguments = attention_quantize_arguments(2, 9, 9, 2, 6)
    together = torch.randn(2, 9, 36, generator=torch.Generator().manual_seed(0))
    arguments |= dict(zip(("query", "key", "value"), together.chunk(3, dim=-1), strict=True))

    assert_close(run("attention_quantize", arguments), reference.attention_quantize(**arguments), torch.float32)


def test_large_scores_do_not_overflow(run, attention_quantize_arguments):
    arguments = attention_quantize_arguments(2, 9, 11, 2, 6)
    arguments["query"] = 1000 * arguments["query"]

    assert_close(run("attention_quantize", arguments), reference.attention_quantize(**arguments), torch.float32)


@pytest.mark.parametrize("bits", [8, 4])
def test_reference_quantizes_torchs_attention(attention_quantize_arguments, bits):
    arguments = attention_quantize_arguments(2, 9, 11, 2, 6) | {"quantizer_bits": bits}
    per_head = (arguments[name].double().unflatten(2, (2, 6)).transpose(1, 2) for name in ("query", "key", "value"))
    y = F.scaled_dot_product_attention(*per_head).transpose(1, 2).flatten(2)
    quantizer = {name: value for name, value in arguments.items() if name.startswith("quantizer_")}

    assert torch.equal(reference.attention_quantize(**arguments), reference.quantize(y, **quantizer))
