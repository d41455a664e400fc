"""INT4 convolution: exact integer sums, borders as in a float convolution, an epilogue that is right to rounding."""

import pytest
import torch
import torch.nn.functional as F
from flat_operators import cpu, ops, reference

from dq_kernels.triton import tuning
from dq_kernels.triton.tuning import LaunchConfig

# Packed bytes of a step: an int8 dot on a GPU needs at least 32, Triton's interpreter any number.
SMALLEST_K = 32 if torch.cuda.is_available() else 16

# (image, kernel, stride, padding, dilation)
GEOMETRIES = [
    pytest.param((5, 7), (3, 3), (1, 1), (1, 1), (1, 1), id="3x3"),
    pytest.param((5, 7), (3, 3), (2, 2), (1, 1), (1, 1), id="3x3-stride2"),
    pytest.param((6, 8), (3, 3), (2, 2), (1, 1), (1, 1), id="3x3-stride2-even"),
    pytest.param((7, 9), (3, 3), (2, 2), (0, 0), (1, 1), id="3x3-stride2-unpadded"),
    pytest.param((5, 7), (1, 1), (1, 1), (0, 0), (1, 1), id="1x1"),
    pytest.param((5, 7), (1, 1), (2, 2), (0, 0), (1, 1), id="1x1-stride2"),
    pytest.param((5, 7), (5, 5), (1, 1), (2, 2), (1, 1), id="5x5"),
    pytest.param((5, 7), (3, 3), (1, 1), (2, 2), (2, 2), id="3x3-dilation2"),
    pytest.param((5, 7), (3, 3), (1, 1), (4, 4), (1, 1), id="windows-of-padding-alone"),
    pytest.param((1, 7), (3, 3), (1, 1), (1, 1), (1, 1), id="one-row"),
    pytest.param((7, 1), (3, 3), (1, 1), (1, 1), (1, 1), id="one-column"),
    pytest.param((1, 1), (3, 3), (1, 1), (1, 1), (1, 1), id="one-pixel"),
    pytest.param((3, 3), (3, 3), (1, 1), (0, 0), (1, 1), id="one-window"),
    pytest.param((6, 7), (2, 3), (1, 2), (1, 0), (1, 1), id="rows-unlike-columns"),
    pytest.param((7, 6), (3, 2), (3, 1), (0, 1), (1, 2), id="columns-unlike-rows"),
]
CHANNELS = [(2, 1), (128, 66)]  # of one packed byte; of whole steps and more than one tile
ALIKE, ROWS_UNLIKE_COLUMNS = GEOMETRIES[2], GEOMETRIES[-2]

# As for the linear layer: against float64, rounded once to the result's dtype.
TOLERANCES = [
    pytest.param(torch.float32, 1e-6, id="float32"),
    pytest.param(torch.float16, 1e-4, id="float16"),
    pytest.param(torch.bfloat16, 5e-3, id="bfloat16"),
]


def exact_sums(arguments):
    """sum_{tap,k} q_x q_w - zp_t sum_{tap,k} q_w, in integers; fp32 holds them exactly below 2^24."""
    zero_point = arguments["quantizer_zero_point"][arguments["quantizer_timestep_index"]].view(-1, 1, 1, 1)
    geometry = (arguments[name] for name in ("stride", "dilation", "upsample"))
    accumulator = reference.conv2d_accumulator(arguments["x"], arguments["weight_values"], *geometry)
    return (accumulator - zero_point * arguments["weight_sum"]).float()


def float64_conv2d(arguments, values, padding):
    """torch's convolution, padded with 0, of the numbers that the integers represent."""
    scale, zero_point = (
        arguments[name][arguments["quantizer_timestep_index"]].double().view(-1, 1, 1, 1)
        for name in ("quantizer_scale", "quantizer_zero_point")
    )
    height, width = arguments["x"].shape[1:3]
    inside = arguments["x"][:, padding[0] : height - padding[0], padding[1] : width - padding[1]]
    x = (scale * (inside - zero_point))[..., : values.shape[3]].permute(0, 3, 1, 2)
    if arguments["upsample"]:
        x = F.interpolate(x, scale_factor=2, mode="nearest")
    w = values.double() * arguments["weight_scale"].double().view(-1, 1, 1, 1)
    bias = None if arguments["bias"] is None else arguments["bias"].double()
    stride, dilation = arguments["stride"], arguments["dilation"]
    y = F.conv2d(x, w.permute(0, 3, 1, 2), bias, stride, padding, dilation).permute(0, 2, 3, 1)
    if arguments["channel_add"] is not None:
        y = y + arguments["channel_add"].double()[:, None, None, :]
    return y if arguments["residual"] is None else y + arguments["residual"].double()


