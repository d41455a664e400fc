"""Weight quantization: against rounding to nearest, channel by channel, and at the edges of fp32."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dq_kernels import reference
from dq_kernels.packing import pack_int4
from dq_runtime import QuantConv2d, QuantLinear, weights
from dq_runtime.timesteps import TimestepGrid
from dq_runtime.weights import in_parts, layer_tensors, quantize_dilated, quantize_weight, weight_dilation


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


@pytest.mark.parametrize("shape", [(7, 6), (7, 5, 3, 3), (1, 9)], ids=str)
def test_a_weight_in_parts_has_the_values_of_the_whole(shape, monkeypatch):
    weight = random_weight(*shape)
    dilation = weight_dilation(weight, 8.0)
    values, scale = quantize_dilated(weight, dilation)
    expected_values, expected_scale = quantize_weight(weight.movedim(1, -1) * dilation)

    monkeypatch.setattr(weights, "VALUES_AT_ONCE", 2 * weight[0].numel())
    assert len(list(in_parts(weight))) == -(-len(weight) // 2)

    assert torch.equal(weight_dilation(weight, 8.0), dilation)
    for found in ((values, scale), quantize_dilated(weight, dilation)):
        assert torch.equal(found[0], expected_values)
        assert torch.equal(found[1], expected_scale)


class LargestInFp32(TorchDispatchMode):
    """The largest number of elements of any fp32 tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        in_fp32 = [leaf for leaf in tree_leaves(result) if getattr(leaf, "dtype", None) == torch.float32]
        self.elements = max([self.elements, *(leaf.numel() for leaf in in_fp32)])
        return result


def test_a_large_weight_has_no_copies_in_fp32(monkeypatch):
    weight = random_weight(40, 10, 3, 3).half()
    monkeypatch.setattr(weights, "VALUES_AT_ONCE", 500)

    with LargestInFp32() as largest:
        quantize_dilated(weight, weight_dilation(weight, 8.0))

    assert 90 <= largest.elements <= 500


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
