"""Activation quantizers: the range search, and which samples each timestep's row of a table comes from."""

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn

from dq_runtime.calibration import temporal
from dq_runtime.calibration.collect import CalibrationSet, RecordedCall, record
from dq_runtime.calibration.temporal import by_group, layers_by_input, sample_inputs, search_range, temporal_quantizer

BITS = (8, 6, 4)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def search(values, bits):
    """The range search on one row."""
    scale, zero_point = search_range(values[None], bits)
    return scale[0], zero_point[0]


def quantized(values, scale, zero_point, bits):
    """The formula of the kernels, in float64."""
    limit, zero_point = 2 ** (bits - 1), int(zero_point)
    q = torch.floor(values.double() / float(scale) + 0.5) + zero_point
    return (q.clamp(-limit, limit - 1) - zero_point) * float(scale)


def squared_error(values, scale, zero_point, bits):
    return (quantized(values, scale, zero_point, bits) - values.double()).square().sum().item()


def min_max(values, bits):
    """The plain asymmetric quantizer of the range, widened to hold zero."""
    low, high = min(values.min().item(), 0.0), max(values.max().item(), 0.0)
    scale = (high - low) / (2**bits - 1) or 1.0
    return scale, round(-(2 ** (bits - 1)) - low / scale)


DISTRIBUTIONS = {
    "normal": normal(4096),
    "heavy tails": normal(4096) ** 3,
    "one outlier": torch.cat([normal(4095), torch.tensor([200.0])]),
    "one outlier below": torch.cat([normal(4095), torch.tensor([-200.0])]),
    "silu": torch.nn.functional.silu(normal(4096) * 3),
    "all positive": normal(4096).abs() + 5,
    "all negative": -normal(4096).abs() - 5,
    "barely positive": normal(4096).abs() * 1e-3 + 100,
    "constant": torch.full((64,), 0.3),
    "negative constant": torch.full((64,), -7.7),
    "two values": torch.tensor([-1.0, 3.0] * 32),
    "single": torch.tensor([2.5]),
    "all zero": torch.zeros(64),
    "mostly zero": torch.cat([torch.zeros(4000), normal(96)]),
    "small": normal(4096) * 1e-18,
    "large": normal(4096) * 1e18,
}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_search_is_never_worse_than_the_full_range(name, bits):
    values = DISTRIBUTIONS[name]

    error = squared_error(values, *search(values, bits), bits)

    # fp32 against float64: a value on a tie may round the other way, and a constant is off by its last bit.
    assert error <= squared_error(values, *min_max(values, bits), bits) * (1 + 1e-3) + 1e-13 * values.square().sum()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_zero_is_exact_and_the_zero_point_is_one_of_the_integers(name, bits):
    scale, zero_point = search(DISTRIBUTIONS[name], bits)

    assert scale.dtype == torch.float32
    assert zero_point.dtype == torch.int32
    assert scale.shape == zero_point.shape == ()
    assert bool(scale.isfinite())
    assert scale > 0
    assert -(2 ** (bits - 1)) <= zero_point <= 2 ** (bits - 1) - 1
    assert quantized(torch.zeros(1), scale, zero_point, bits).item() == 0


@pytest.mark.parametrize("bits", [6, 4])
@pytest.mark.parametrize("end", ["upper", "lower"])
def test_either_end_is_clipped_when_that_pays(end, bits):
    values = torch.cat([normal(8191), torch.tensor([30.0])]) * (1 if end == "upper" else -1)
    scale, zero_point = search(values, bits)

    limit = 2 ** (bits - 1)
    high, low = (limit - 1 - zero_point) * scale, (-limit - zero_point) * scale
    clipped, other = (high, -low) if end == "upper" else (-low, high)
    assert clipped < 29
    assert 1.5 < other < 5
    assert squared_error(values, scale, zero_point, bits) < 0.95 * squared_error(values, *min_max(values, bits), bits)


def test_one_sided_values_use_all_integers():
    for values, expected in ((DISTRIBUTIONS["all positive"], -128), (DISTRIBUTIONS["all negative"], 127)):
        _, zero_point = search(values, 8)
        assert zero_point == expected


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", ["constant", "negative constant", "single", "all zero"])
def test_constants_are_kept(name, bits):
    values = DISTRIBUTIONS[name]

    torch.testing.assert_close(quantized(values, *search(values, bits), bits), values.double(), rtol=1e-6, atol=0)