def result(run, arguments):
    """The result of a convolution without statistics."""
    y, statistics = run("int4_conv2d", arguments)
    assert statistics.numel() == 0
    return y


@pytest.mark.parametrize(("image", "kernel", "stride", "padding", "dilation"), GEOMETRIES)
def test_integer_sums_are_exact(run, conv2d_arguments, image, kernel, stride, padding, dilation):
    arguments, _ = conv2d_arguments((3, *image, 34), 9, kernel, stride, padding, dilation)

    assert torch.equal(result(run, arguments), exact_sums(arguments))


@pytest.mark.parametrize(("channels", "out_channels"), CHANNELS)
@pytest.mark.parametrize(("image", "kernel", "stride", "padding", "dilation"), [ALIKE, ROWS_UNLIKE_COLUMNS])
def test_integer_sums_over_any_number_of_channels_are_exact(
    run, conv2d_arguments, image, kernel, stride, padding, dilation, channels, out_channels
):
    arguments, _ = conv2d_arguments((3, *image, channels), out_channels, kernel, stride, padding, dilation)

    assert torch.equal(result(run, arguments), exact_sums(arguments))


@pytest.mark.parametrize("stride", [(1, 1), (2, 2)], ids=["stride1", "stride2"])
def test_integer_sums_of_a_latent_of_odd_size_are_exact(conv2d_arguments, stride):
    arguments, _ = conv2d_arguments((2, 100, 150, 32), 24, stride=stride)

    assert torch.equal(cpu.int4_conv2d(**arguments)[0], exact_sums(arguments))


@pytest.mark.parametrize(
    ("image", "channels", "out_channels"),
    [*(((3, 4), *channels) for channels in CHANNELS), *((image, 34, 9) for image in ((3, 4), (1, 5), (4, 1), (1, 1)))],
    ids=str,
)
def test_integer_sums_of_an_upsampled_image_are_exact(run, conv2d_arguments, image, channels, out_channels):
    arguments, _ = conv2d_arguments((3, *image, channels), out_channels, upsample=True)

    assert torch.equal(result(run, arguments), exact_sums(arguments))


def test_odd_channel_count_is_exact(run, conv2d_arguments):
    arguments, _ = conv2d_arguments((2, 4, 5, 33), 6)

    assert torch.equal(result(run, arguments), exact_sums(arguments))


@pytest.mark.parametrize(("q_x", "q_w", "zero_point"), [(-128, -8, 127), (127, -8, -128)])
def test_extreme_values_do_not_overflow(run, conv2d_arguments, use_config, q_x, q_w, zero_point):
    """The largest and the smallest sum; the signs of x and weights that cancel are tested with linear layers."""
    use_config(LaunchConfig(16, 16, 256, 4, 2))
    channels = 2560  # with 9 taps, the longest sum of SDXL
    arguments, _ = conv2d_arguments((1, 3, 3, channels), 2, padding=(0, 0))
    arguments["x"].fill_(q_x)
    arguments["weight_values"].fill_((q_w & 15) | (q_w & 15) << 4)
    arguments["weight_sum"].fill_(9 * channels * q_w)
    arguments["quantizer_zero_point"].fill_(zero_point)

    y = result(run, arguments)

    assert torch.equal(y, torch.full((1, 1, 1, 2), float(9 * channels * q_w * (q_x - zero_point))))


def test_downsampler_padded_on_one_side_is_exact(run, conv2d_arguments):
    """diffusers' Downsample2D pads right and bottom with 0, which quantizes to zp, before a convolution of stride 2."""
    arguments, values = conv2d_arguments((3, 6, 8, 34), 9, stride=(2, 2), padding=(0, 0))
    zero_point = arguments["quantizer_zero_point"][arguments["quantizer_timestep_index"]].view(-1, 1, 1, 1)
    unpadded = arguments["x"]
    arguments["x"] = zero_point.to(torch.int8).repeat(1, 7, 9, 34)
    arguments["x"][:, :6, :8] = unpadded
    real_x = (unpadded - zero_point).double().permute(0, 3, 1, 2)
    expected = F.conv2d(F.pad(real_x, (0, 1, 0, 1)), values.double().permute(0, 3, 1, 2), stride=2)

    assert torch.equal(result(run, arguments).double(), expected.permute(0, 2, 3, 1))


