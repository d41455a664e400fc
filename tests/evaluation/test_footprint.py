"""The footprint of UNets, compared with sums calculated by hand."""

import copy
import math

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

from dq_runtime import DilateQuantConfig, calibrate, record
from dq_runtime.evaluation.footprint import footprint
from dq_runtime.layers import quantized_layers

NUM_TIMESTEPS = 3


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def new_unet():
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(32, 64),
        norm_num_groups=8,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()


def calibrated(**config):
    unet = new_unet()
    with torch.no_grad(), record(unet) as calibration_set:
        for timestep in range(NUM_TIMESTEPS):
            unet(torch.randn(1, 3, 8, 8), timestep * 100)
    return calibrate(unet, calibration_set, DilateQuantConfig(**{"dilation": "weight"} | config), distillation=None)


@pytest.fixture(scope="module")
def shared_unet():
    return calibrated()


@pytest.fixture
def quantized_unet(shared_unet):
    """A copy of the shared UNet that has not run yet."""
    return copy.deepcopy(shared_unet)


def layer_shapes(kept):
    """(N, taps, K) of every quantized layer."""
    for name, module in new_unet().named_modules():
        if name not in kept and isinstance(module, (nn.Linear, nn.Conv2d)):
            yield module.weight.shape[0], math.prod(module.weight.shape[2:]), module.weight.shape[1]


def test_the_footprint_of_a_stock_unet_is_the_sum_of_its_parameters():
    unet = new_unet()
    parameters = sum(math.prod(parameter.shape) for parameter in unet.parameters())

    sizes = footprint(unet)

    assert sizes.unet == 4 * parameters
    assert sizes.unet_fp16 == 2 * parameters
    assert (sizes.weights, sizes.weights_fp16, sizes.tables, sizes.cpu_prepacked) == (0, 0, 0, 0)
    assert footprint(unet.half()).unet == sizes.unet_fp16


@pytest.mark.parametrize("kept", [["conv_in", "conv_out"], ["conv_out"]], ids=["default", "odd channels"])
def test_a_quantized_unet_is_counted_tensor_by_tensor(kept):
    unet = calibrated(modules_to_not_convert=kept)
    parameters = sum(parameter.numel() for parameter in new_unet().parameters())
    shapes = list(layer_shapes(kept))
    elements = sum(n * taps * k for n, taps, k in shapes)
    weights = sum(n * taps * ((k + 1) // 2) + 4 * n for n, taps, k in shapes)  # packed values, a scale per channel
    tables = sum(4 * k + 4 * n + (4 + 4) * NUM_TIMESTEPS for n, _, k in shapes)  # dilation, sum, scale and zero point

    sizes = footprint(unet)

    assert any(k % 2 for _, _, k in shapes) == ("conv_in" not in kept)
    assert sizes.weights == weights
    assert sizes.weights_fp16 == 2 * elements
    assert sizes.tables == tables
    assert sizes.unet_fp16 == 2 * parameters
    assert sizes.unet == 4 * (parameters - elements) + weights + tables
    assert sizes.weight_ratio == weights / (2 * elements)
    assert sizes.total_ratio == (weights + tables) / (2 * elements)
    assert 0.25 < sizes.weight_ratio < sizes.total_ratio < 0.3


def test_a_cast_changes_only_the_size_of_floating_point_parameters(quantized_unet):
    before = footprint(quantized_unet)
    floating_point = (before.unet_fp16 - before.weights_fp16) // 2

    after = footprint(quantized_unet.to(torch.bfloat16))

    assert after.unet == before.unet - 2 * floating_point
    assert (after.unet_fp16, after.weights, after.tables) == (before.unet_fp16, before.weights, before.tables)


def test_a_forward_on_a_cpu_adds_an_int8_copy_that_is_counted_separately(quantized_unet):
    before = footprint(quantized_unet)
    quantized_unet(torch.randn(1, 3, 8, 8), 100)

    after = footprint(quantized_unet)

    assert before.cpu_prepacked == 0
    assert after.unet == before.unet
    assert after.weights == before.weights
    assert after.cpu_prepacked >= before.weights_fp16 // 2
    assert after.cpu_prepacked <= sum(padded_bytes(layer) for layer in quantized_layers(quantized_unet).values())


def padded_bytes(layer):
    """Output channels in blocks of 64, which have their sums in int32, and input channels in blocks of 4."""
    out_channels, in_channels, *taps = layer.stock_shape
    return 64 * -(-out_channels // 64) * (4 + 4 * -(-in_channels // 4) * math.prod(taps))


def test_copies_of_another_unet_are_not_counted(quantized_unet, shared_unet):
    quantized_unet(torch.randn(1, 3, 8, 8), 100)

    assert footprint(quantized_unet).cpu_prepacked > 0
    assert footprint(shared_unet).cpu_prepacked == 0