def test_more_bits_mean_less_error():
    values = DISTRIBUTIONS["silu"]
    errors = [squared_error(values, *search(values, bits), bits) for bits in BITS]

    assert errors[0] < errors[1] / 4
    assert errors[1] < errors[2] / 4


@pytest.mark.parametrize("magnitude", [2.0**-149, 1e-44, 1e-40, 1e-37, 1e37])
def test_the_scale_and_its_inverse_are_finite_down_to_subnormal_inputs(magnitude):
    values = torch.tensor([magnitude, -magnitude, 0.0])
    scale, zero_point = search(values, 8)

    assert bool(scale.isfinite())
    assert scale > 0
    assert bool((1 / scale).isfinite())  # by which the kernels multiply
    torch.testing.assert_close(quantized(values, scale, zero_point, 8), values.double(), rtol=0.01, atol=1e-36)


def test_a_table_has_a_row_for_each_timestep_found_from_its_samples_alone():
    per_timestep = [normal(50, 16), normal(7, 16, seed=1) * 5 + 3, normal(90, 16, seed=2).abs() * 0.1]
    dilation = torch.ones(16)

    act_scale, act_zero_point = temporal_quantizer(per_timestep, dilation, 8)

    assert act_scale.shape == act_zero_point.shape == (3,)
    assert act_scale.dtype == torch.float32
    assert act_zero_point.dtype == torch.int32
    assert len(set(act_scale.tolist())) == 3
    assert len(set(act_zero_point.tolist())) == 3
    for t, rows in enumerate(per_timestep):
        others = [other if other is rows else -3 * other for other in per_timestep]
        scale_again, zero_point_again = temporal_quantizer(others, dilation, 8)
        assert scale_again[t] == act_scale[t]
        assert zero_point_again[t] == act_zero_point[t]


def test_the_quantizer_sees_the_dilated_inputs():
    rows = normal(200, 16)
    rows[:, 3] *= 64
    dilation = torch.ones(16)
    dilation[3] = 64

    act_scale, act_zero_point = temporal_quantizer([rows, rows * 4], dilation, 8)

    undilated = normal(200, 16)
    torch.testing.assert_close(act_scale[0], search(undilated.flatten(), 8)[0], rtol=0, atol=0)
    assert act_scale[1] == 4 * act_scale[0]
    assert act_zero_point[1] == act_zero_point[0]


class Net(UNet2DModel):
    """Stands in for a UNet: its layers see the sample as it is."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, channels=2):
        nn.Module.__init__(self)
        self.conv = nn.Conv2d(channels, 3, 3, padding=1)
        self.conv1x1 = nn.Conv2d(channels, 3, 1)
        self.to_q = nn.Linear(channels, 3)
        self.late = nn.Linear(channels, 3)
        self.occasional = nn.Linear(channels, 3)
        self.folded = nn.Linear(channels, 3)

    def forward(self, sample, timestep, occasional=False):
        tokens = sample.flatten(2).transpose(1, 2)
        self.conv(sample)
        self.conv1x1(sample)
        self.to_q(tokens)
        self.late(tokens * 2)
        self.folded(torch.cat([tokens, tokens]))
        if occasional:
            self.occasional(tokens)

    def hooks(self):
        return [hook for module in self.modules() for hook in module._forward_pre_hooks]


NET_LAYERS = ("conv", "conv1x1", "to_q", "late")


def net_samples(net, calls, layers=NET_LAYERS):
    """Samples of calls, each (sample, timesteps, arguments)."""
    calibration_set = CalibrationSet(
        [RecordedCall(sample, torch.tensor(timesteps), arguments) for sample, timesteps, arguments in calls]
    )
    return sample_inputs(net, {name: net.get_submodule(name) for name in layers}, calibration_set)


def constant_samples(values, size=4):
    """[B, 2, size, size]; channel 0 holds each sample's value, channel 1 its negative."""
    values = torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 1, size, size)
    return torch.cat([values, -values], dim=1)