def test_pixels_of_many_samples_in_one_tile_take_their_own_timestep(run, conv2d_arguments):
    arguments, _ = conv2d_arguments((10, 2, 3, 34), 5)
    arguments["quantizer_timestep_index"] = torch.tensor([2, 0, 1, 1, 0] * 2, dtype=torch.int32)
    arguments["quantizer_scale"] = torch.tensor([1.0, 2.0, 4.0])
    scale = arguments["quantizer_scale"][arguments["quantizer_timestep_index"]].view(-1, 1, 1, 1)

    assert torch.equal(result(run, arguments), exact_sums(arguments) * scale)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize(("image", "kernel", "stride", "padding", "dilation"), [ROWS_UNLIKE_COLUMNS])
def test_epilogue_scales_then_adds_bias_channels_and_residual(
    run, conv2d_arguments, relative_rms, image, kernel, stride, padding, dilation, dtype, tolerance
):
    arguments, values = conv2d_arguments((3, *image, 34), 9, kernel, stride, padding, dilation, dtype=dtype)
    expected = float64_conv2d(arguments, values, padding)

    y = result(run, arguments)

    assert y.dtype == dtype
    assert y.is_contiguous()
    assert relative_rms(y, expected.to(dtype)) < tolerance


@pytest.mark.parametrize("absent", ["bias", "channel_add", "residual"])
def test_each_addend_is_optional(run, conv2d_arguments, relative_rms, absent):
    arguments, values = conv2d_arguments((2, 4, 5, 34), 9, dtype=torch.float32)
    arguments[absent] = None

    assert relative_rms(result(run, arguments), float64_conv2d(arguments, values, (1, 1))) < 1e-6


def test_added_channels_may_be_a_view_of_more(run, conv2d_arguments, relative_rms):
    """Fused UNets project the time embedding for all resnets at once."""
    arguments, values = conv2d_arguments((2, 4, 5, 34), 9, dtype=torch.float32)
    arguments["channel_add"] = torch.randn(2, 20, generator=torch.Generator().manual_seed(0))[:, 7:16]

    assert relative_rms(result(run, arguments), float64_conv2d(arguments, values, (1, 1))) < 1e-6


def test_addends_may_have_another_dtype_than_the_result(run, conv2d_arguments, relative_rms):
    arguments, values = conv2d_arguments((2, 4, 5, 34), 9, dtype=torch.bfloat16)
    arguments |= {"residual": arguments["residual"].half(), "out_dtype": torch.float32}

    assert relative_rms(result(run, arguments), float64_conv2d(arguments, values, (1, 1))) < 1e-6


@pytest.mark.parametrize(
    ("image", "geometry", "dtype"),
    [
        pytest.param((12, 16), {}, torch.float32, id="plain"),
        pytest.param((24, 32), {"stride": (2, 2)}, torch.float16, id="stride2"),
        pytest.param((6, 8), {"upsample": True}, torch.bfloat16, id="upsample"),
    ],
)
def test_statistics_are_those_of_the_stored_result(
    run, conv2d_arguments, use_config, relative_rms, image, geometry, dtype
):
    """Tiles have 128 pixels and samples 192, so that tiles span samples and the last one is cut."""
    use_config(LaunchConfig(128, 16, SMALLEST_K, 4, 2))
    arguments, _ = conv2d_arguments((3, *image, 10), 9, with_statistics=True, dtype=dtype, **geometry)

    y, statistics = run("int4_conv2d", arguments)

    expected = reference.channel_statistics(y)
    assert statistics.shape == (3, 3, 2, 9)
    assert relative_rms(statistics[:, :, 0], expected[:, :, 0]) < 1e-5
    assert relative_rms(statistics[:, :, 1], expected[:, :, 1]) < 1e-5
    assert torch.equal(y, run("int4_conv2d", arguments | {"with_statistics": False})[0])


def test_statistics_of_a_tile_smaller_than_a_run_are_complete(run, conv2d_arguments, use_config, relative_rms):
    use_config(LaunchConfig(16, 16, SMALLEST_K, 4, 2))
    arguments, _ = conv2d_arguments((2, 8, 8, 6), 9, with_statistics=True, dtype=torch.float32)

    y, statistics = run("int4_conv2d", arguments)

    assert relative_rms(statistics, reference.channel_statistics(y)) < 1e-5


