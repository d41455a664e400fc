"""Activation quantization: implementations equal the reference bit for bit, the reference numbers by hand."""

import pytest
import torch
from flat_operators import reference

from dq_kernels.records import Quantizer

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def quantize_arguments(x, bits=8, act_scale=(0.011, 0.3, 0.07), act_zero_point=(-5, 6, 0), timestep_index=None):
    """Arguments with a random dilation; by default samples take the timesteps in turn."""
    generator = torch.Generator().manual_seed(1)
    if timestep_index is None:
        timestep_index = [(sample + 1) % len(act_scale) for sample in range(x.shape[0])]
    return {
        "x": x,
        "quantizer_dilation": 1 + 3 * torch.rand(x.shape[-1], generator=generator),
        "quantizer_scale": torch.tensor(act_scale, dtype=torch.float32),
        "quantizer_zero_point": torch.tensor(act_zero_point, dtype=torch.int32),
        "quantizer_timestep_index": torch.tensor(timestep_index, dtype=torch.int32),
        "quantizer_bits": bits,
        "padding": (0, 0),
    }


def plain_arguments(values, bits=8, act_scale=1.0, act_zero_point=0):
    """One sample [1, K], one timestep, no dilation."""
    arguments = quantize_arguments(torch.tensor([values]), bits, [act_scale], [act_zero_point], [0])
    return arguments | {"quantizer_dilation": torch.ones(len(values))}


def random_x(*shape, dtype=torch.float32):
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)


@pytest.mark.parametrize(
    ("shape", "bits", "dtype"),
    [
        *((shape, 8, torch.float32) for shape in ((1, 2), (5, 41), (2, 33, 66), (3, 1, 5, 129), (2, 9, 7, 4))),
        *(((3, 1, 5, 129), bits, dtype) for bits in (8, 4) for dtype in (torch.float16, torch.bfloat16)),
        *(((5, 41), bits, torch.float32) for bits in (6, 4)),
    ],
    ids=str,
)
def test_equals_the_reference(run, dtype, bits, shape):
    arguments = quantize_arguments(random_x(*shape, dtype=dtype), bits)

    q = run("quantize", arguments)

    assert q.dtype == torch.int8
    assert q.is_contiguous()
    assert torch.equal(q, reference.quantize(**arguments))


def test_halves_round_up_whatever_their_sign(run):
    arguments = plain_arguments([-3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5], act_zero_point=10)
    expected = [[7, 8, 9, 10, 11, 12, 13, 14]]

    assert reference.quantize(**arguments).tolist() == expected
    assert run("quantize", arguments).tolist() == expected


def test_dilation_and_scale_divide_then_the_zero_point_is_added(run):
    arguments = plain_arguments([6.0, -6.0, 6.0, 0.0], act_scale=0.5, act_zero_point=-7)
    arguments["quantizer_dilation"] = torch.tensor([1.0, 1.0, 4.0, 2.0])
    expected = [[5, -19, -4, -7]]

    assert reference.quantize(**arguments).tolist() == expected
    assert run("quantize", arguments).tolist() == expected


@pytest.mark.parametrize(("bits", "low", "high"), [(8, -128, 127), (6, -32, 31), (4, -8, 7), (2, -2, 1)])
def test_saturates_at_the_ends_of_the_range_after_the_shift(run, bits, low, high):
    arguments = plain_arguments([low - 2.0, low - 1.0, low, high - 2.0, high - 1.0, high], bits, act_zero_point=1)
    expected = [[low, low, low + 1, high - 1, high, high]]

    assert reference.quantize(**arguments).tolist() == expected
    assert run("quantize", arguments).tolist() == expected


@pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy's, in Triton's interpreter: the overflow is meant
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_huge_values_saturate_and_do_not_wrap(run, dtype):
    largest = torch.finfo(dtype).max
    x = torch.tensor([[3e4, -3e4, largest, -largest, torch.inf, -torch.inf]], dtype=dtype)
    arguments = quantize_arguments(x, act_scale=[1e-6], act_zero_point=[3], timestep_index=[0])
    expected = [[127, -128, 127, -128, 127, -128]]

    assert reference.quantize(**arguments).tolist() == expected
    assert run("quantize", arguments).tolist() == expected