def test_each_sample_of_a_mixed_batch_counts_for_its_own_timestep():
    mixed = [700.0, 3.0, 41.5, 3.0]
    samples = net_samples(
        Net(),
        [
            (constant_samples(mixed), mixed, {}),
            (constant_samples([41.5, 41.5]), [41.5], {}),  # one timestep for the whole batch
        ],
    )

    assert samples.keys() == set(NET_LAYERS)
    for name, factor in (("conv", 1), ("conv1x1", 1), ("to_q", 1), ("late", 2)):
        per_timestep = samples[name]
        assert [rows.shape[0] for rows in per_timestep] == [32, 48, 16], name  # so few that all are kept
        for rows, timestep in zip(per_timestep, (3.0, 41.5, 700.0), strict=True):
            assert rows.dtype == torch.float32
            assert torch.equal(rows, factor * torch.tensor([[timestep, -timestep]]).expand_as(rows)), name


def test_a_row_holds_the_channels_of_one_pixel():
    sample = normal(2, 6, 5, 4)
    samples = net_samples(Net(6), [(sample, [9.0], {})])

    pixels = sample.permute(0, 2, 3, 1).reshape(-1, 6)
    for name in ("conv", "conv1x1", "to_q"):
        (rows,) = samples[name]
        assert sorted(rows.tolist()) == sorted(pixels.tolist()), name


def test_of_large_inputs_a_part_from_everywhere_is_kept_the_same_for_layers_that_see_one_tensor():
    size, batch = 128, 3
    sample = torch.arange(batch * 2 * size * size, dtype=torch.float32).view(batch, 2, size, size)
    samples = net_samples(Net(), [(sample, [9.0], {}), (sample + 0.5, [9.0], {})])

    (rows,) = samples["to_q"]
    pixels = {tuple(pixel) for pixel in sample.permute(0, 2, 3, 1).reshape(-1, 2).tolist()}
    first_call = [row for row in rows.tolist() if row[0] % 1 == 0]
    assert 8192 / 2 <= rows.shape[0] <= 2 * 8192 / 2  # of 98 304
    assert len(first_call) == rows.shape[0] / 2
    assert all(tuple(row) in pixels for row in first_call)
    assert len({tuple(row) for row in first_call}) == len(first_call)
    quarter, end = torch.tensor(first_call)[:, 0].quantile(torch.tensor([0.25, 1.0])) / sample[-1, 0].max()
    assert 0.1 < quarter < 0.4
    assert end > 0.95
    for name in ("conv", "conv1x1"):
        assert torch.equal(samples[name][0], rows), name
    assert torch.equal(samples["late"][0], 2 * rows)


def test_sampling_is_deterministic_whatever_the_global_seed():
    calls = [(normal(2, 2, 80, 80), [9.0], {})]
    torch.manual_seed(1)
    first = net_samples(Net(), calls)
    torch.manual_seed(2)
    second = net_samples(Net(), calls)

    assert torch.equal(first["conv"][0], second["conv"][0])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["conv", "to_q", "late"])
def test_an_input_that_is_not_finite_names_its_layer(name, value):
    net, sample = Net(), normal(2, 2, 4, 4)
    sample[1, 0, 2, 3] = value

    with pytest.raises(ValueError, match=rf"^{name}: .*NaN or infinity"):
        net_samples(net, [(sample, [9.0], {})], layers=[name])
    assert not net.hooks()


def test_the_hooks_go_with_the_replay():
    net = Net()
    net_samples(net, [(normal(1, 2, 4, 4), [9.0], {})])

    assert not net.hooks()


def test_a_layer_that_no_call_reaches_has_no_samples():
    samples = net_samples(Net(), [(normal(1, 2, 4, 4), [9.0], {})], layers=[*NET_LAYERS, "occasional"])

    assert samples.keys() == set(NET_LAYERS)


def test_a_layer_that_some_timesteps_never_reach_is_named():
    calls = [(normal(1, 2, 4, 4), [9.0], {}), (normal(1, 2, 4, 4), [10.0], {"occasional": True})]

    with pytest.raises(ValueError, match="occasional"):
        net_samples(Net(), calls, layers=["conv", "occasional"])


def test_a_layer_whose_batch_is_not_the_samples_is_named():
    with pytest.raises(ValueError, match=r"^folded: .*\b2\b.*\b4\b"):  # expected, found
        net_samples(Net(), [(normal(2, 2, 4, 4), [9.0], {})], layers=["conv", "folded"])


def grouped(samples):
    return {frozenset(names) for names in layers_by_input(samples)}


