"""Dilation: the paper's rule against loops, what it promises about every range, and the joint rule's error."""

import math

import pytest
import torch

from dq_runtime.calibration.dilation import VALUES_PER_TIMESTEP, joint_dilation
from dq_runtime.calibration.temporal import by_group, rounded, temporal_quantizer
from dq_runtime.weights import quantize_weight, shared_weight_dilation, weight_dilation

UNCAPPED = math.inf
SHAPES = [(6, 10), (12, 5), (1, 4), (5, 6, 3, 3), (4, 8, 1, 1), (3, 4, 1, 5)]


def random_weight(shape, seed=0):
    """Heavy-tailed, with zeros in many places, an all-zero input channel and an all-zero output channel."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) ** 3
    weight[torch.rand(shape, generator=generator) < 0.2] = 0
    weight[:, 1] = 0
    if shape[0] > 3:
        weight[2] = 0
    return weight


def rule_by_hand(weight, max_dilation):
    """s_k = min over n and taps of max|w_n| / |w_nk|; 1 where there is no weight."""
    rows = weight.reshape(*weight.shape[:2], -1).tolist()
    dilation = []
    for k in range(weight.shape[1]):
        smallest = math.inf
        for n in range(weight.shape[0]):
            largest = max(abs(w) for taps in rows[n] for w in taps)
            for w in rows[n][k]:
                if w != 0:
                    smallest = min(smallest, largest / abs(w))
        dilation.append(1.0 if smallest == math.inf else min(smallest, max_dilation))
    return torch.tensor(dilation)


@pytest.mark.parametrize("max_dilation", [1.0, 1.5, 8.0, UNCAPPED])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_papers_rule(shape, max_dilation):
    for seed in range(3):
        weight = random_weight(shape, seed)

        dilation = weight_dilation(weight, max_dilation)

        assert dilation.dtype == torch.float32
        # The loops divide in float64.
        torch.testing.assert_close(dilation, rule_by_hand(weight, max_dilation), rtol=2**-23, atol=0)


def test_an_example_by_hand():
    weight = torch.tensor([[4.0, -1.0, 0.0, 0.5, 0.0], [0.25, 2.0, -0.5, 0.25, 0.0]])

    # Channels 0 and 1 hold the largest magnitude of a row; 2: 2/0.5; 3: min(4/0.5, 2/0.25); 4: no weight at all.
    assert weight_dilation(weight, UNCAPPED).tolist() == [1.0, 1.0, 4.0, 8.0, 1.0]
    assert weight_dilation(weight, 5.0).tolist() == [1.0, 1.0, 4.0, 5.0, 1.0]


def test_every_tap_of_a_convolution_counts():
    weight = torch.full((2, 3, 3, 3), 0.125)
    weight[:, 0, 1, 1] = 1.0
    weight[1, 2, 2, 0] = -0.5  # one tap of one output channel limits the whole input channel

    assert weight_dilation(weight, UNCAPPED).tolist() == [1.0, 8.0, 2.0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_saturated_channels_get_exactly_one(shape):
    weight = random_weight(shape, seed=4) * (1 / 3)
    magnitude = weight.abs().reshape(*shape[:2], -1).amax(2)
    saturated = ((magnitude == magnitude.amax(1, keepdim=True)) & (magnitude > 0)).any(0)

    dilation = weight_dilation(weight, 8.0)

    assert bool(saturated.any())
    assert bool((dilation[saturated] == 1).all())
    assert bool((dilation >= 1).all())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_output_channel_gets_a_larger_weight(shape):
    for seed in range(20):
        weight = random_weight(shape, seed)
        dilated = weight * weight_dilation(weight, UNCAPPED).view(-1, *[1] * (len(shape) - 2))

        before, after = weight.abs().flatten(1).amax(1), dilated.abs().flatten(1).amax(1)
        assert bool((after <= before * (1 + 2**-23)).all())  # s |w| rounds once
        assert bool((after >= before).all())


def test_the_activation_range_only_shrinks_and_the_result_stays():
    generator = torch.Generator().manual_seed(0)
    weight, x = random_weight((16, 24)), torch.randn(24, 50, generator=generator) * 5
    dilation = weight_dilation(weight, 8.0)[:, None]

    assert bool((dilation > 1).any())
    assert bool(((x / dilation).abs() <= x.abs()).all())
    expected = weight.double() @ x.double()
    actual = (weight * dilation[:, 0]).double() @ (x / dilation).double()
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())  # fp32 s w and x / s


def test_layers_that_share_an_input_dilate_like_one_layer():
    first, second = random_weight((6, 10), seed=1), random_weight((9, 10), seed=2)

    together = weight_dilation(torch.cat([first, second]), 8.0)

    smaller = torch.minimum(weight_dilation(first, 8.0), weight_dilation(second, 8.0))
    assert bool((together > 1).any())
    assert torch.equal(together, smaller)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_dilate_in_fp32(dtype):
    weight = random_weight((6, 10)).to(dtype).requires_grad_()

    dilation = weight_dilation(weight, 8.0)

    assert dilation.dtype == torch.float32
    assert not dilation.requires_grad
    assert torch.equal(dilation, weight_dilation(weight.detach().float(), 8.0))


def test_all_zero_weights_are_left_alone():
    assert weight_dilation(torch.zeros(3, 4), 8.0).tolist() == [1.0] * 4


def activations(timesteps=3, rows=60, channels=12, seed=0, spread=1.5):
    """[rows, K] for each timestep: channels of very different sizes, timesteps too, not centred."""
    generator = torch.Generator().manual_seed(seed)
    size = 10 ** (spread * torch.randn(channels, generator=generator)).clamp(-2, 2)
    offset = torch.randn(channels, generator=generator)
    return [
        (torch.randn(rows + t, channels, generator=generator) + offset) * size * (t + 1) / timesteps
        for t in range(timesteps)
    ]


def quantized_output_error(weights, per_timestep, bits, dilation):
    """Of all layers, from the rounding's definition in float64; a convolution's taps each by themselves."""
    act_scale, zero_point = temporal_quantizer(per_timestep, dilation, bits)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    error = 0.0
    for weight in weights:
        taps = weight.flatten(2).unbind(2) if weight.ndim > 2 else (weight,)
        values, weight_scale = quantize_weight(torch.stack(taps, 1) * dilation)  # [N, taps, K]
        restored = (values.double() * weight_scale.double()[:, None, None]).unbind(1)
        for t, x in enumerate(per_timestep):
            scale, zero = act_scale[t].double(), zero_point[t].double()
            q = (torch.floor(x.double() / (dilation.double() * scale) + 0.5) + zero).clamp(low, high)
            for tap, exact in zip(restored, taps, strict=True):
                difference = (q - zero) * scale @ tap.T - x.double() @ exact.double().T
                error += difference.square().sum().item()
    return error


GROUPS = {
    "linear": [(16, 12)],
    "q, k, v": [(8, 12), (8, 12), (24, 12)],
    "conv": [(6, 12, 3, 3)],
    "conv and its shortcut": [(6, 12, 3, 3), (5, 12, 1, 1)],
}


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("group", GROUPS)
def test_joint_dilation_never_errs_more_than_the_papers_rule_or_none(group, bits):
    gained = 0
    for seed in range(3):
        weights = [random_weight(shape, seed=seed + 10 * i) for i, shape in enumerate(GROUPS[group])]
        x = activations(seed=seed)

        error = quantized_output_error(weights, x, bits, joint_dilation(weights, x, bits, 8.0))

        # The search tries fewer weight scales than quantization does in the end.
        for other in (torch.ones(12), shared_weight_dilation(weights, 8.0)):
            assert error <= 1.03 * quantized_output_error(weights, x, bits, other)
        gained += error < 0.9 * quantized_output_error(weights, x, bits, shared_weight_dilation(weights, 8.0))
    assert gained


def test_joint_dilation_is_judged_on_all_samples():
    """The first rows favour a dilation that loses on the others, which are large in the other channels."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 12, generator=generator)
    first = torch.randn(VALUES_PER_TIMESTEP // 12, 12, generator=generator)
    others = torch.randn(2000, 12, generator=generator)
    first[:, :6] *= 16
    others[:, 6:] *= 16

    assert not torch.equal(joint_dilation([weight], [first], 4, 8.0), torch.ones(12))
    assert torch.equal(joint_dilation([weight], [torch.cat([first, others])], 4, 8.0), torch.ones(12))


@pytest.mark.parametrize("bits", [8, 4])
def test_joint_dilation_leaves_alone_what_is_even_already(bits):
    generator = torch.Generator().manual_seed(0)
    size = 4 ** torch.linspace(-2, 2, 12)
    x = [torch.randn(200, 12, generator=generator)]

    for weight in (torch.randn(16, 12, generator=generator), torch.randn(16, 12, generator=generator) * size):
        error = quantized_output_error([weight], x, bits, joint_dilation([weight], x, bits, 8.0))
        for other in (torch.ones(12), shared_weight_dilation([weight], 8.0)):
            assert error <= 1.03 * quantized_output_error([weight], x, bits, other)


@pytest.mark.parametrize("max_dilation", [1.0, 2.0, 8.0])
@pytest.mark.parametrize("group", GROUPS)
def test_joint_dilation_is_one_vector_within_its_limits(group, max_dilation):
    differing = 0
    for seed in range(3):
        weights = [random_weight(shape, seed=seed + 10 * i) for i, shape in enumerate(GROUPS[group])]

        dilation = joint_dilation(weights, activations(seed=seed), 8, max_dilation)

        assert dilation.shape == (12,)
        assert dilation.dtype == torch.float32
        assert dilation.min() >= 1 / max_dilation
        assert dilation.max() <= max_dilation
        differing += len(dilation.unique()) > 1
    assert differing == 0 if max_dilation == 1 else differing > 0


def test_joint_dilation_may_shrink_channels_whose_weights_are_large_and_inputs_small():
    generator = torch.Generator().manual_seed(0)
    size = 4 ** torch.linspace(-2, 2, 12)
    weight = torch.randn(16, 12, generator=generator) / size
    x = [torch.randn(200, 12, generator=generator) * size]

    dilation = joint_dilation([weight], x, 8, 8.0)

    assert dilation.min() < 0.5
    assert dilation.max() > 2
    assert torch.corrcoef(torch.stack([dilation.log(), size.log()]))[0, 1] > 0.9


def test_all_layers_of_a_group_count_in_the_joint_dilation():
    first, second, x = random_weight((8, 12), seed=1), 100 * random_weight((8, 12), seed=2), activations()

    alone, other = joint_dilation([first], x, 4, 8.0), joint_dilation([second], x, 4, 8.0)
    together = joint_dilation([first, second], x, 4, 8.0)
    error = quantized_output_error([first, second], x, 4, together)
    assert error <= 1.03 * quantized_output_error([first, second], x, 4, torch.ones(12))
    assert not torch.equal(alone, other)
    # The second's error is 10 000 times the first's.
    assert error <= 1.03 * quantized_output_error([first, second], x, 4, other)


def test_timesteps_count_by_their_importance():
    weight = random_weight((8, 12))
    first, second = activations(seed=1)[0], 3 * activations(seed=2)[0].flip(1)

    def error_of_the_first(importance):
        dilation = joint_dilation([weight], [first, second], 4, 8.0, importance)
        return quantized_output_error([weight], [first], 4, dilation)

    assert error_of_the_first([1.0, 1e-9]) < error_of_the_first([1e-9, 1.0])
    assert error_of_the_first([1.0, 1.0]) == error_of_the_first(None)


@pytest.mark.parametrize("timesteps", [2, 20])
def test_timesteps_that_share_a_scale_count_by_their_own_importance(timesteps):
    """The last of them too, however many come before it."""
    weight, groups = random_weight((8, 12)), [0] * timesteps
    last = activations(seed=1)[0]
    x = [*(activations(seed=20 + i)[0].flip(1) for i in range(timesteps - 1)), last]

    def error_of_the_last(importance):
        dilation = joint_dilation([weight], x, 8, 8.0, importance, groups)
        tables = temporal_quantizer(by_group(x, groups), dilation, 8)
        values, weight_scale = quantize_weight(weight * dilation)
        y = rounded(last / dilation, *tables, 8) @ (values * weight_scale[:, None]).T
        return (y - last @ weight.T).square().sum()

    assert error_of_the_last([1e-9] * (timesteps - 1) + [1.0]) < error_of_the_last([1.0] * (timesteps - 1) + [1e-9])


def test_scaling_all_weights_or_all_inputs_changes_no_factor():
    weights, x = [random_weight((8, 12))], activations()
    expected = joint_dilation(weights, x, 8, 8.0)

    for scale in (2.0**-12, 2.0**12):
        torch.testing.assert_close(joint_dilation([scale * weights[0]], x, 8, 8.0), expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(joint_dilation(weights, [scale * r for r in x], 8, 8.0), expected, rtol=1e-5, atol=0)


def test_channels_that_are_off_get_finite_factors():
    weight, x = random_weight((8, 12)), activations()
    for rows in x:
        rows[:, [3, 7]] = 0
    weight[:, [1, 5, 7]] = 0

    for weights, inputs in (
        ([weight], x),
        ([torch.zeros(8, 12)], x),
        ([weight], [torch.zeros(5, 12)] * 2),
        ([torch.zeros(8, 12), weight], x),
        ([torch.zeros(8, 12)], [torch.zeros(5, 12)]),
    ):
        dilation = joint_dilation(weights, inputs, 8, 8.0)
        assert bool(dilation.isfinite().all())
        assert dilation.min() >= 1 / 8
        assert dilation.max() <= 8


def test_the_shared_rule_is_the_smallest_of_the_layers():
    weights = [random_weight((6, 10), seed=1), random_weight((9, 10), seed=2), random_weight((4, 10, 3, 3), seed=3)]

    expected = torch.stack([rule_by_hand(weight, 8.0) for weight in weights]).amin(0)
    torch.testing.assert_close(shared_weight_dilation(weights, 8.0), expected, rtol=2**-23, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_find_their_joint_dilation_in_fp32(dtype):
    weight, x = random_weight((6, 12)).to(dtype).requires_grad_(), activations()

    with torch.no_grad():
        dilation = joint_dilation([weight], x, 8, 8.0)

    assert dilation.dtype == torch.float32
    assert torch.equal(dilation, joint_dilation([weight.detach().float()], x, 8, 8.0))
