"""Shared by all tests: where Triton runs, random arguments for the operators, and the one measure of error."""

import math
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when dq_kernels is imported; kernels then run on CPU tensors

from dq_kernels import conv2d, linear, ops, quantize
from dq_kernels.packing import pack_int4

ZERO_POINTS = (-128, 3, 127)  # one a timestep; the ends of int8 are uint8 0 and 255 to oneDNN
LAUNCHERS = {"quantize": quantize.quantize, "int4_linear": linear.int4_linear, "int4_conv2d": conv2d.int4_conv2d}


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA or HIP device"))


@pytest.fixture(scope="session")
def triton_device():
    """The device of tensors for Triton's launchers: a GPU, or the CPU by way of Triton's interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["triton", "cpu"])
def run(request, triton_device):
    """Calls one implementation of an operator, by the operator's name; the result is on the CPU."""

    def run(op, arguments):
        if request.param == "cpu":
            return getattr(ops, op)(**arguments)
        return LAUNCHERS[op](**to_device(arguments, triton_device)).cpu()

    def to_device(arguments, device):
        return {name: value.to(device) if torch.is_tensor(value) else value for name, value in arguments.items()}

    return run


@pytest.fixture(scope="session")
def relative_rms():
    """rms(actual - expected) / rms(expected); infinite where that is no number, so that NaN never passes."""

    def relative_rms(actual, expected):
        assert actual.shape == expected.shape, f"shape {list(actual.shape)}, expected {list(expected.shape)}"
        actual, expected = actual.double(), expected.double()
        error = ((actual - expected).square().mean().sqrt() / expected.square().mean().sqrt()).item()
        return math.inf if math.isnan(error) else error

    return relative_rms


@pytest.fixture(scope="session")
def linear_arguments():
    """Makes keyword arguments for int4_linear, and the 4-bit values [N, K] that were packed.

    With ``dtype`` there are random scales, a bias and a residual, all for a result of that dtype. Without it the scales
    are 1 and the result is fp32, which holds the integer sums exactly.
    """

    def linear_arguments(x_shape, out_channels, dtype=None, seed=0):
        generator = torch.Generator().manual_seed(seed)
        *leading, channels = x_shape
        values = torch.randint(-8, 8, (out_channels, channels), dtype=torch.int8, generator=generator)
        arguments = _operands((*leading, channels), values, dtype, generator)
        residual = None if dtype is None else torch.randn(*leading, out_channels, generator=generator).to(dtype)
        return arguments | {"residual": residual}, values

    return linear_arguments


@pytest.fixture(scope="session")
def conv2d_arguments():
    """Makes keyword arguments for int4_conv2d, and the 4-bit values [N, KH, KW, K]; for ``dtype`` see linear."""

    def conv2d_arguments(
        x_shape, out_channels, kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), dtype=None, seed=0
    ):
        generator = torch.Generator().manual_seed(seed)
        batch, height, width, channels = x_shape
        values = torch.randint(-8, 8, (out_channels, *kernel, channels), dtype=torch.int8, generator=generator)
        arguments = _operands(x_shape, values, dtype, generator)
        arguments |= {"stride": stride, "padding": padding, "dilation": dilation}
        arguments |= {"channel_add": None, "residual": None}
        if dtype is not None:
            image = torch.empty(1, 1, height, width, device="meta")
            taps = torch.empty(1, 1, *kernel, device="meta")
            out_size = torch.nn.functional.conv2d(image, taps, None, stride, padding, dilation).shape[2:]
            arguments["channel_add"] = torch.randn(batch, out_channels, generator=generator).to(dtype)
            arguments["residual"] = torch.randn(batch, *out_size, out_channels, generator=generator).to(dtype)
        return arguments, values

    return conv2d_arguments


def _operands(x_shape, values, dtype, generator):
    """What both operators take. An odd K is padded in x with noise, which must not count: the weight there is 0."""
    batch, channels, out_channels, num_timesteps = x_shape[0], x_shape[-1], values.shape[0], len(ZERO_POINTS)
    x_shape = (*x_shape[:-1], channels + channels % 2)
    arguments = {
        "x": torch.randint(-128, 128, x_shape, dtype=torch.int8, generator=generator),
        "weight": pack_int4(values),
        "weight_scale": torch.ones(out_channels),
        "weight_sum": values.flatten(1).sum(1, dtype=torch.int32),
        "act_scale": torch.ones(num_timesteps),
        "act_zero_point": torch.tensor(ZERO_POINTS, dtype=torch.int32),
        "timestep_index": (torch.arange(batch, dtype=torch.int32) + 1) % num_timesteps,
        "bias": None,
        "out_dtype": torch.float32,
    }
    if dtype is not None:
        arguments |= {
            "weight_scale": 0.01 + 0.02 * torch.rand(out_channels, generator=generator),
            "act_scale": 0.005 + 0.03 * torch.rand(num_timesteps, generator=generator),
            "bias": torch.randn(out_channels, generator=generator).to(dtype),
            "out_dtype": dtype,
        }
    return arguments
