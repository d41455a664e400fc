"""INT4 convolution: the integer sums exactly, borders as in a float convolution, the float epilogue to rounding."""

import pytest
import torch
import torch.nn.functional as F

from dq_kernels import conv2d, cpu, ops, reference, tuning

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
CHANNELS = [(2, 1), (34, 9), (128, 66)]

# As for the linear layer: against float64, rounded once to the result's dtype.
TOLERANCES = [
    pytest.param(torch.float32, 1e-6, id="float32"),
    pytest.param(torch.float16, 1e-4, id="float16"),
    pytest.param(torch.bfloat16, 5e-3, id="bfloat16"),
]


def exact_sums(arguments):
    """sum_{tap,k} q_x q_w - zp_t sum_{tap,k} q_w, in integers; fp32 holds them exactly below 2^24."""
    zero_point = arguments["act_zero_point"][arguments["timestep_index"]].view(-1, 1, 1, 1)
    accumulator = reference.conv2d_accumulator(
        arguments["x"], arguments["weight"], zero_point, *(arguments[k] for k in ("stride", "padding", "dilation"))
    )
    return (accumulator - zero_point * arguments["weight_sum"]).float()


def float64_conv2d(arguments, values):
    """torch's own convolution, padded with 0, on the numbers that the integers stand for."""
    scale, zero_point = (
        arguments[name][arguments["timestep_index"]].double().view(-1, 1, 1, 1)
        for name in ("act_scale", "act_zero_point")
    )
    x = scale * (arguments["x"][..., : values.shape[3]] - zero_point)
    w = values.double() * arguments["weight_scale"].double().view(-1, 1, 1, 1)
    bias = None if arguments["bias"] is None else arguments["bias"].double()
    geometry = (arguments[name] for name in ("stride", "padding", "dilation"))
    y = F.conv2d(x.permute(0, 3, 1, 2), w.permute(0, 3, 1, 2), bias, *geometry).permute(0, 2, 3, 1)
    if arguments["channel_add"] is not None:
        y = y + arguments["channel_add"].double()[:, None, None, :]
    return y if arguments["residual"] is None else y + arguments["residual"].double()


@pytest.mark.parametrize(("channels", "out_channels"), CHANNELS)
@pytest.mark.parametrize(("image", "kernel", "stride", "padding", "dilation"), GEOMETRIES)
def test_integer_sums_are_exact(
    run, conv2d_arguments, image, kernel, stride, padding, dilation, channels, out_channels
):
    arguments, _ = conv2d_arguments((3, *image, channels), out_channels, kernel, stride, padding, dilation)

    assert torch.equal(run("int4_conv2d", arguments), exact_sums(arguments))


@pytest.mark.parametrize("stride", [(1, 1), (2, 2)], ids=["stride1", "stride2"])
def test_integer_sums_of_a_latent_of_odd_size_are_exact(conv2d_arguments, stride):
    arguments, _ = conv2d_arguments((2, 100, 150, 32), 24, stride=stride)

    assert torch.equal(cpu.int4_conv2d(**arguments), exact_sums(arguments))


def test_odd_channel_count_is_exact(run, conv2d_arguments):
    arguments, _ = conv2d_arguments((2, 4, 5, 33), 6)

    assert torch.equal(run("int4_conv2d", arguments), exact_sums(arguments))


@pytest.mark.parametrize(
    ("q_x", "q_w", "zero_point"), [(-128, -8, 127), (-128, 7, -128), (127, -8, -128), (127, 7, 127)]
)
def test_extreme_values_do_not_overflow(run, conv2d_arguments, q_x, q_w, zero_point):
    channels = 2560  # with 9 taps, the longest sum of SDXL
    arguments, _ = conv2d_arguments((1, 3, 3, channels), 2, padding=(0, 0))
    arguments["x"].fill_(q_x)
    arguments["weight"].fill_((q_w & 15) | (q_w & 15) << 4)
    arguments["weight_sum"].fill_(9 * channels * q_w)
    arguments["act_zero_point"].fill_(zero_point)

    y = run("int4_conv2d", arguments)

    assert torch.equal(y, torch.full((1, 1, 1, 2), float(9 * channels * q_w * (q_x - zero_point))))


@pytest.mark.parametrize("zero_points", [(-128, -40, 0), (127, 3, -1)], ids=str)
def test_conv_pads_with_the_quantized_zero(run, conv2d_arguments, relative_rms, zero_points):
    """Every sample has another zero point, and each is padded as a float convolution pads: with 0."""
    arguments, values = conv2d_arguments((3, 4, 5, 34), 9, padding=(2, 2))
    arguments["act_zero_point"] = torch.tensor(zero_points, dtype=torch.int32)

    assert torch.equal(run("int4_conv2d", arguments).double(), float64_conv2d(arguments, values))


