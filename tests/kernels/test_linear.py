"""INT4 linear layer: integer sums and the next layer's int8 are exact, the float epilogue is right to rounding."""

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from diffusers.models.activations import GEGLU
from flat_operators import ops, reference

from dq_kernels.triton.gemm import _gelu
from dq_kernels.triton.tuning import LaunchConfig

# Against float64, rounded once to the result's dtype. fp32: about five roundings of 2^-24. fp16: the few values next to
# a rounding boundary may be one step of 2^-10 off. bf16: all values may be a step of 2^-7 off, because Triton's
# interpreter truncates to bf16 where a GPU rounds.
TOLERANCES = [
    pytest.param(torch.float32, 1e-6, id="float32"),
    pytest.param(torch.float16, 1e-4, id="float16"),
    pytest.param(torch.bfloat16, 5e-3, id="bfloat16"),
]


def exact_sums(arguments):
    """sum_k q_x q_w - zp_t sum_k q_w, in integers; fp32 holds them exactly below 2^24."""
    x, weight, timestep_index = (arguments[name] for name in ("x", "weight_values", "quantizer_timestep_index"))
    zero_point = arguments["quantizer_zero_point"][timestep_index].view(-1, *[1] * (x.ndim - 1))
    return (reference.linear_accumulator(x, weight) - zero_point * arguments["weight_sum"]).float()


def float64_linear(arguments, values):
    """torch's linear layer of the numbers that the integers represent."""
    x, timestep_index = arguments["x"], arguments["quantizer_timestep_index"]
    scale, zero_point = (
        arguments[name][timestep_index].double().view(-1, *[1] * (x.ndim - 1))
        for name in ("quantizer_scale", "quantizer_zero_point")
    )
    w = values.double() * arguments["weight_scale"].double()[:, None]
    bias, residual = arguments["bias"], arguments.get("residual")
    y = F.linear(scale * (x[..., : values.shape[1]] - zero_point), w, None if bias is None else bias.double())
    return y if residual is None else y + residual.double()


@pytest.mark.parametrize(
    ("rows", "channels", "out_channels"),
    [
        *((rows, 34, 41) for rows in ((1,), (9,), (41,), (5, 7), (2, 3, 4))),
        *(((5, 7), *channels) for channels in ((2, 1), (64, 96), (128, 141), (130, 96), (320, 1), (341, 41))),
        ((1,), 341, 96),
    ],
    ids=str,
)
def test_integer_sums_are_exact(run, linear_arguments, rows, channels, out_channels):
    arguments, _ = linear_arguments((*rows, channels), out_channels)

    assert torch.equal(run("int4_linear", arguments), exact_sums(arguments))


@pytest.mark.parametrize(
    ("q_x", "q_w", "zero_point"), [(-128, -8, 127), (-128, 7, -128), (127, -8, -128), (127, 7, 127)]
)
def test_extreme_values_do_not_overflow(run, linear_arguments, use_config, q_x, q_w, zero_point):
    use_config(LaunchConfig(16, 16, 256, 4, 2))
    channels = 23040  # the longest sum of SDXL
    arguments, _ = linear_arguments((2, channels), 3)
    byte = (q_w & 15) | (q_w & 15) << 4
    arguments["x"].fill_(q_x)
    arguments["weight_values"].fill_(byte)
    arguments["weight_sum"].fill_(channels * q_w)
    arguments["quantizer_zero_point"].fill_(zero_point)

    y = run("int4_linear", arguments)

    assert torch.equal(y, torch.full((2, 3), float(channels * q_w * (q_x - zero_point))))


def test_rows_of_many_samples_in_one_tile_take_their_own_timestep(run, linear_arguments):
    arguments, _ = linear_arguments((10, 3, 34), 5)
    arguments["quantizer_timestep_index"] = torch.tensor([2, 0, 1, 1, 0] * 2, dtype=torch.int32)
    arguments["quantizer_scale"] = torch.tensor([1.0, 2.0, 4.0])
    scale = arguments["quantizer_scale"][arguments["quantizer_timestep_index"]].view(-1, 1, 1)

    assert torch.equal(run("int4_linear", arguments), exact_sums(arguments) * scale)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("x_shape", [(1, 64), (3, 9, 130), (2, 3, 4, 341)], ids=str)
