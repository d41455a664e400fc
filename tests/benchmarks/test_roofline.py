"""The roofline's counts against published figures, PyTorch's counter and sums by hand."""

from __future__ import annotations

import itertools
import json
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import unets
from benchmarks.static_analysis import devices, kernel_bounds, roofline

CONV = unets.LayerShape("conv2d", 2, 320, 320, 64, 64, (3, 3), (1, 1), (1, 1))


@pytest.fixture(scope="module")
def steps():
    return {name: kernel_bounds.trace(name, 2) for name in unets.CONFIGS}


def milliseconds(steps, device, variant):
    kernels = kernel_bounds.forward_kernels(steps, *kernel_bounds.VARIANTS[variant])
    return 1e3 * sum(kernel.seconds(devices.DEVICES[device]) for kernel in kernels)


# At 512x512 and 1024x1024, a multiply-accumulate being two operations.
@pytest.mark.parametrize(
    ("name", "gigaoperations", "shares"),
    [("sd15", 803, (49.8, 29.0, 5.4, 15.7)), ("sdxl", 6761, (23.0, 64.4, 1.0, 11.6))],
)
def test_operations_of_one_sample_are_the_known_figures(steps, name, gigaoperations, shares):
    counts = roofline.operations(steps[name])
    total = sum(counts.values())
    kinds = ("conv2d 3x3", "linear", "conv2d 1x1", "attention")
    assert total / 2e9 == pytest.approx(gigaoperations, abs=0.6)
    assert [100 * counts[kind] / total for kind in kinds] == pytest.approx(shares, abs=0.06)