def test_downsampler_padded_on_one_side_is_exact(run, conv2d_arguments):
    """diffusers' Downsample2D pads right and bottom with 0 before a stride-2 convolution: 0 quantizes to zp."""
    arguments, values = conv2d_arguments((3, 6, 8, 34), 9, stride=(2, 2), padding=(0, 0))
    zero_point = arguments["act_zero_point"][arguments["timestep_index"]].view(-1, 1, 1, 1)
    unpadded = arguments["x"]
    arguments["x"] = zero_point.to(torch.int8).repeat(1, 7, 9, 34)
    arguments["x"][:, :6, :8] = unpadded
    real_x = (unpadded - zero_point).double().permute(0, 3, 1, 2)
    expected = F.conv2d(F.pad(real_x, (0, 1, 0, 1)), values.double().permute(0, 3, 1, 2), stride=2)

    assert torch.equal(run("int4_conv2d", arguments).double(), expected.permute(0, 2, 3, 1))


def test_pixels_of_many_samples_in_one_tile_take_their_own_timestep(run, conv2d_arguments):
    arguments, _ = conv2d_arguments((20, 2, 3, 34), 5)
    arguments["timestep_index"] = torch.tensor([2, 0, 1, 1, 0] * 4, dtype=torch.int32)
    arguments["act_scale"] = torch.tensor([1.0, 2.0, 4.0])
    scale = arguments["act_scale"][arguments["timestep_index"]].view(-1, 1, 1, 1)

    assert torch.equal(run("int4_conv2d", arguments), exact_sums(arguments) * scale)


def test_timestep_outside_the_table_is_clamped_to_its_ends(run, conv2d_arguments):
    arguments, _ = conv2d_arguments((4, 3, 4, 34), 5)
    arguments["timestep_index"] = torch.tensor([0, 2, 0, 2], dtype=torch.int32)
    expected = exact_sums(arguments)
    arguments["timestep_index"] = torch.tensor([-1, 3, -7, 40], dtype=torch.int32)

    assert torch.equal(run("int4_conv2d", arguments), expected)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize(("image", "kernel", "stride", "padding", "dilation"), [GEOMETRIES[0], GEOMETRIES[-1]])
def test_epilogue_scales_then_adds_bias_channels_and_residual(
    run, conv2d_arguments, relative_rms, image, kernel, stride, padding, dilation, dtype, tolerance
):
    arguments, values = conv2d_arguments((3, *image, 34), 9, kernel, stride, padding, dilation, dtype)
    expected = float64_conv2d(arguments, values)

    y = run("int4_conv2d", arguments)

    assert y.dtype == dtype
    assert y.is_contiguous()
    assert relative_rms(y, expected.to(dtype)) < tolerance


@pytest.mark.parametrize("absent", ["bias", "channel_add", "residual"])
def test_each_addend_is_optional(run, conv2d_arguments, relative_rms, absent):
    arguments, values = conv2d_arguments((2, 4, 5, 34), 9, dtype=torch.float32)
    arguments[absent] = None

    assert relative_rms(run("int4_conv2d", arguments), float64_conv2d(arguments, values)) < 1e-6


def test_addends_may_have_another_dtype_than_the_result(run, conv2d_arguments, relative_rms):
    arguments, values = conv2d_arguments((2, 4, 5, 34), 9, dtype=torch.bfloat16)
    arguments |= {"residual": arguments["residual"].half(), "out_dtype": torch.float32}

    assert relative_rms(run("int4_conv2d", arguments), float64_conv2d(arguments, values)) < 1e-6


@pytest.mark.parametrize("config", tuning.CONFIGS, ids=lambda config: f"{config.block_m}x{config.block_n}")
@pytest.mark.parametrize("channels", [128, 72])
@pytest.mark.parametrize("run", ["triton"], indirect=True)
def test_every_launch_configuration_gives_the_same_sums(monkeypatch, run, conv2d_arguments, config, channels):
    monkeypatch.setattr(conv2d, "launch_config", lambda num_rows, out_channels: config)
    arguments, _ = conv2d_arguments((3, 6, 9, channels), 131, kernel=(1, 3), padding=(0, 1))

    assert torch.equal(run("int4_conv2d", arguments), exact_sums(arguments))


def test_result_is_fp16_unpadded_without_addends_unless_told_otherwise(conv2d_arguments):
    arguments, _ = conv2d_arguments((2, 4, 5, 4), 5, padding=(0, 0))
    required = ("x", "weight", "weight_scale", "weight_sum", "act_scale", "act_zero_point", "timestep_index")

    assert torch.equal(ops.int4_conv2d(**{key: arguments[key] for key in required}), exact_sums(arguments).half())


@pytest.mark.parametrize(("image", "kernel", "stride", "padding", "dilation"), GEOMETRIES)
def test_reference_agrees_with_torchs_conv2d_in_float64(
    conv2d_arguments, relative_rms, image, kernel, stride, padding, dilation
):
    arguments, values = conv2d_arguments((3, *image, 35), 9, kernel, stride, padding, dilation, torch.float32)
    expected = float64_conv2d(arguments, values)

    assert relative_rms(reference.int4_conv2d(**arguments | {"out_dtype": torch.float64}), expected) < 1e-12


def test_reference_dequantizes_the_weight(conv2d_arguments, relative_rms):
    arguments, values = conv2d_arguments((1, 3, 3, 35), 6, dtype=torch.float32)
    weight_dilation = torch.linspace(1, 8, 35)
    expected = values * arguments["weight_scale"].view(-1, 1, 1, 1) / weight_dilation

    w = reference.dequantize_weight(arguments["weight"], arguments["weight_scale"], weight_dilation)

    assert relative_rms(w, expected) < 1e-6