def test_epilogue_scales_then_adds_bias_and_residual(run, linear_arguments, relative_rms, x_shape, dtype, tolerance):
    arguments, values = linear_arguments(x_shape, 41, dtype)
    expected = float64_linear(arguments, values)

    y = run("int4_linear", arguments)

    assert y.dtype == dtype
    assert y.is_contiguous()
    assert relative_rms(y, expected.to(dtype)) < tolerance


@pytest.mark.parametrize("absent", ["bias", "residual"])
def test_each_addend_is_optional(run, linear_arguments, relative_rms, absent):
    arguments, values = linear_arguments((2, 5, 34), 41, torch.float32)
    arguments[absent] = None

    assert relative_rms(run("int4_linear", arguments), float64_linear(arguments, values)) < 1e-6


def test_addends_may_have_another_dtype_than_the_result(run, linear_arguments, relative_rms):
    arguments, values = linear_arguments((2, 5, 34), 41, torch.bfloat16)
    arguments |= {"residual": arguments["residual"].half(), "out_dtype": torch.float32}

    assert relative_rms(run("int4_linear", arguments), float64_linear(arguments, values)) < 1e-6


def test_odd_channel_count_passes_from_quantize_to_linear(run, linear_arguments, relative_rms):
    arguments, values = linear_arguments((2, 5, 41), 9, torch.float32)
    quantizer = {name: value for name, value in arguments.items() if name.startswith("quantizer_")}
    quantizer |= {"padding": (0, 0)}
    x = torch.randn(2, 5, 41, generator=torch.Generator().manual_seed(0))
    arguments["x"] = run("quantize", {"x": x} | quantizer)

    assert relative_rms(run("int4_linear", arguments), float64_linear(arguments, values)) < 1e-6


@pytest.mark.parametrize(("x_shape", "out_channels"), [((1, 64), 2), ((3, 7, 130), 42), ((2, 3, 4, 34), 20)], ids=str)
def test_requantized_result_is_the_references(
    run, geglu_quantize_arguments, assert_quantized_alike, x_shape, out_channels
):
    arguments, _ = geglu_quantize_arguments(x_shape, out_channels)

    assert_quantized_alike(run("int4_geglu_quantize", arguments), reference.int4_geglu_quantize(**arguments))


@triton.jit
def gelu_kernel(x_ptr, y_ptr, SIZE: tl.constexpr, PTX: tl.constexpr):
    n = tl.arange(0, SIZE)
    tl.store(y_ptr + n, _gelu(tl.load(x_ptr + n), PTX))


def test_gelu_of_the_gate_has_an_absolute_error_below_a_millionth(triton_device):
    # Beyond 10 the result is that of ReLU. The fitted polynomial must not turn upwards far from the fitted range.
    x = torch.cat([torch.linspace(-10, 10, 2**13), 10 * torch.logspace(0, 4, 2**12), -10 * torch.logspace(0, 4, 2**12)])
    x = x.to(triton_device)
    y = torch.empty_like(x)

    gelu_kernel[(1,)](x, y, x.numel(), PTX=torch.version.cuda is not None and x.is_cuda)

    torch.testing.assert_close(y.double(), F.gelu(x.double()), rtol=1.2e-7, atol=7e-7)