@pytest.mark.parametrize("name", unets.CONFIGS)
def test_operations_agree_with_pytorchs_counter(steps, name):
    unet, arguments = unets.build(name, "meta"), unets.inputs(name, 2, "meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet(**arguments)
    assert sum(roofline.operations(steps[name]).values()) == counter.get_total_flops()


def test_bytes_of_a_convolution_by_hand():
    (layer,) = kernel_bounds.layer_kernels(CONV, "fp16", fused=False)
    assert layer.weight_bytes == 2 * 320 * 320 * 9
    assert layer.activation_bytes == 2 * (2 * 64 * 64 * 320) * 2
    quantize, layer = kernel_bounds.layer_kernels(CONV, "w4a8", fused=False)
    assert quantize.activation_bytes == (2 * 64 * 64 * 320) * (2 + 1)
    assert layer.weight_bytes == 320 * 320 * 9 / 2 + 320 * (4 + 4)
    assert layer.activation_bytes == (2 * 64 * 64 * 320) * (1 + 2)
    (layer,) = kernel_bounds.layer_kernels(CONV, "w4a4", fused=True)
    assert layer.activation_bytes == (2 * 64 * 64 * 320) * (0.5 + 2)


def test_an_odd_channel_is_packed_with_a_partner():
    shape = unets.LayerShape("conv2d", 1, 3, 8, 4, 4, (3, 3), (1, 1), (1, 1))
    assert kernel_bounds.weight_bytes(shape, kernel_bounds.PRECISIONS["w4a8"]) == 8 * (2 * 9 + 8)


def test_bound_is_the_slower_of_arithmetic_and_memory():
    device = devices.DEVICES["A100"]
    assert kernel_bounds.layer_bound(CONV, device, "fp16") == pytest.approx(2 * (2 * 4096) * 320 * 2880 / 312e12)
    one_token = unets.LayerShape("linear", 2, 1280, 320, 1, 1)
    traffic = 2 * (1280 * 320 + 2 * 1280 + 2 * 320)
    assert kernel_bounds.layer_bound(one_token, device, "fp16") == pytest.approx(traffic / 2.039e12)


def traced(forward, layers, *tensors):
    """The steps of a function of meta tensors, whose layers are named by their weight."""
    shapes = {layer.weight: unets.layer_shape(layer, example) for layer, example in layers.items()}
    tracer = kernel_bounds.Tracer(shapes)
    with torch.no_grad(), tracer:
        forward(*tensors)
    return tracer.steps


def traffic(steps, precision):
    """Bytes of the activations, by fused kernel."""
    return [kernel.activation_bytes for kernel in kernel_bounds.fused_kernels(steps, precision)]


@pytest.fixture(autouse=True)
def on_meta():
    with torch.device("meta"):
        yield


def test_norm_and_activation_write_what_the_convolution_reads_and_the_residual_is_added_there():
    x, norm, conv = torch.empty(2, 32, 8, 8), nn.GroupNorm(4, 32), nn.Conv2d(32, 32, 3, padding=1)
    steps = traced(lambda x: conv(F.silu(norm(x))) + x, {conv: x}, x)
    assert [step.kind for step in steps] == ["norm", "elementwise", "layer", "elementwise"]
    size = x.numel()
    assert traffic(steps, "w4a8") == [2 * size + size, size + 2 * size + 2 * size]
    assert traffic(steps, "fp16") == [2 * size + 2 * size, 2 * size + 2 * size + 2 * size]
    unfused = [kernel.activation_bytes for kernel in kernel_bounds.unfused_kernels(steps, "w4a8")]
    assert unfused == [4 * size, 4 * size, 3 * size, 3 * size, 6 * size]


def test_time_embedding_is_added_by_the_convolution_though_its_own_layer_comes_later():
    x, embedding = torch.empty(2, 32, 8, 8), torch.empty(2, 64)
    conv, project = nn.Conv2d(32, 32, 1), nn.Linear(64, 32)

    def forward(x, embedding):
        y = conv(x)
        return y + project(embedding)[:, :, None, None]

    steps = traced(forward, {conv: x, project: embedding}, x, embedding)
    assert traffic(steps, "w4a8") == [x.numel() + 2 * 2 * 32 + 2 * x.numel(), 2 * 64 + 2 * 2 * 32]


def test_layers_on_one_tensor_are_one_kernel_that_reads_it_once():
    x, layers = torch.empty(2, 16, 64), [nn.Linear(64, 64) for _ in "qkv"]
    steps = traced(lambda x: [layer(x) for layer in layers], dict.fromkeys(layers, x), x)
    assert traffic(steps, "w4a8") == [x.numel() + 3 * 2 * x.numel()]


def test_geglu_leaves_half_of_its_layers_output_in_the_next_layers_width():
    x, wide, narrow = torch.empty(2, 16, 64), nn.Linear(64, 512), nn.Linear(256, 64)

    def feed_forward(x):
        hidden, gate = wide(x).chunk(2, dim=-1)
        return narrow(hidden * F.gelu(gate))

    steps = traced(feed_forward, {wide: x, narrow: torch.empty(2, 16, 256)}, x)
    assert traffic(steps, "w4a4") == [(32 * 64 + 32 * 256) / 2, 32 * 256 / 2 + 2 * 32 * 64]


def test_upsampling_and_concatenation_are_read_where_they_come_from():
    x, skip, conv = torch.empty(1, 16, 4, 4), torch.empty(1, 16, 8, 8), nn.Conv2d(32, 32, 1)
    joined = torch.empty(1, 32, 8, 8)
    steps = traced(lambda x, s: conv(torch.cat([F.interpolate(x, scale_factor=2.0), s], 1)), {conv: joined}, x, skip)
    assert traffic(steps, "w4a8") == [x.numel() + skip.numel() + 2 * joined.numel()]


def test_what_a_norm_and_a_layer_read_is_written_in_both_widths():
    x, norm = torch.empty(2, 16, 64), nn.LayerNorm(64)
    first, second = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(x):
        y = first(x)
        return norm(y), second(y)

    steps = traced(forward, {first: x, second: x}, x)
    size = x.numel()
    assert traffic(steps, "w4a8") == [size + 2 * size + size, 4 * size, size + 2 * size]
    assert traffic(steps, "fp16") == [2 * size + 2 * size, 4 * size, 4 * size]


@pytest.mark.parametrize("name", unets.CONFIGS)
def test_every_weight_is_read_once(steps, name):
    weights = sum(len(s.names) * s.out_channels * s.reduction for s in unets.layers(name, 2))
    for fused in (False, True):
        assert sum(k.weight_bytes for k in kernel_bounds.forward_kernels(steps[name], "fp16", fused)) == 2 * weights
        packed = sum(k.weight_bytes for k in kernel_bounds.forward_kernels(steps[name], "w4a8", fused))
        assert packed / weights == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("name", unets.CONFIGS)
def test_kernels_lose_no_operation(steps, name):
    expected = sum(roofline.operations(steps[name]).values())
    for choice in kernel_bounds.VARIANTS.values():
        assert sum(k.operations for k in kernel_bounds.forward_kernels(steps[name], *choice)) == expected


@pytest.mark.parametrize("device", devices.DEVICES)
@pytest.mark.parametrize("name", unets.CONFIGS)
def test_fusion_and_fewer_bits_never_make_the_bound_slower(steps, name, device):
    times = {variant: milliseconds(steps[name], device, variant) for variant in kernel_bounds.VARIANTS}
    for slower, faster in itertools.pairwise(["fp16 unfused", "fp16 fused", "w4a8 fused", "w4a4 fused"]):
        assert times[slower] > times[faster]
    assert times["w4a8 unfused"] > times["w4a8 fused"]


def test_attention_in_int8_changes_the_time_of_attention_alone(steps):
    times = [
        roofline.by_kind((kernel.kind, kernel.seconds(devices.DEVICES["A100"])) for kernel in kernels)
        for kernels in (
            kernel_bounds.forward_kernels(steps["sdxl"], *kernel_bounds.VARIANTS[variant])
            for variant in ("w4a8 fused", "w4a8 fused, int8 attention")
        )
    ]
    in_float, in_int8 = (time.pop("attention") for time in times)

    assert times[0] == times[1]
    assert 0.4 * in_float < in_int8 < 0.6 * in_float


@pytest.mark.parametrize("variant", kernel_bounds.VARIANTS)
def test_a_device_with_higher_ceilings_is_faster(steps, variant):
    times = [milliseconds(steps["sd15"], device, variant) for device in ("A100", "H100 (measured)", "H100", "H200")]
    assert times == sorted(times, reverse=True)


def test_twice_the_batch_costs_more_but_not_more_than_twice():
    traces = [kernel_bounds.trace("ddpm_cifar", batch) for batch in (1, 2)]
    for variant in kernel_bounds.VARIANTS:
        one, two = (milliseconds(trace, "H100", variant) for trace in traces)
        assert one < two < 2 * one


def test_command_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    output = tmp_path / "new" / "roofline.json"
    monkeypatch.setattr(sys, "argv", ["roofline.py", "--unet", "ddpm_cifar", "--batch", "4", "--output", str(output)])
    roofline.main()
    document = json.loads(output.read_text(encoding="utf-8"))
    assert document["batch"] == 4
    assert list(document["unets"]) == ["ddpm_cifar"]
    assert roofline.table(document["unets"]) == capsys.readouterr().out.rstrip("\n")
    for name, ceilings in document["devices"].items():
        assert {key: tuple(ceiling.values()) for key, ceiling in ceilings.items()} == vars(devices.DEVICES[name])
        assert all(ceiling["source"] for ceiling in ceilings.values())
    report = document["unets"]["ddpm_cifar"]
    layers = sum(row["count"] * row["operations"] for row in report["layers"])
    assert layers + report["operations"]["attention"] == sum(report["operations"].values())
    for row, shape in zip(report["layers"], unets.layers("ddpm_cifar", 4), strict=True):
        bound = kernel_bounds.layer_bound(shape, devices.DEVICES["H100"], "w4a8", fused=False)
        assert row["microseconds"]["H100"]["w4a8 unfused"] == pytest.approx(1e6 * bound, rel=1e-5)
