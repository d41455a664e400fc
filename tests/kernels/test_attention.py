"""Attention in int8: equal to the reference, close to softmax attention, for any layout, size and magnitude."""

import pytest
import torch
import torch.nn.functional as F
from flat_operators import reference

from dq_kernels.cpu import attention as cpu_attention
from dq_kernels.triton.attention import quantize_keys_values_kernel
from dq_kernels.triton.launch import launch_options, next_power_of_2

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
TENSORS = ("query", "key", "value")


def quantizer_of(arguments):
    return {name: value for name, value in arguments.items() if name.startswith("quantizer_")}


def float64_attention(query, key, value, heads):
    q, k, v = (x.double().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.fixture
def assert_attention_alike(relative_rms):
    """Asserts that fp32 results are equal up to rounding, except for few queries.

    The reference computes scores and exponentials in float64. A probability at a rounding boundary may be rounded to
    the other side: then it differs by 1/255 of the largest, and the query's result accordingly.
    """

    def assert_attention_alike(actual, expected, heads):
        assert actual.dtype == expected.dtype == torch.float32
        assert actual.is_contiguous()
        assert relative_rms(actual, expected) < 1e-3
        errors, sizes = (x.double().unflatten(-1, (heads, -1)).norm(dim=-1) for x in (actual - expected, expected))
        others = (errors > 3e-6 * sizes.square().mean().sqrt()).sum()
        assert others <= max(1, sizes.numel() // 50), f"{others} of {sizes.numel()} queries differ"

    return assert_attention_alike


@pytest.fixture
def assert_steps_alike():
    """Asserts that int8 results are equal, except for one step in 1 of 500 values, which lay at a rounding boundary."""

    def assert_steps_alike(actual, expected):
        assert actual.dtype == torch.int8
        assert actual.is_contiguous()
        assert actual.shape == expected.shape
        steps = (actual.int() - expected.int()).abs()
        assert steps.max() <= 1
        assert steps.count_nonzero() <= max(1, steps.numel() // 500)

    return assert_steps_alike


@pytest.mark.parametrize(
    ("query_length", "key_length"),
    [(1, 65), (64, 65), (1, 1), *((65, key_length) for key_length in (1, 63, 64, 65, 77, 130))],
)
def test_attention_of_any_lengths_is_the_references(
    run, attention_arguments, assert_attention_alike, query_length, key_length
):
    arguments = attention_arguments(1, query_length, key_length, 2, 8)

    assert_attention_alike(run("int8_attention", arguments), reference.int8_attention(**arguments), 2)


@pytest.mark.parametrize(
    ("heads", "head_channels"), [(3, 1), (1, 8), (2, 32), (3, 40), (2, 64), (1, 80), (2, 80), (1, 128)]
)
def test_attention_of_any_heads_is_the_references(
    run, attention_arguments, assert_attention_alike, heads, head_channels
):
    arguments = attention_arguments(2, 9, 77, heads, head_channels)

    assert_attention_alike(run("int8_attention", arguments), reference.int8_attention(**arguments), heads)


# fp16: a step of 2^-10 where a value is rounded to the other side. bf16: all values may be a step of 2^-7 off, because
# Triton's interpreter truncates to bf16 where a GPU rounds.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 5e-3)], ids=str)
def test_result_has_the_querys_dtype(run, attention_arguments, relative_rms, dtype, tolerance):
    arguments = attention_arguments(2, 33, 77, 2, 40, dtype)
    expected = reference.int8_attention(**arguments)

    y = run("int8_attention", arguments)

    assert y.dtype == expected.dtype == dtype
    assert y.is_contiguous()
    assert relative_rms(y, expected) < tolerance


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_and_values_may_have_other_dtypes_than_the_query(run, attention_arguments, assert_attention_alike, dtype):
    """The result is that of their values in fp32."""
    arguments = attention_arguments(2, 9, 77, 2, 40)
    arguments |= {"key": arguments["key"].to(dtype), "value": arguments["value"].bfloat16()}
    wide = {name: arguments[name].float() for name in TENSORS}

    assert_attention_alike(run("int8_attention", arguments), reference.int8_attention(**arguments | wide), 2)


def chunks(generator):
    return torch.randn(2, 70, 3 * 80, generator=generator).chunk(3, dim=-1)


def transposed(generator):
    return torch.randn(3, 2, 80, 70, generator=generator).transpose(2, 3)


def expanded(generator):
    query, key_value = torch.randn(2, 70, 80, generator=generator), torch.randn(2, 1, 70, 80, generator=generator)
    return query, *key_value.expand(2, 2, -1, -1)


def every_other_token_and_channel(generator):
    return torch.randn(3, 2, 140, 160, generator=generator)[:, :, ::2, 1::2]


@pytest.mark.parametrize("views", [chunks, transposed, expanded, every_other_token_and_channel])
def test_attention_takes_any_strides(run, assert_attention_alike, views):
    tensors = dict(zip(TENSORS, views(torch.Generator().manual_seed(0)), strict=True))
    arguments = tensors | {"heads": 2}
    assert not all(tensor.is_contiguous() for tensor in tensors.values())
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}

    assert_attention_alike(run("int8_attention", arguments), reference.int8_attention(**contiguous, heads=2), 2)


@pytest.mark.parametrize("key_length", [1, 64, 77, 1000])
@pytest.mark.parametrize("head_channels", [8, 40, 128])
def test_reference_is_close_to_softmax_attention(attention_arguments, relative_rms, head_channels, key_length):
    arguments = attention_arguments(2, 50, key_length, 2, head_channels)

    assert relative_rms(reference.int8_attention(**arguments), float64_attention(**arguments)) < 0.02


def test_what_all_keys_have_in_common_changes_nothing(run, attention_arguments, relative_rms):
    """Up to rounding: keys that are 100 times as large lose their last bits, some move to the next step of 1/127."""
    arguments = attention_arguments(2, 33, 77, 2, 40)
    expected = run("int8_attention", arguments)
    common = 100 * torch.randn(2, 1, 80, generator=torch.Generator().manual_seed(1))

    assert relative_rms(run("int8_attention", arguments | {"key": arguments["key"] + common}), expected) < 1e-3


@pytest.mark.parametrize("key_length", [1, 130])
@pytest.mark.parametrize("alike", ["query-of-zeros", "equal-keys"])
def test_equal_scores_give_the_mean_of_the_values_to_half_a_step(run, attention_arguments, alike, key_length):
    arguments = attention_arguments(2, 5, key_length, 1, 40)
    if alike == "equal-keys":
        arguments["key"] = arguments["key"][:, :1].expand(-1, key_length, -1)
    else:
        arguments["query"].zero_()
    mean = arguments["value"].mean(1, keepdim=True)
    step = (arguments["value"] - mean).abs().max() / 127

    assert ((run("int8_attention", arguments) - mean).abs() <= 0.5 * step + 1e-6).all()


@pytest.mark.parametrize("large", [0, 1, 2])
def test_query_with_one_dominant_key_gets_its_value_to_half_a_step_of_the_block(run, large):
    """A block's step does not depend on another block with values that are 1000 times as large."""
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(2, 130, 64, generator=generator).sign()
    chosen = torch.tensor([0, 129, 64, 63, 5, 127, 128, 70])
    value = torch.randn(2, 130, 64, generator=generator)
    value[:, 64 * large : 64 * (large + 1)] *= 1000
    blocks = (value - value.mean(1, keepdim=True)).split(64, dim=1)
    step = torch.cat([part.abs().amax((1, 2), keepdim=True).expand_as(part) for part in blocks], 1) / 127

    y = run("int8_attention", {"query": 20 * key[:, chosen], "key": key, "value": value, "heads": 1})

    assert ((y - value[:, chosen]).abs() <= 0.5001 * step[:, chosen]).all()


@pytest.mark.parametrize("key_length", [64, 77])
def test_zeros_give_zeros(run, key_length):
    query, key = torch.zeros(2, 5, 16), torch.zeros(2, key_length, 16)

    assert run("int8_attention", {"query": query, "key": key, "value": key, "heads": 2}).eq(0).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize(
    ("name", "token", "number"),
    [
        *(("query", token, number) for token, number in ((0, torch.nan), (4, torch.inf), (0, -torch.inf))),
        *(("key", token, number) for token, number in ((0, torch.nan), (0, torch.inf), (66, -torch.inf))),
        *(("value", token, number) for token, number in ((66, torch.nan), (3, torch.inf), (3, -torch.inf))),
        *((name, 66, torch.inf) for name in ("key", "value")),
    ],
)
def test_number_that_is_not_finite_makes_nan_of_all_results_that_depend_on_it(
    run, attention_arguments, name, token, number
):
    arguments = attention_arguments(2, 5, 67, 2, 8, torch.float16)
    finite = run("int8_attention", arguments)
    arguments[name][1, token, 5] = number
    hit = torch.zeros(finite.shape, dtype=torch.bool)
    hit[1, token if name == "query" else slice(None), :8] = True

    y = run("int8_attention", arguments)

    assert torch.equal(y.isnan(), hit)
    assert torch.equal(y[~hit], finite[~hit])


def test_attention_is_the_same_in_every_run(run, attention_arguments):
    arguments = attention_arguments(2, 9, 77, 2, 40)

    assert torch.equal(run("int8_attention", arguments), run("int8_attention", arguments))


def test_samples_do_not_touch_each_other(run, attention_arguments):
    arguments = attention_arguments(3, 9, 77, 2, 8)
    others = {name: arguments[name].clone() for name in TENSORS}
    for tensor in others.values():
        tensor[::2] = 100 + 1000 * tensor[::2].flip(0)

    assert torch.equal(run("int8_attention", arguments | others)[1], run("int8_attention", arguments)[1])


def test_heads_do_not_touch_each_other(run, attention_arguments, assert_attention_alike):
    arguments = attention_arguments(2, 9, 77, 3, 40)
    alone = {name: arguments[name][..., 40:80] for name in TENSORS}

    y = run("int8_attention", arguments)

    assert_attention_alike(y[..., 40:80].contiguous(), run("int8_attention", alone | {"heads": 1}), 1)


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("queries", ["of-zeros", "of-ones"])
def test_extreme_values_do_not_overflow(run, relative_rms, queries, sign):
    """Queries, keys and values all have +-127 steps; probabilities are all 1, or 0 for every other key."""
    key = torch.ones(1, 640, 128)
    key[:, 1::2] = -1
    value = sign * torch.ones(1, 640, 128)
    query = torch.stack([torch.ones(128), -torch.ones(128)])[None] * (queries == "of-ones")

    y = run("int8_attention", {"query": query, "key": key, "value": value, "heads": 1})

    assert relative_rms(y, value[:, :2]) < 1e-6


@pytest.mark.parametrize(
    "factors",
    [
        pytest.param({"query": 1e29, "key": 1e-29}, id="large-queries"),
        pytest.param({"query": 1e-29, "key": 1e29}, id="large-keys"),
        pytest.param({"query": 1e-35}, id="queries-that-count-as-0"),
        pytest.param({"key": 1e-35}, id="keys-that-count-as-0"),
        pytest.param({"query": 1e-35, "key": 1e-35}, id="tiny-queries-and-keys"),
        pytest.param({"value": 1e30}, id="large-values"),
        pytest.param({"value": 1e-28}, id="small-values"),
    ],
)
def test_magnitude_may_be_any(run, attention_arguments, assert_attention_alike, factors):
    arguments = attention_arguments(1, 9, 77, 2, 8)
    for name, factor in factors.items():
        arguments[name] *= factor
    value_factor = factors.get("value", 1)

    y, expected = run("int8_attention", arguments), reference.int8_attention(**arguments)

    assert_attention_alike(y / value_factor, expected / value_factor, 2)


def test_values_that_count_as_0_give_their_mean(run, attention_arguments):
    arguments = attention_arguments(1, 9, 77, 2, 8)
    arguments["value"] *= 1e-35
    mean = arguments["value"].mean(1, keepdim=True)

    torch.testing.assert_close(1e35 * run("int8_attention", arguments), 1e35 * mean.expand(-1, 9, -1))


@pytest.mark.parametrize("key_length", [64, 77])
@pytest.mark.parametrize("magnitude", [1e-19, 1e-24, 1e-29])
def test_scores_that_underflow_are_equal(run, attention_arguments, magnitude, key_length):
    arguments = attention_arguments(1, 9, key_length, 2, 8)
    flat = arguments | {"query": torch.zeros(1, 9, 16)}
    arguments |= {name: magnitude * arguments[name] for name in ("query", "key")}

    torch.testing.assert_close(run("int8_attention", arguments), run("int8_attention", flat), rtol=0, atol=1e-6)


@pytest.mark.parametrize("magnitude", [20.0, 130.0, 500.0, 3000.0])
def test_largest_probability_is_255_however_large_the_scores(run, relative_rms, magnitude):
    """The rounding of large scores must not make it 256, which int8 cannot hold."""
    generator = torch.Generator().manual_seed(0)
    key = magnitude * torch.randn(1, 200, 64, generator=generator).sign()
    value = torch.randn(1, 200, 64, generator=generator)

    y = run("int8_attention", {"query": key * torch.rand(1, 200, 1, generator=generator), "key": key} | {
        "value": value, "heads": 1
    })  # fmt: skip

    assert relative_rms(y, value) < 0.01


def test_small_probabilities_beside_a_large_one_are_lost_to_the_mean(run, relative_rms):
    """As after the first token of a prompt: each is less than half a step of 1/255, but their sum is not small."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.zeros(1, 4, 8), torch.zeros(1, 640, 8), 1 + torch.randn(1, 640, 8, generator=generator)
    query[..., 0] = key[:, 0, 0] = 7**0.5 * 8**0.25  # a score of 7: exp(-7) of the largest is 0.23 steps
    exact = float64_attention(query, key, value, 1)
    assert (exact - value[:, :1]).norm() > 0.2 * exact.norm()

    y = run("int8_attention", {"query": query, "key": key, "value": value, "heads": 1})

    assert relative_rms(y, exact) < 0.03


@pytest.mark.parametrize("flip", [False, True], ids=["largest-first", "largest-last"])
def test_probabilities_are_rounded_to_steps_of_1_255(run, flip):
    """Two keys have the values -1 and 1, and the first a score that is larger by -log(p): (round(p) - 1) / (1 + p).

    Every step is approached from both sides, 0.2 from the boundary.
    """
    steps = (
        torch.arange(1, 255, dtype=torch.float64).repeat(2) + torch.tensor([[-0.3], [0.3]]).expand(-1, 254).flatten()
    )
    p = steps / 255
    query = torch.zeros(1, 508, 4)
    query[0, :, 0] = -p.log()  # times 2 / sqrt(4)
    key, value = torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)
    key[0, :, 0] = torch.tensor([1.0, -1.0])
    value[0, 0], value[0, 1] = -1, 1
    if flip:
        key, value = key.flip(1), value.flip(1)
    arguments = {"query": query, "key": key, "value": value, "heads": 1}

    for y in (run("int8_attention", arguments), reference.int8_attention(**arguments)):
        rounded = 255 * (y[0].double() * (1 + p[:, None]) + 1)

        assert (rounded - steps.round()[:, None]).abs().max() < 1e-3


def test_no_query_gives_no_result(run, attention_arguments):
    arguments = attention_arguments(2, 0, 77, 2, 8)

    assert run("int8_attention", arguments).shape == (2, 0, 16)


@pytest.mark.parametrize("implementation", ["cpu"], indirect=True)
@pytest.mark.parametrize("at_once", [1, 2 * 9 * 128, 4 * 9 * 128])
def test_cpu_takes_as_many_heads_at_a_time_as_memory_allows(
    run, attention_arguments, assert_attention_alike, monkeypatch, at_once
):
    arguments = attention_arguments(2, 9, 77, 3, 40)
    expected = run("int8_attention", arguments)
    monkeypatch.setattr(cpu_attention, "ATTENTION_SCORES", at_once)

    assert_attention_alike(run("int8_attention", arguments), expected, 3)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 8), (torch.float16, 8), (torch.bfloat16, 4)], ids=str)
def test_quantized_attention_is_the_references(run, attention_quantize_arguments, assert_steps_alike, dtype, bits):
    arguments = attention_quantize_arguments(4, 33, 65, 1, 40, dtype=dtype) | {"quantizer_bits": bits}
    expected = reference.int8_attention_quantize(**arguments)
    assert expected.unique().numel() > (100 if bits == 8 else 12)

    assert_steps_alike(run("int8_attention_quantize", arguments), expected)


@pytest.mark.parametrize(("query_length", "heads", "head_channels"), [(1, 1, 128), (65, 3, 8), (7, 2, 1)])
def test_quantized_attention_of_any_size_is_the_references(
    run, attention_quantize_arguments, assert_steps_alike, query_length, heads, head_channels
):
    arguments = attention_quantize_arguments(2, query_length, 77, heads, head_channels)

    assert_steps_alike(run("int8_attention_quantize", arguments), reference.int8_attention_quantize(**arguments))


def test_quantized_attention_clamps_what_is_too_large(run, attention_quantize_arguments):
    arguments = attention_quantize_arguments(2, 9, 9, 2, 8)
    arguments["value"] = 1e6 * arguments["value"].abs()

    assert run("int8_attention_quantize", arguments).eq(127).all()
    assert run("int8_attention_quantize", arguments | {"value": -arguments["value"]}).eq(-128).all()


def test_reference_quantizes_its_attention_before_that_is_rounded(attention_quantize_arguments):
    arguments = attention_quantize_arguments(4, 33, 77, 2, 40, dtype=torch.bfloat16)
    wide = {name: arguments[name].float() for name in TENSORS}
    y = reference.int8_attention(**wide, heads=2)

    assert torch.equal(reference.int8_attention_quantize(**arguments), reference.quantize(y, **quantizer_of(arguments)))


@pytest.mark.parametrize("shape", [(2, 7, 192, 2, 40), (1, 65, 64, 1, 8), (1, 3, 1152, 1, 8)], ids=str)
def test_attention_with_statistics_of_the_keys_and_values_is_the_references(
    run, attention_quantize_arguments, assert_steps_alike, shape
):
    arguments = attention_quantize_arguments(*shape)
    expected = reference.int8_attention_quantize(**arguments)
    key, value = arguments["key"], arguments["value"]
    statistics = reference.channel_statistics(torch.cat([value, key, value], -1)[:, :, None])[..., key.shape[2] :]
    assert not statistics.is_contiguous()

    assert_steps_alike(run("int8_attention_quantize", arguments | {"statistics": statistics}), expected)


@pytest.mark.parametrize("head_channels", [32, 40])
@pytest.mark.parametrize("num_runs", [1, 3, 18])
def test_keys_and_values_are_quantized_exactly_as_the_references(triton_device, head_channels, num_runs):
    """Blocks of very different magnitudes, the last one ragged, of strided tensors; padding is 0.

    The sums are small integers, which add up exactly in any order.
    """
    batch, length, heads, blocks, block_d = 2, 150, 3, 3, max(32, next_power_of_2(head_channels))
    channels = heads * head_channels
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(batch, length, 2 * channels, generator=generator)
    both *= torch.tensor([0.1, 30.0, 1.0]).repeat_interleave(64)[:length, None]
    both[0, 64:128, : channels // heads] = 0  # keys of one head
    key, value = both.to(triton_device).chunk(2, dim=-1)
    sums = torch.randint(-99, 99, (batch, num_runs, 2 * channels), generator=generator).float()
    sums[0, :, :head_channels] = 0
    means = (sums.sum(1, keepdim=True) / length).chunk(2, dim=-1)
    key_sums, value_sums = sums.to(triton_device).chunk(2, dim=-1)
    key8, value8, scales, sums8, value_mean = (
        torch.full(shape, 99, dtype=dtype, device=triton_device)
        for shape, dtype in (
            ((batch, heads, blocks, 64, block_d), torch.int8),
            ((batch, heads, blocks, block_d, 64), torch.int8),
            ((batch, heads, blocks, 2), torch.float32),
            ((batch, heads, blocks, block_d), torch.int32),
            ((batch, channels), torch.float32),
        )
    )

    quantize_keys_values_kernel[(blocks, heads, batch)](
        key, value, key_sums, value_sums, key8, value8, scales, sums8, value_mean, length, num_runs,
        *key.stride(), *value.stride(), *key_sums.stride()[:2], HEAD_CHANNELS=head_channels, BLOCK_N=64,
        BLOCK_D=block_d, BLOCK_RUNS=16, num_warps=2, **launch_options(), enable_fp_fusion=False,
    )  # fmt: skip

    def blocks_of(x):
        x = F.pad(x, (0, 0, 0, blocks * 64 - length)).unflatten(-1, (heads, head_channels)).transpose(1, 2)
        return x.unflatten(2, (blocks, 64))

    expected_key8, key_scales = reference.quantize_to_127(blocks_of(key.cpu() - means[0]), (-2, -1))
    expected_value8, value_scales = reference.quantize_to_127(blocks_of(value.cpu() - means[1]), (-2, -1))
    beyond = (0, block_d - head_channels)
    assert torch.equal(key8.cpu(), F.pad(expected_key8, beyond))
    assert torch.equal(value8.cpu(), F.pad(expected_value8, beyond).mT)
    assert torch.equal(scales.cpu(), torch.stack([key_scales, value_scales], dim=-1)[..., 0, 0, :])
    assert torch.equal(sums8.cpu(), F.pad(expected_value8.sum(-2, dtype=torch.int32), beyond))
    assert torch.equal(value_mean.cpu(), means[1][:, 0])