def test_statistics_do_not_cancel(run, conv2d_arguments, relative_rms):
    """The mean is 1000 and the standard deviation 1: the difference of mean square and squared mean has no digits."""
    arguments, _ = conv2d_arguments((2, 8, 16, 6), 9, with_statistics=True, dtype=torch.float32)
    arguments |= {"weight_scale": arguments["weight_scale"] / 100, "bias": torch.full((9,), 1000.0)}

    y, statistics = run("int4_conv2d", arguments)

    assert relative_rms(statistics[:, :, 1], reference.channel_statistics(y)[:, :, 1]) < 1e-3


def test_result_and_statistics_are_the_same_in_every_run(run, conv2d_arguments):
    arguments, _ = conv2d_arguments((2, 8, 8, 34), 9, with_statistics=True, dtype=torch.float16)
    first, first_statistics = run("int4_conv2d", arguments)

    again, statistics = run("int4_conv2d", arguments)

    assert torch.equal(again, first)
    assert torch.equal(statistics, first_statistics)


@pytest.mark.parametrize("implementation", ["triton"], indirect=True)
@pytest.mark.parametrize(
    ("kernel", "stride", "expected"),
    [
        ((1, 1), (1, 1), ("linear", 60, 9, 34)),
        ((1, 1), (2, 2), ("conv2d", 18, 9, 34)),
        ((3, 3), (1, 1), ("conv2d", 18, 9, 306)),
    ],
    ids=str,
)
def test_launch_is_tuned_as_its_gemm(monkeypatch, run, conv2d_arguments, kernel, stride, expected):
    """A 1x1 convolution is a linear layer of its pixels."""
    asked = []
    config = LaunchConfig(16, 16, SMALLEST_K, 4, 2)
    monkeypatch.setattr(tuning, "tuned_config", lambda architecture, *shape: asked.append(shape) or config)
    arguments, _ = conv2d_arguments((3, 4, 5, 34), 9, kernel, stride, padding=(0, 0))

    run("int4_conv2d", arguments)

    assert asked == [expected]


def test_result_is_fp16_without_addends_and_statistics_unless_told_otherwise(conv2d_arguments):
    arguments, _ = conv2d_arguments((2, 4, 5, 4), 5)
    required = {key: value for key, value in arguments.items() if key.startswith(("x", "weight_", "quantizer_"))}

    y, statistics = ops.int4_conv2d(**required)

    assert torch.equal(y, exact_sums(arguments).half())
    assert statistics.shape == (0, 0, 2, 5)


@pytest.mark.parametrize(("image", "kernel", "stride", "padding", "dilation"), GEOMETRIES)
def test_reference_agrees_with_torchs_conv2d_in_float64(
    conv2d_arguments, relative_rms, image, kernel, stride, padding, dilation
):
    """torch pads with 0, so this also shows that the quantized zero in the border is a float 0."""
    arguments, values = conv2d_arguments((3, *image, 36), 9, kernel, stride, padding, dilation, dtype=torch.float32)
    expected = float64_conv2d(arguments, values, padding)

    y, _ = reference.int4_conv2d(**arguments | {"out_dtype": torch.float64})

    assert relative_rms(y, expected) < 1e-12


@pytest.mark.parametrize("image", [(3, 4), (1, 1)], ids=str)
def test_reference_agrees_with_torchs_interpolation_and_conv2d_in_float64(conv2d_arguments, relative_rms, image):
    arguments, values = conv2d_arguments((3, *image, 36), 9, upsample=True, dtype=torch.float32)

    y, _ = reference.int4_conv2d(**arguments | {"out_dtype": torch.float64})

    assert relative_rms(y, float64_conv2d(arguments, values, (1, 1))) < 1e-12


def test_reference_statistics_are_torchs_sum_and_variance(relative_rms):
    x = torch.randn(2, 10, 15, 3, generator=torch.Generator().manual_seed(0))
    runs = [x.flatten(1, 2)[:, start : start + 64].double() for start in (0, 64, 128)]
    expected = torch.stack(
        [torch.stack([run.sum(1), run.var(1, correction=0) * run.shape[1]], dim=1) for run in runs], dim=1
    )

    assert relative_rms(reference.channel_statistics(x), expected) < 1e-6


def test_reference_dequantizes_the_weight(conv2d_arguments, relative_rms):
    arguments, values = conv2d_arguments((1, 3, 3, 35), 6, dtype=torch.float32)
    weight_dilation = torch.linspace(1, 8, 35)
    expected = values * arguments["weight_scale"].view(-1, 1, 1, 1) / weight_dilation

    w = reference.dequantize_weight(arguments["weight_values"], arguments["weight_scale"], weight_dilation)

    assert relative_rms(w, expected) < 1e-6