def test_values_at_and_beside_half_steps_round_as_in_the_reference(run):
    """A fused multiply-add, a division or another order of operations would round some of these values differently."""
    generator = torch.Generator().manual_seed(0)
    samples, steps, channels = 8, 64, 23
    act_scale = 0.001 + 0.1 * torch.rand(samples, generator=generator)
    half_steps = (torch.arange(steps) - 32.5).view(1, -1, 1) * act_scale.view(-1, 1, 1)
    x = half_steps.repeat(1, 1, channels)
    arguments = quantize_arguments(x, 8, act_scale.tolist(), [0, 90, -90, 7] * (samples // 4), range(samples))
    x = x * arguments["quantizer_dilation"]
    below, above = (torch.nextafter(x, torch.tensor(end)) for end in (-torch.inf, torch.inf))
    arguments["x"] = torch.cat([below, x, above], dim=1)

    q = run("quantize", arguments)

    assert torch.equal(q, reference.quantize(**arguments))
    assert q[:, :steps].ne(q[:, 2 * steps :]).any(), "no value crosses a half step"


def test_each_sample_takes_its_own_timesteps_scale(run):
    x = random_x(1, 4, 6).expand(3, -1, -1)
    together = run("quantize", quantize_arguments(x, timestep_index=[2, 0, 1]))
    alone = [run("quantize", quantize_arguments(x[:1], timestep_index=[t])) for t in (2, 0, 1)]

    assert torch.equal(together, torch.cat(alone))
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("channels", [1, 3, 65])
def test_odd_channel_count_is_padded_with_the_zero_point(run, channels):
    arguments = quantize_arguments(random_x(3, 5, channels), timestep_index=[0, 1, 2])

    q = run("quantize", arguments)

    assert q.shape == (3, 5, channels + 1)
    assert q[..., -1].tolist() == [[zero_point] * 5 for zero_point in (-5, 6, 0)]
    assert torch.equal(q, reference.quantize(**arguments))


@pytest.mark.parametrize(("channels", "padding"), [(38, (0, 0)), (37, (1, 2))], ids=["unpadded", "odd-and-padded"])
def test_any_strides_give_contiguous_nhwc(run, strided_view, channels, padding):
    arguments = quantize_arguments(strided_view(random_x(4, 6, 7, channels))) | {"padding": padding}

    q = run("quantize", arguments)

    assert q.is_contiguous()
    assert torch.equal(q, reference.quantize(**arguments))


@pytest.mark.parametrize(("padding", "channels"), [((1, 1), 130), ((2, 0), 5), ((0, 3), 130), ((4, 5), 5)], ids=str)
def test_border_holds_the_quantized_zero_of_its_sample(run, padding, channels):
    arguments = quantize_arguments(random_x(4, 3, 2, channels))
    q = run("quantize", arguments | {"padding": padding})
    zero_point = arguments["quantizer_zero_point"][arguments["quantizer_timestep_index"]]
    expected = zero_point.to(torch.int8).view(-1, 1, 1, 1).repeat(1, *q.shape[1:])
    rows, columns = slice(padding[0], padding[0] + 3), slice(padding[1], padding[1] + 2)

    expected[:, rows, columns] = reference.quantize(**arguments)

    assert q.shape == (4, 3 + 2 * padding[0], 2 + 2 * padding[1], channels + channels % 2)
    assert q.is_contiguous()
    assert torch.equal(q, expected)


def test_reference_quantizes_a_border_of_zeros():
    x = random_x(3, 4, 5, 8)
    bordered = quantize_arguments(torch.nn.functional.pad(x, (0, 0, 2, 2, 1, 1)))

    assert torch.equal(reference.quantize(**bordered | {"x": x, "padding": (1, 2)}), reference.quantize(**bordered))


def test_quantizing_leaves_its_input_alone(run):
    x = random_x(2, 3, 4)
    before = x.clone()

    run("quantize", quantize_arguments(x))

    assert torch.equal(x, before)


@pytest.mark.parametrize("bits", [8, 4])
def test_reference_dequantizes_to_within_half_a_step(bits):
    x = random_x(3, 8, 5).clamp(-2, 2)
    step = 4.2 / 2**bits
    arguments = quantize_arguments(x, bits, [step, 2 * step, 4 * step], [0, 0, 0])
    quantizer = Quantizer(*(arguments[f"quantizer_{field}"] for field in Quantizer._fields))

    q = reference.quantize(**arguments)
    restored = reference.dequantize_activation(q, quantizer)

    half_steps = arguments["quantizer_scale"][[1, 2, 0], None, None] * arguments["quantizer_dilation"] / 2
    assert restored.shape == x.shape
    assert ((restored - x).abs() <= half_steps * (1 + 1e-5)).all()
