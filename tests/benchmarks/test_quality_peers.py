"""Quantized by another library, a UNet keeps its output and takes the bytes that the scheme says.

Tests of a library that is not installed are skipped.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils import cpp_extension

import dq_runtime
from benchmarks.peers import unets

PEERS = unets.PEERS

LINEAR = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"  # 64 -> 64, no bias
CONVOLUTION = "mid_block.resnets.0.conv1"  # 64 -> 64, 3x3, a bias
BIAS = 64 * 4
QUANTO = 2 * 4  # input and output scale of each layer, used or not

# Bytes of LINEAR and CONVOLUTION: values, then scales (fp32) and zero points.
BYTES = {
    "torchao int8 dynamic": (64 * 64 + 64 * (4 + 1), 4 * 64 * 576 + BIAS),
    "torchao int4, int8 dynamic": (64 * 64 + 64 * 2 * (4 + 1), 4 * 64 * 576 + BIAS),
    "torchao int4 weight-only": (64 * 64 + 64 * 2 * (4 + 1), 64 * 576 + 64 * 2 * 9 * (4 + 1) + BIAS),
    "quanto qint8 weight-only": (64 * 64 + 64 * 4 + QUANTO, 64 * 576 + 64 * 4 + QUANTO + BIAS),
    "quanto qint4 weight-only": (64 * 64 // 2 + 64 * 8 + QUANTO, 64 * 576 // 2 + 64 * 6 * 8 + QUANTO + BIAS),
    "quanto qint8, qint8 static": (64 * 64 + 64 * 4 + QUANTO, 64 * 576 + 64 * 4 + QUANTO + BIAS),
    "quanto qint4, qint8 static": (64 * 64 // 2 + 64 * 8 + QUANTO, 64 * 576 // 2 + 64 * 6 * 8 + QUANTO + BIAS),
    "sdnq int8 weight-only": (64 * 64 + 64 * 4, 64 * 576 + 64 * 9 * 4 + BIAS),
    "sdnq int8 dynamic": (64 * 64 + 64 * 4, 64 * 576 + 64 * 4 + BIAS),
    "sdnq uint4 weight-only": (64 * 64 // 2 + 64 * 8, 64 * 576 // 2 + 64 * 2 * 9 * 8 + BIAS),
    "sdnq int4, int8 dynamic": (64 * 64 // 2 + 64 * 4, 64 * 576 // 2 + 64 * 2 * 9 * 4 + BIAS),
}
TOLERANCE = {8: 0.06, 4: 0.4}  # relative RMS, by weight bits: twice what the worst peer shows on random weights


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=32,
    ).eval()


@pytest.fixture(scope="module")
def calibration_set(unet):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad(), dq_runtime.record(unet) as calibration_set:
        for timestep in (900, 500, 100):
            sample = torch.randn(4, 2, 8, 8, generator=generator)
            unet(sample, timestep, encoder_hidden_states=torch.randn(4, 8, 32, generator=generator))
    return calibration_set


@pytest.fixture(scope="module", params=PEERS)
def peer(request):
    reason = unets.missing(PEERS[request.param])
    if reason is not None:
        pytest.skip(reason)
    return PEERS[request.param]


@pytest.fixture(scope="module")
def quantized(peer, unet, calibration_set):
    return peer.quantize(unet, calibration_set)


def test_output_is_close_to_floating_point_but_not_equal(peer, quantized, unet, calibration_set):
    call = calibration_set.calls[1]
    expected, output = call.run(unet).sample, call.run(quantized).sample
    assert type(output) is torch.Tensor
    error = (output - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert 1e-5 < error < TOLERANCE[peer.weight_bits]


def test_all_but_the_first_and_last_convolution_is_quantized(peer, quantized, unet):
    coverage = unets.coverage(quantized, unet)
    if unets.CONVOLUTIONS in peer.limits:
        kept = [name for name, module in unet.named_modules() if isinstance(module, nn.Conv2d)]
    else:
        kept = ["conv_in", "conv_out"]
        if unets.LATE_LAYERS in peer.limits:
            late = tuple(f"{name}." for name in unets.late_layers(unet))
            layers = [name for name, module in unet.named_modules() if isinstance(module, unets.LAYERS)]
            kept += [name for name in layers if f"{name}.".startswith(late)]
        assert coverage.weight_share > (0.99 if len(kept) == 2 else 0.5)
    assert sorted(coverage.kept) == sorted(kept)
    assert coverage.quantized + len(kept) == sum(isinstance(module, unets.LAYERS) for module in unet.modules())


def test_layers_take_the_bytes_of_their_scheme(peer, quantized):
    sizes = [1e6 * unets.size_mb(quantized.get_submodule(name)) for name in (LINEAR, CONVOLUTION)]
    assert sizes == pytest.approx(BYTES[peer.name.removesuffix(", late layers kept")])


def test_unet_is_smaller_by_what_was_quantized(peer, quantized, unet):
    share = unets.coverage(quantized, unet).weight_share
    bits = 8 if unets.UNPACKED in peer.limits else peer.weight_bits
    saved = 1 - unets.size_mb(quantized) / unets.size_mb(unet)
    # a little less than all that the bits save: scales, and parameters that are no weights
    assert 0.85 < saved / (share * (1 - bits / 32)) < 1


def test_the_stock_unet_stays_as_it_is(quantized, unet, calibration_set):
    assert quantized is not unet
    assert all(type(parameter) is nn.Parameter and parameter.dtype == torch.float32 for parameter in unet.parameters())
    assert "quantization_config" not in unet.config


def test_missing_names_the_package():
    peer = unets.Peer("nobody's", "no-such-library", 4, 8, lambda unet, calibration_set: unet)
    assert unets.missing(peer) == "no-such-library is not installed"


def test_missing_asks_for_ninja_where_a_library_compiles(monkeypatch):
    monkeypatch.setattr(unets, "version", lambda package: "1.0")
    monkeypatch.setattr(cpp_extension, "is_ninja_available", lambda: False)
    reasons = {name: unets.missing(peer) for name, peer in PEERS.items()}
    assert [name for name, reason in reasons.items() if reason is not None and "ninja" in reason] == [
        "quanto qint4 weight-only",
        "quanto qint4, qint8 static",
    ]


@pytest.mark.parametrize("package", ["torchao", "optimum-quanto", "sdnq"])
def test_every_peer_of_a_missing_package_says_so(monkeypatch, package):
    def version(name):
        if name == package:
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(unets, "version", version)
    reasons = [unets.missing(peer) for peer in PEERS.values() if peer.package == package]
    assert reasons
    assert set(reasons) == {f"{package} is not installed"}


def test_size_counts_buffers_and_what_lies_inside_tensor_subclasses():
    module = nn.Linear(8, 4, bias=False)
    module.register_buffer("table", torch.zeros(5, dtype=torch.int16))
    assert unets.size_mb(module) == pytest.approx((8 * 4 * 4 + 5 * 2) / 1e6)
    halves = TwoTensor(torch.zeros(4, 8), torch.zeros(4, 8))
    module.weight = nn.Parameter(TwoTensor(halves, halves.clone()))
    assert unets.size_mb(module) == pytest.approx((4 * 8 * 4 * 4 + 5 * 2) / 1e6)


def test_an_unquantized_unet_is_not_covered(unet):
    coverage = unets.coverage(unet, unet)
    assert coverage.quantized == 0
    assert coverage.weight_share == 0
