"""Two tiny random UNets, calibrated once per session. A test that changes one works on a copy."""

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import tiny_unets
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from diffusers.utils import logging as diffusers_logging
from torch import nn

import dq_runtime
from dq_kernels import reference
from dq_kernels.ops import Quantizer, pack_int4
from dq_runtime.layers import quantized_layers
from dq_runtime.timesteps import TimestepGrid

TABLES = ("weight_scale", "weight_sum", "weight_dilation", "act_scale", "act_zero_point")


@dataclass(frozen=True)
class Subject:
    """A UNet before and after quantization, and the arguments of its calls."""

    stock: nn.Module
    quantized: nn.Module
    calibration_set: Any
    sample: torch.Tensor
    arguments: dict[str, torch.Tensor]

    def copy(self):
        return copy.deepcopy(self.quantized)

    def call(self, unet, timestep=500, dtype=torch.float32):
        arguments = {name: value.to(dtype) for name, value in self.arguments.items()}
        return unet(self.sample.to(dtype), timestep, **arguments).sample


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="session", autouse=True)
def _silent_progress_bars():
    diffusers_logging.disable_progress_bar()


@pytest.fixture(scope="session")
def new_unet():
    """Makes a ``UNet2DModel`` with random weights; keyword arguments replace its defaults."""
    return tiny_unets.unet2d


@pytest.fixture(scope="session")
def calibration_call():
    """Records one call at timestep 500: the smallest calibration set there is."""

    def calibration_call(unet):
        with torch.no_grad(), dq_runtime.record(unet) as calibration_set:
            unet(torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(unet.dtype), 500)
        return calibration_set

    return calibration_call


@pytest.fixture(scope="session")
def unet2d(new_unet):
    return _quantize(new_unet(), channels=3, arguments={})


@pytest.fixture(scope="session")
def unet2d_condition():
    unet = tiny_unets.unet2d_condition()
    return _quantize(unet, channels=4, arguments={"encoder_hidden_states": torch.randn(2, 5, 32)})


def _quantize(unet, channels, arguments):
    stock = copy.deepcopy(unet)
    noise = torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(2))
    calibration_set = dq_runtime.collect_from_scheduler(unet, DDIMScheduler(), noise, 4, arguments)
    dq_runtime.calibrate(unet, calibration_set, dq_runtime.DilateQuantConfig(dilation="weight"), distillation=None)
    # Activations of an untrained UNet hardly depend on the timestep. Rows with ever more clipping reveal a wrong row.
    for layer in quantized_layers(unet).values():
        layer.act_scale *= torch.tensor([1.0, 0.4, 0.16, 0.064])
    return Subject(stock, unet, calibration_set, noise, arguments)


@pytest.fixture(params=["unet2d", "unet2d_condition"])
def subject(request):
    """Either UNet."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def tables():
    """A copy of every table of a UNet, by name."""

    def tables(unet):
        return {n: t.clone() for n, t in unet.state_dict().items() if n.rpartition(".")[2] in TABLES}

    return tables


@pytest.fixture(scope="session")
def assert_same_tensors():
    """Asserts that two state dicts hold the same names, dtypes and bits."""

    def assert_same_tensors(actual, expected):
        assert actual.keys() == expected.keys()
        for name, tensor in expected.items():
            assert actual[name].dtype == tensor.dtype, name
            assert torch.equal(actual[name], tensor), name

    return assert_same_tensors


@pytest.fixture(scope="session")
def new_layer():
    """Quantizes a stock layer's shape with random tensors: three timesteps (0, 10, 20), zero points far from zero."""

    def new_layer(stock, bits=8):
        generator = torch.Generator().manual_seed(3)
        layer_class = dq_runtime.QuantLinear if isinstance(stock, nn.Linear) else dq_runtime.QuantConv2d
        layer = layer_class.like(stock, "mid_block.layer", bits, TimestepGrid([0.0, 10.0, 20.0]))
        shape = stock.weight.movedim(1, -1).shape
        values = torch.randint(-8, 8, shape, dtype=torch.int8, generator=generator)
        state = {
            "packed_weight": pack_int4(values),
            "weight_scale": 0.01 + 0.02 * torch.rand(shape[0], generator=generator),
            "weight_sum": values.flatten(1).sum(1, dtype=torch.int32),
            "weight_dilation": 1 + 3 * torch.rand(shape[-1], generator=generator),
            "act_scale": torch.tensor([0.5, 1.0, 2.0]) / 2 ** (bits - 3),
            "act_zero_point": torch.tensor([-(2 ** (bits - 1)), 3, 2 ** (bits - 1) - 1], dtype=torch.int32),
        }
        if stock.bias is not None:
            state["bias"] = stock.bias.detach()
        layer.load_state_dict(state, assign=True)
        return layer

    return new_layer


@pytest.fixture(scope="session")
def fake_quantized():
    """The expected result of a quantized layer in float64: the stock layer with rounded input and rounded weight."""

    def fake_quantized(layer, x, rows):
        is_conv = isinstance(layer, nn.Conv2d)
        index = torch.tensor(rows, dtype=torch.int32)
        x = x.movedim(1, -1) if is_conv else x
        quantizer = Quantizer(
            layer.weight_dilation, layer.act_scale, layer.act_zero_point, index, layer.activation_bits
        )
        x = reference.dequantize_activation(reference.quantize(x, quantizer), quantizer).double()
        weight = reference.dequantize_weight(layer.packed_weight, layer.weight_scale, layer.weight_dilation).double()
        bias = None if layer.bias is None else layer.bias.double()
        if not is_conv:
            return F.linear(x, weight, bias)
        x, weight = x.movedim(-1, 1), weight.movedim(-1, 1)
        return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation)

    return fake_quantized


@pytest.fixture
def contiguous_group_norm(monkeypatch):
    """On CPUs torch's group norm of channels-last images subtracts squares, which adds an error to the unfused UNet."""
    stock = F.group_norm
    monkeypatch.setattr(F, "group_norm", lambda x, *args, **kwargs: stock(x.contiguous(), *args, **kwargs))