@pytest.mark.parametrize("bits", [8, 6, 4, 2])
def test_requantized_result_saturates_at_the_ends_of_its_bits(
    run, geglu_quantize_arguments, assert_quantized_alike, bits
):
    arguments, _ = geglu_quantize_arguments((3, 5, 34), 20)
    arguments |= {"next_quantizer_bits": bits, "next_quantizer_scale": arguments["next_quantizer_scale"] / 8}
    expected = reference.int4_geglu_quantize(**arguments)
    assert expected.max() == 2 ** (bits - 1) - 1

    assert_quantized_alike(run("int4_geglu_quantize", arguments), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("x_shape", "out_channels"), [((3, 5, 34), 20), ((2, 33, 66), 130)], ids=str)
def test_sum_with_the_residual_is_requantized_as_in_the_reference(
    run, linear_arguments, quantizer_arguments, assert_quantized_alike, x_shape, out_channels, dtype
):
    arguments, _ = linear_arguments(x_shape, out_channels, dtype)
    following = quantizer_arguments(x_shape[0], out_channels)
    arguments |= {f"next_{name}": value for name, value in following.items()} | {"next_quantizer_bits": 6}
    expected = reference.int4_linear(**arguments)
    y = reference.int4_linear(**{name: value for name, value in arguments.items() if not name.startswith("next_")})

    assert_quantized_alike(run("int4_linear", arguments), expected)
    if dtype == torch.float32:
        assert torch.equal(expected, reference.quantize(y, **following | {"quantizer_bits": 6}))


def test_requantization_does_not_need_a_bias(run, geglu_quantize_arguments, assert_quantized_alike):
    arguments, _ = geglu_quantize_arguments((3, 5, 34), 20)
    arguments["bias"] = None

    assert_quantized_alike(run("int4_geglu_quantize", arguments), reference.int4_geglu_quantize(**arguments))


def test_result_is_fp16_without_bias_unless_told_otherwise(linear_arguments):
    arguments, _ = linear_arguments((2, 34), 5)
    for name in ("bias", "residual", "out_dtype"):
        del arguments[name]

    assert torch.equal(ops.int4_linear(**arguments), exact_sums(arguments).half())


@pytest.mark.parametrize("x_shape", [(3, 34), (3, 5, 341)], ids=str)
def test_reference_agrees_with_torchs_linear_in_float64(linear_arguments, relative_rms, x_shape):
    arguments, values = linear_arguments(x_shape, 41, torch.float32)
    expected = float64_linear(arguments, values)

    assert relative_rms(reference.int4_linear(**arguments | {"out_dtype": torch.float64}), expected) < 1e-12


@pytest.mark.parametrize("dilated", [False, True])
def test_reference_dequantizes_the_weight(linear_arguments, relative_rms, dilated):
    arguments, values = linear_arguments((1, 35), 6, torch.float32)
    weight_dilation = torch.linspace(1, 8, 35) if dilated else None
    expected = values * arguments["weight_scale"][:, None]
    expected = expected / weight_dilation if dilated else F.pad(expected, (0, 1))

    w = reference.dequantize_weight(arguments["weight_values"], arguments["weight_scale"], weight_dilation)

    assert relative_rms(w, expected) < 1e-6


@pytest.mark.parametrize("actual", [torch.nan, torch.inf])
def test_error_measure_never_passes_a_result_that_is_no_number(relative_rms, actual):
    expected = torch.tensor([1.0, 2.0])

    assert relative_rms(torch.tensor([1.0, 2.002]), expected) == pytest.approx(0.002 / 5**0.5, rel=1e-3)
    assert relative_rms(torch.tensor([1.0, actual]), expected) == torch.inf


def test_reference_requantizes_torchs_linear_and_geglu_in_float64(geglu_quantize_arguments):
    arguments, values = geglu_quantize_arguments((3, 5, 34), 20)
    geglu = GEGLU(2, 20).double()
    geglu.proj = torch.nn.Identity()
    following = {name: arguments[f"next_{name}"] for name in arguments if name.startswith("quantizer_")}
    y = geglu(float64_linear(arguments, values))
    expected = reference.quantize(x=y, padding=(0, 0), **following)
    assert expected.unique().numel() > 50

    assert torch.equal(reference.int4_geglu_quantize(**arguments), expected)
