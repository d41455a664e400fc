"""Weight quantization: against rounding to nearest, channel by channel, and at the edges of fp32; error feedback."""

import copy

import pytest
import torch
from torch import nn

from dq_kernels import reference
from dq_kernels.packing import pack_int4
from dq_runtime import QuantConv2d, QuantLinear
from dq_runtime.calibration.error_feedback import DAMPING, round_with_feedback
from dq_runtime.calibration.weights import layer_tensors, quantize_weight
from dq_runtime.timesteps import TimestepGrid


def random_weight(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def squared_error(values, scale, weight):
    """Per output channel, in float64."""
    rounded = values.flatten(1).double() * scale.double()[:, None]
    return (rounded - weight.flatten(1).double()).square().sum(1)


def round_to_nearest(weight):
    """The plain quantizer: the largest magnitude of a channel becomes 7."""
    scale = weight.flatten(1).abs().amax(1) / 7
    return torch.floor(weight.flatten(1) / scale[:, None] + 0.5).clamp(-8, 7), scale


DISTRIBUTIONS = {
    "normal": random_weight(32, 64),
    "heavy tails": random_weight(32, 64) ** 5,
    "uniform": torch.rand(32, 64, generator=torch.Generator().manual_seed(0)) - 0.5,
    "one outlier": torch.cat([random_weight(32, 63), torch.full((32, 1), -40.0)], dim=1),
    "all positive": random_weight(32, 64).abs() + 3,
    "one weight": random_weight(32, 1),
    "small": random_weight(32, 64) * 1e-12,
    "tiny": random_weight(32, 64) * 1e-24,  # whose squares are 0 in fp32
    "large": random_weight(32, 64) * 1e12,
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_search_is_never_worse_than_rounding_to_nearest(name):
    weight = DISTRIBUTIONS[name]

    error = squared_error(*quantize_weight(weight), weight)

    # Both errors sum the same fp32 roundings when the search keeps the plain scale.
    assert bool((error <= squared_error(*round_to_nearest(weight), weight) * (1 + 1e-5)).all())


@pytest.mark.parametrize(("name", "share"), [("normal", 0.9), ("uniform", 0.9), ("one outlier", 0.99)])
def test_the_search_gains_where_there_is_something_to_gain(name, share):
    weight = DISTRIBUTIONS[name]

    error = squared_error(*quantize_weight(weight), weight).sum()

    assert error < share * squared_error(*round_to_nearest(weight), weight).sum()


@pytest.mark.parametrize("shape", [(8, 16), (8, 5), (8, 3, 3, 6), (1, 1), (8, 1, 1, 4)], ids=str)
def test_values_are_four_bits_and_fit_the_packing(shape):
    weight = random_weight(*shape) ** 3
    values, scale = quantize_weight(weight)

    assert values.dtype == torch.int8
    assert values.shape == weight.shape
    assert scale.dtype == torch.float32
    assert scale.shape == shape[:1]
    assert values.min() >= -8
    assert values.max() <= 7
    unpacked = reference.dequantize_weight(pack_int4(values), scale)[..., : shape[-1]]
    assert torch.equal(unpacked, values * scale.view(-1, *[1] * (len(shape) - 1)))


def test_the_negative_end_of_four_bits_is_used():
    values, _ = quantize_weight(DISTRIBUTIONS["heavy tails"])

    assert values.min() == -8


def test_ties_round_up():
    weight = torch.tensor([[7.0] * 2000 + [-7.0] * 2000 + [0.5, -0.5, 1.5, -1.5]])  # the many sevens fix the scale at 1

    values, scale = quantize_weight(weight)

    assert scale.tolist() == [1.0]
    assert values[0, -4:].tolist() == [1, 0, 2, -1]


def test_each_output_channel_is_on_its_own():
    weight = random_weight(6, 3, 3, 8)
    weight *= torch.tensor([1e-6, 1e-3, 1.0, 10.0, 1e3, 1e6]).view(-1, 1, 1, 1)
    values, scale = quantize_weight(weight)

    for n in range(6):
        alone_values, alone_scale = quantize_weight(weight[n : n + 1])
        assert torch.equal(alone_values[0], values[n])
        assert torch.equal(alone_scale[0], scale[n])


def test_a_channel_times_a_power_of_two_has_the_same_values():
    weight = random_weight(4, 64)
    values, scale = quantize_weight(weight)

    larger_values, larger_scale = quantize_weight(weight * 2.0**20)

    assert torch.equal(larger_values, values)
    assert torch.equal(larger_scale, scale * 2.0**20)


def test_weights_on_the_grid_are_recovered_exactly():
    values = torch.randint(-7, 8, (16, 40), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    values[:, 0] = 7
    scale = torch.rand(16, generator=torch.Generator().manual_seed(1)) + 0.01
    weight = values * scale[:, None]

    found_values, found_scale = quantize_weight(weight)

    assert torch.equal(found_values, values)
    torch.testing.assert_close(found_scale, scale, rtol=2**-22, atol=0)  # 7 s / 7 rounds twice


def test_a_grid_that_reaches_down_to_minus_eight_gives_its_integers_back():
    values = torch.randint(-8, 8, (16, 40), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    values[:, 0] = -8
    weight = values * 0.37

    found_values, found_scale = quantize_weight(weight)

    assert torch.equal(found_values, values)
    torch.testing.assert_close(found_scale, torch.full((16,), 0.37), rtol=5e-3, atol=0)  # half a step of the search


def test_all_zero_channels_stay_zero_with_a_scale_that_can_be_stored():
    weight = random_weight(4, 10)
    weight[1] = 0

    values, scale = quantize_weight(weight)

    assert values[1].tolist() == [0] * 10
    assert bool((values[[0, 2, 3]] != 0).any(1).all())
    assert bool((scale.isfinite() & (scale > 0)).all())


@pytest.mark.parametrize("magnitude", [2.0**-149, 1e-44, 1e-40, 1e-37, 1e37])
def test_the_scale_is_positive_and_finite_down_to_subnormal_weights(magnitude):
    weight = torch.tensor([[magnitude, -magnitude, 0.0, magnitude]])

    values, scale = quantize_weight(weight)

    assert bool((scale.isfinite() & (scale > 0)).all())
    torch.testing.assert_close(values * scale[:, None], weight, rtol=0.1, atol=1e-36)  # below: as good as zero


def test_half_precision_weights_are_rounded_from_fp32():
    weight = random_weight(4, 64).bfloat16().requires_grad_()

    values, scale = quantize_weight(weight)

    expected_values, expected_scale = quantize_weight(weight.detach().float())
    assert torch.equal(values, expected_values)
    assert torch.equal(scale, expected_scale)
    assert not scale.requires_grad


def correlated_inputs(rows=2000, channels=48, seed=0):
    """Eight sources mixed into all channels, and a little noise: what norms and convolutions of images look like."""
    generator = torch.Generator().manual_seed(seed)
    sources = torch.randn(rows, 8, generator=generator, dtype=torch.float64)
    mixing = torch.randn(8, channels, generator=generator, dtype=torch.float64)
    noise = torch.randn(rows, channels, generator=generator, dtype=torch.float64)
    return sources @ mixing + 0.3 * noise


def random_steps(out_channels=24, channels=48, seed=0):
    """Weights in steps of their scale, some beyond the ends of 4 bits."""
    return 3.5 * random_weight(out_channels, channels, seed=seed)


def nearest(steps):
    return torch.floor(steps + 0.5).clamp(-8, 7)


def output_error(steps, exact, x):
    """Of the rounded weights, in float64."""
    return (x @ (nearest(steps).double() - exact.double()).T).square().sum().item()


def feedback_by_the_book(steps, second_moment):
    """Optimal Brain Quantization, its order fixed: the inverse is computed anew for the columns that are left.

    After column j is rounded, the others that are left move by -error / inverse[j, j] * inverse[j].
    """
    steps, moment = steps.double().clone(), second_moment.double()
    moment = moment + DAMPING[0] * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
    moved = torch.empty_like(steps)
    left = moment.diagonal().argsort(descending=True).tolist()
    while left:
        inverse = torch.linalg.inv(moment[left][:, left])
        column = left[0]
        moved[:, column] = steps[:, column]
        error = steps[:, column] - nearest(steps[:, column])
        steps[:, left] -= torch.outer(error / inverse[0, 0], inverse[0])
        left = left[1:]
    return moved


@pytest.mark.parametrize("channels", [1, 7, 48, 64, 65, 150])  # 64 columns are a block
def test_error_feedback_is_optimal_brain_quantization(channels):
    x = correlated_inputs(channels=channels)
    steps = random_steps(channels=channels)

    moved = round_with_feedback(steps, (x.T @ x).float())
    expected = feedback_by_the_book(steps, (x.T @ x).float())

    assert moved.dtype == torch.float32
    assert moved.shape == steps.shape
    # An fp32 sum at a rounding boundary goes the other way now and then, and takes its row's later columns along.
    rows_alike = ((moved - expected).abs() < 1e-3).all(1)
    assert rows_alike.sum() >= len(steps) - 1
    assert output_error(moved, steps, x) == pytest.approx(output_error(expected, steps, x), rel=0.1)


@pytest.mark.parametrize("seed", range(3))
def test_error_feedback_halves_the_output_error_on_correlated_inputs(seed):
    x, steps = correlated_inputs(seed=seed), random_steps(seed=seed)
    original = steps.clone()

    moved = round_with_feedback(steps, (x.T @ x).float())

    assert torch.equal(steps, original)
    # Eight directions hold nearly all of the inputs, and 48 weights share their errors in them.
    assert output_error(moved, steps, x) < 0.5 * output_error(steps, steps, x)


def test_inputs_that_are_not_correlated_move_no_weight():
    steps = random_steps()

    for diagonal in (torch.ones(48), 10.0 ** torch.linspace(-3, 3, 48), torch.full((48,), 1e-20)):
        assert torch.equal(round_with_feedback(steps, diagonal.diag()), steps)


def test_weights_move_at_full_precision_until_they_are_rounded():
    """Each result is where its weight stood; the first, with the largest inputs, has not moved at all."""
    x, steps = correlated_inputs(), random_steps()
    moment = (x.T @ x).float()
    largest = int(moment.diagonal().argmax())

    moved = round_with_feedback(steps, moment)

    assert torch.equal(moved[:, largest], steps[:, largest])
    others = [k for k in range(48) if k != largest]
    assert (moved[:, others] != steps[:, others]).double().mean() > 0.99
    assert (moved != moved.round()).double().mean() > 0.99


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_the_channels_does_not_matter(seed):
    x, steps = correlated_inputs(seed=seed), random_steps(seed=seed)
    moment = (x.T @ x).float()
    order = torch.randperm(48, generator=torch.Generator().manual_seed(seed))

    permuted = round_with_feedback(steps[:, order], moment[order][:, order])

    rows_alike = ((permuted - round_with_feedback(steps, moment)[:, order]).abs() < 1e-3).all(1)
    assert rows_alike.sum() >= len(steps) - 1  # a sum in another order may round one weight the other way


def test_output_channels_are_rounded_on_their_own():
    x, steps = correlated_inputs(), random_steps()
    moment = (x.T @ x).float()

    together = round_with_feedback(steps, moment)
    alone = torch.cat([round_with_feedback(row[None], moment) for row in steps])
    assert ((together - alone).abs() < 1e-3).all(1).sum() >= len(steps) - 1  # fp32, as above


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(4, 48, dtype=torch.float64),
        torch.ones(3, 48, dtype=torch.float64),  # rank 1
        correlated_inputs(rows=5),
        torch.cat([correlated_inputs(channels=40), torch.zeros(2000, 8, dtype=torch.float64)], 1),
        correlated_inputs() * 1e-18,
        correlated_inputs() * 1e12,
    ],
    ids=["zero", "rank 1", "rank 5", "channels that are off", "tiny", "huge"],
)
def test_error_feedback_needs_no_regular_second_moments(x):
    steps = random_steps()

    moved = round_with_feedback(steps, (x.T @ x).float())

    assert bool(moved.isfinite().all())
    assert output_error(moved, steps, x) <= output_error(steps, steps, x)
    off = (x == 0).all(0)
    assert torch.equal(moved[:, off], steps[:, off])


def test_weights_beyond_the_range_hand_on_what_is_cut_off():
    steps = torch.tensor([[9.0, 2.0]])
    moment = torch.tensor([[2.0, 1.0], [1.0, 1.0]]) * 1000

    moved = round_with_feedback(steps, moment)

    # 2 are cut off; the least squared error in the second weight is at 2 + 2 * 1 / (1 + damping of 1% of 1.5).
    torch.testing.assert_close(moved, torch.tensor([[9.0, 2 + 2 / 1.015]]))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_second_moments_that_are_not_finite_are_refused(value):
    moment = torch.eye(48)
    moment[3, 5] = value

    with pytest.raises(ValueError, match="NaN or infinity"):
        round_with_feedback(random_steps(), moment)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", [nn.Linear(5, 4), nn.Conv2d(5, 4, 3), nn.Linear(6, 2, bias=False)], ids=str)
def test_a_layers_tensors_fill_a_packed_layer(layer, dtype):
    layer = copy.deepcopy(layer).to(dtype)
    values, weight_scale = quantize_weight(layer.weight.movedim(1, -1))
    tables = 1 + torch.rand(layer.weight.shape[1]), torch.tensor([0.1, 0.2]), torch.tensor([-3, 4], dtype=torch.int32)

    tensors = layer_tensors(layer, values, weight_scale, *tables, None if layer.bias is None else layer.bias.float())

    kind = QuantConv2d if isinstance(layer, nn.Conv2d) else QuantLinear
    packed = kind.like(layer, "layer", 8, TimestepGrid([1.0, 2.0]))
    assert {name: t.shape for name, t in packed.state_dict().items()} == {name: t.shape for name, t in tensors.items()}
    packed.load_state_dict(tensors, assign=True)
    packed.check_tensors()
    expected = values * weight_scale.view(-1, *[1] * (values.ndim - 1)) / tables[0]
    assert torch.equal(packed.dequantized_weight(), expected)
    if layer.bias is not None:
        assert tensors["bias"].dtype == dtype
        assert torch.equal(tensors["bias"], layer.bias)
        assert not tensors["bias"].requires_grad
    for name, table in zip(("weight_dilation", "act_scale", "act_zero_point"), tables, strict=True):
        assert torch.equal(tensors[name], table)
        assert tensors[name].data_ptr() != table.data_ptr()  # layers share values, no memory