def test_layers_are_grouped_by_equal_samples_and_nothing_less():
    first, second = normal(4, 6), normal(3, 6, seed=1)
    late = second.clone()
    late[-1, -1] += 1e-6
    joined = torch.cat([first, second])
    samples = {
        "to_q": [first, second],
        "to_k": [first.clone(), second.clone()],
        "other late": [first, late],
        "swapped": [second, first],
        "split elsewhere": [joined[:3], joined[3:]],
        "other shape": [first.view(8, 3), second.view(6, 3)],
        "to_v": [first, second],
    }

    singles = {"other late", "swapped", "split elsewhere", "other shape"}
    assert grouped(samples) == {frozenset({"to_q", "to_k", "to_v"})} | {frozenset({name}) for name in singles}


def replayed_inputs(unet, layers, calibration_set):
    """What every layer sees in full: [pixels or tokens, K], all calls one after the other."""
    seen = {name: [] for name in layers}

    def keep(name):
        def hook(layer, args):
            x = args[0].permute(0, 2, 3, 1) if isinstance(layer, nn.Conv2d) else args[0]
            seen[name].append(x.reshape(-1, x.shape[-1]).clone())

        return hook

    handles = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
    for call in calibration_set.calls:
        call.run(unet)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def unet2d():
    unet = UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(32, 64),
        norm_num_groups=8,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return unet.eval(), (normal(2, 3, 8, 8), torch.tensor([3.0, 500.0])), {}


def unet2d_condition():
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(32, 64),
        norm_num_groups=8,
        cross_attention_dim=32,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    return unet.eval(), (normal(2, 4, 8, 8), torch.tensor([3.0, 500.0])), {"encoder_hidden_states": normal(2, 5, 32)}


@pytest.mark.parametrize("make", [unet2d, unet2d_condition])
def test_layers_of_a_unet_are_grouped_exactly_where_they_see_one_tensor(make):
    torch.manual_seed(0)
    unet, args, kwargs = make()
    with record(unet) as calibration_set:
        unet(*args, **kwargs)
    layers = {name: module for name, module in unet.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}

    groups = grouped(sample_inputs(unet, layers, calibration_set))

    inputs = replayed_inputs(unet, layers, calibration_set)
    expected = {frozenset(other for other in layers if torch.equal(inputs[other], inputs[name])) for name in layers}
    assert groups == expected
    attention = "mid_block.attentions.0" + (".transformer_blocks.0.attn1" if kwargs else "")
    assert frozenset(f"{attention}.{name}" for name in ("to_q", "to_k", "to_v")) in groups
    if kwargs:  # every cross-attention of the UNet reads the same tokens
        cross_attentions = [name for name in layers if name.endswith(("attn2.to_k", "attn2.to_v"))]
        assert len(cross_attentions) >= 6
        assert frozenset(cross_attentions) in groups


def many_calls(count, timesteps, channels):
    return [(normal(1, channels, 4, 4, seed=i), [timesteps[i % len(timesteps)]], {}) for i in range(count)]


def test_many_runs_of_a_wide_layer_take_no_more_memory_than_few(monkeypatch):
    monkeypatch.setattr(temporal, "VALUES_PER_TIMESTEP", 64)
    monkeypatch.setattr(temporal, "LEAST_ROWS", 5)

    few, many = (net_samples(Net(32), many_calls(count, [3.0, 9.0], 32))["to_q"] for count in (2, 96))

    assert [len(rows) for rows in few] == [5, 5]
    assert all(4 <= len(rows) <= 5 for rows in many)  # of 48 calls each, every tenth
    assert len({tuple(row) for rows in many for row in rows.tolist()}) == sum(map(len, many))


def test_each_timestep_gets_as_many_samples_and_its_group_those_of_all(monkeypatch):
    monkeypatch.setattr(temporal, "VALUES_PER_TIMESTEP", 64)

    samples = net_samples(Net(8), many_calls(12, [1.0, 2.0, 3.0, 900.0], 8))["conv"]
    first, second = by_group(samples, [0, 0, 0, 1])

    assert [len(rows) for rows in samples] == [9] * 4  # 8 rows, 3 from each of 3 calls
    assert torch.equal(first, torch.cat(samples[:3]))
    assert torch.equal(second, samples[3])
