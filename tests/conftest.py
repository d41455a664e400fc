"""Shared by all tests: where Triton runs, random arguments for the operators, and the measures of error."""

import math
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when dq_kernels is imported; kernels then run on CPU tensors

from flat_operators import ops, triton

from dq_kernels.cpu import compiled
from dq_kernels.packing import pack_int4
from dq_kernels.triton import tuning

ZERO_POINTS = (-128, 3, 127)  # one for each timestep; the ends of int8 are 0 and 255 in oneDNN's uint8


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA or HIP device"))


@pytest.fixture(scope="session")
def triton_device():
    """The device of tensors for Triton's launchers: a GPU, or the CPU with Triton's interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["triton", "cpu", "cpu without a compiler"])
def implementation(request, monkeypatch):
    if request.param == "cpu without a compiler":
        monkeypatch.setattr(compiled, "library", lambda: None)
    return request.param


@pytest.fixture(scope="session")
def to_device():
    """Moves the tensors among keyword arguments. A view remains a view of the same, moved, memory."""

    def move(tensor, device):
        if tensor._base is None:
            return tensor.to(device)
        return tensor._base.to(device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def to_device(arguments, device):
        return {key: move(value, device) if torch.is_tensor(value) else value for key, value in arguments.items()}

    return to_device


@pytest.fixture
def run(implementation, triton_device, to_device):
    """Calls one implementation of an operator, by the operator's name; the results are on the CPU."""

    def run(op, arguments):
        if implementation != "triton":
            return getattr(ops, op)(**arguments)
        result = getattr(triton, op)(**to_device(arguments, triton_device))
        return tuple(part.cpu() for part in result) if isinstance(result, tuple) else result.cpu()

    return run


@pytest.fixture
def use_config(monkeypatch):
    """Gives every GEMM one configuration, before it is adjusted to the launch."""

    def use_config(config):
        monkeypatch.setattr(tuning, "tuned_config", lambda *shape: config)

    return use_config


@pytest.fixture
def assert_quantized_alike(implementation, triton_device):
    """Asserts that int8 results, rounded from floats, are equal.

    On a GPU the last bits of exp, erf and sums differ: there at most 1 in 1000 values, at a rounding boundary, may be
    one step away.
    """

    def assert_quantized_alike(actual, expected):
        assert actual.dtype == torch.int8
        assert actual.is_contiguous()
        assert actual.shape == expected.shape
        steps = (actual.int() - expected.int()).abs()
        if implementation == "triton" and triton_device == "cuda":
            assert steps.max() <= 1
            assert steps.count_nonzero() <= max(1, steps.numel() // 1000)
        else:
            assert steps.max() == 0, f"{steps.count_nonzero()} of {steps.numel()} differ, by {steps.max()} at most"

    return assert_quantized_alike


@pytest.fixture(scope="session")
def relative_rms():
    """rms(actual - expected) / rms(expected); infinite instead of NaN, so that NaN never passes."""

    def relative_rms(actual, expected):
        assert actual.shape == expected.shape, f"shape {list(actual.shape)}, expected {list(expected.shape)}"
        actual, expected = actual.double(), expected.double()
        error = ((actual - expected).square().mean().sqrt() / expected.square().mean().sqrt()).item()
        return math.inf if math.isnan(error) else error

    return relative_rms


VIEWS = {
    "NCHW": lambda x: x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
    "channels_last": lambda x: x.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1),
    "rows-and-columns-swapped": lambda x: x.transpose(1, 2),
    "samples-and-rows-swapped": lambda x: x.transpose(0, 1),
    "every-other-column": lambda x: x[:, :, 1::2],
    "last-channels": lambda x: x[..., 3:],
    "one-sample-repeated": lambda x: x[:1].expand(3, -1, -1, -1),
}


@pytest.fixture(params=VIEWS)
def strided_view(request):
    """Makes a view of an image [B, H, W, K] with another memory layout."""
    return VIEWS[request.param]


