"""Weight Dilation against the paper's rule written out as loops, and what it promises about every range."""

import math

import pytest
import torch

from dq_runtime.calibration.dilation import weight_dilation

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
