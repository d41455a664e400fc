"""Error feedback: against a slow version in float64, on correlated inputs and on hard ones."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dq_runtime.calibration import error_feedback
from dq_runtime.calibration.error_feedback import DAMPING, SecondMoments, round_with_feedback


def correlated_inputs(rows=2000, channels=48, seed=0):
    """Eight sources mixed into all channels, and a little noise: what norms and convolutions of images look like."""
    generator = torch.Generator().manual_seed(seed)
    sources = torch.randn(rows, 8, generator=generator, dtype=torch.float64)
    mixing = torch.randn(8, channels, generator=generator, dtype=torch.float64)
    noise = torch.randn(rows, channels, generator=generator, dtype=torch.float64)
    return sources @ mixing + 0.3 * noise


def random_steps(out_channels=24, channels=48, seed=0):
    """Weights in steps of their scale, some beyond the ends of 4 bits."""
    return 3.5 * torch.randn(out_channels, channels, generator=torch.Generator().manual_seed(seed))


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


def stand_in(weight, scale):
    """What error feedback needs of a simulated layer, without an input quantizer."""
    return SimpleNamespace(
        layer=nn.Linear(*reversed(weight.shape), bias=False),
        weight=weight,
        weight_scale=scale,
        dilated_weight=lambda: weight,
        quantized_input=lambda x: x,
    )


def test_the_new_scale_is_the_best_one_for_the_rounded_values():
    x, scale = correlated_inputs().float(), 0.02 * torch.rand(24, 1, generator=torch.Generator().manual_seed(1)) + 0.01
    weight = random_steps() * scale
    weight[3] = 0
    moments = SecondMoments(stand_in(weight, scale))
    for rows in x.split(700):
        moments.add(None, (rows,))

    moved, ratio = moments.rounded()
    values = nearest(moved / ratio)

    def errors(ratio):
        return (x.double() @ (values * scale * ratio - weight).double().T).square().sum(0)

    best = errors(ratio)
    assert ratio.shape == scale.shape
    assert ratio[3] == 1
    assert 0.8 < ratio.min() < 0.999
    for other in (0.998 * ratio, 1.002 * ratio):
        assert (errors(other) >= best).all()
    assert best.sum() < 0.999 * errors(torch.ones_like(ratio)).sum()


def test_wide_layers_are_rounded_in_parts(monkeypatch):
    x, scale = correlated_inputs().float(), torch.ones(24, 1)
    weight = random_steps()
    monkeypatch.setattr(error_feedback, "MAX_COLUMNS", 20)
    moments = SecondMoments(stand_in(weight, scale))
    moments.add(None, (x,))

    moved, ratio = moments.rounded()

    assert [len(total) for total in moments.sums] == [20, 20, 8]
    for part in (slice(0, 20), slice(20, 40), slice(40, 48)):
        expected = round_with_feedback(weight[:, part], x[:, part].T @ x[:, part])
        torch.testing.assert_close((moved / ratio)[:, part], expected)


def test_a_layer_that_no_sample_reaches_keeps_its_weights():
    weight, scale = random_steps(), torch.ones(24, 1)

    moved, ratio = SecondMoments(stand_in(weight, scale)).rounded()

    assert torch.equal(moved, weight)
    assert torch.equal(ratio, torch.ones(24, 1))