@pytest.fixture(scope="session")
def quantizer_arguments():
    """Makes the keyword arguments of a quantizer: random dilation, mixed timesteps, 8 bits."""

    def quantizer_arguments(batch, channels, seed=0):
        generator = torch.Generator().manual_seed(seed)
        num_timesteps = len(ZERO_POINTS)
        return {
            "quantizer_dilation": 1 + 3 * torch.rand(channels, generator=generator),
            "quantizer_scale": 0.01 + 0.03 * torch.rand(num_timesteps, generator=generator),
            "quantizer_zero_point": torch.randint(-20, 20, (num_timesteps,), dtype=torch.int32, generator=generator),
            "quantizer_timestep_index": (torch.arange(batch, dtype=torch.int32) + 1) % num_timesteps,
            "quantizer_bits": 8,
        }

    return quantizer_arguments


@pytest.fixture(scope="session")
def layer_norm_arguments(quantizer_arguments):
    """Makes keyword arguments for layer_norm_quantize, for tokens of mean 2 and standard deviation 3."""

    def layer_norm_arguments(x_shape, dtype=torch.float32, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return {
            "x": (2 + 3 * torch.randn(x_shape, generator=generator)).to(dtype),
            "norm_weight": torch.randn(x_shape[-1], generator=generator).to(dtype),
            "norm_bias": torch.randn(x_shape[-1], generator=generator).to(dtype),
            "norm_eps": 1e-5,
            **quantizer_arguments(x_shape[0], x_shape[-1], seed),
        }

    return layer_norm_arguments


@pytest.fixture(scope="session")
def group_norm_arguments(layer_norm_arguments, quantizer_arguments):
    """Makes keyword arguments for group_norm_quantize of images x, and of a skip if it has channels."""

    def group_norm_arguments(
        x_shape, num_groups, skip_channels=0, dtype=torch.float32, padding=(0, 0), with_plain=False, seed=0
    ):
        *leading, channels = x_shape
        arguments = layer_norm_arguments((*leading, channels + skip_channels), dtype, seed)
        x, skip = (part.contiguous() for part in arguments["x"].split([channels, skip_channels], dim=-1))
        plain = quantizer_arguments(x_shape[0], channels + skip_channels, seed + 1)
        plain = plain if with_plain else dict.fromkeys(plain)
        return arguments | {
            **{f"plain_{name}": value for name, value in plain.items()},
            "x": x,
            "skip": 5 - 2 * skip if skip_channels else None,
            "statistics": None,
            "skip_statistics": None,
            "num_groups": num_groups,
            "silu": True,
            "padding": padding,
        }

    return group_norm_arguments


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
def geglu_quantize_arguments(linear_arguments, quantizer_arguments):
    """Makes keyword arguments for int4_geglu_quantize, and the 4-bit values [2N, K]."""

    def geglu_quantize_arguments(x_shape, out_channels, dtype=torch.float32, seed=0):
        arguments, values = linear_arguments(x_shape, 2 * out_channels, dtype, seed)
        del arguments["residual"], arguments["out_dtype"]
        following = quantizer_arguments(x_shape[0], out_channels, seed)
        return arguments | {f"next_{name}": value for name, value in following.items()}, values

    return geglu_quantize_arguments


@pytest.fixture(scope="session")
def conv2d_arguments():
    """Makes keyword arguments for int4_conv2d, and the 4-bit values [N, KH, KW, K]; ``dtype`` as for a linear layer.

    The images have the zero point of their timestep in a border of ``padding``.
    """

    def conv2d_arguments(
        image_shape,
        out_channels,
        kernel=(3, 3),
        stride=(1, 1),
        padding=(1, 1),
        dilation=(1, 1),
        upsample=False,
        with_statistics=False,
        dtype=None,
        seed=0,
    ):
        generator = torch.Generator().manual_seed(seed)
        batch, height, width, channels = image_shape
        values = torch.randint(-8, 8, (out_channels, *kernel, channels), dtype=torch.int8, generator=generator)
        arguments = _operands(image_shape, values, dtype, generator)
        arguments |= {"channel_add": None, "residual": None}
        arguments |= {"stride": stride, "dilation": dilation, "upsample": upsample, "with_statistics": with_statistics}
        zero = arguments["quantizer_zero_point"][arguments["quantizer_timestep_index"]].view(-1, 1, 1, 1)
        arguments["x"] = _with_border(arguments["x"], zero, padding)
        if dtype is not None:
            scale = 2 if upsample else 1
            empty = torch.empty(1, 1, scale * height, scale * width, device="meta")
            taps = torch.empty(1, 1, *kernel, device="meta")
            out_size = torch.nn.functional.conv2d(empty, taps, None, stride, padding, dilation).shape[2:]
            arguments["channel_add"] = torch.randn(batch, out_channels, generator=generator).to(dtype)
            arguments["residual"] = torch.randn(batch, *out_size, out_channels, generator=generator).to(dtype)
        return arguments, values

    return conv2d_arguments


@pytest.fixture(scope="session")
def attention_arguments():
    """Makes keyword arguments for int8_attention: normal queries, keys and values."""

    def attention_arguments(batch, query_length, key_length, heads, head_channels, dtype=torch.float32, seed=0):
        generator = torch.Generator().manual_seed(seed)
        lengths = {"query": query_length, "key": key_length, "value": key_length}
        channels = heads * head_channels
        return {
            name: torch.randn(batch, length, channels, generator=generator).to(dtype)
            for name, length in lengths.items()
        } | {"heads": heads}

    return attention_arguments


@pytest.fixture(scope="session")
def attention_quantize_arguments(attention_arguments, quantizer_arguments):
    """Makes keyword arguments for int8_attention_quantize, whose results use most of the range of 8 bits."""

    def attention_quantize_arguments(batch, *shape, dtype=torch.float32, seed=0):
        arguments = attention_arguments(batch, *shape, dtype, seed)
        quantizer = quantizer_arguments(batch, arguments["query"].shape[-1], seed)
        return arguments | quantizer | {"quantizer_scale": quantizer["quantizer_scale"] / 8}

    return attention_quantize_arguments


def _with_border(image, zero_point, padding):
    height, width, channels = image.shape[1:]
    padded = zero_point.to(torch.int8).repeat(1, height + 2 * padding[0], width + 2 * padding[1], channels)
    padded[:, padding[0] : padding[0] + height, padding[1] : padding[1] + width] = image
    return padded


def _operands(x_shape, values, dtype, generator):
    """Arguments of both operators. An odd K is padded in x with noise, which must not count: its weight is 0."""
    batch, channels, out_channels, num_timesteps = x_shape[0], x_shape[-1], values.shape[0], len(ZERO_POINTS)
    x_shape = (*x_shape[:-1], channels + channels % 2)
    arguments = {
        "x": torch.randint(-128, 128, x_shape, dtype=torch.int8, generator=generator),
        "weight_values": pack_int4(values),
        "weight_scale": torch.ones(out_channels),
        "weight_sum": values.flatten(1).sum(1, dtype=torch.int32),
        "quantizer_scale": torch.ones(num_timesteps),
        "quantizer_zero_point": torch.tensor(ZERO_POINTS, dtype=torch.int32),
        "quantizer_timestep_index": (torch.arange(batch, dtype=torch.int32) + 1) % num_timesteps,
        "quantizer_dilation": torch.ones(channels),
        "quantizer_bits": 8,
        "bias": None,
        "out_dtype": torch.float32,
    }
    if dtype is not None:
        arguments |= {
            "weight_scale": 0.01 + 0.02 * torch.rand(out_channels, generator=generator),
            "quantizer_scale": 0.005 + 0.03 * torch.rand(num_timesteps, generator=generator),
            "bias": torch.randn(out_channels, generator=generator).to(dtype),
            "out_dtype": dtype,
        }
    return arguments
