"""Normalization fused with quantization: the reference's int8, statistics of one or two sources, no cancellation."""

import pytest
import torch
from flat_operators import reference

from dq_kernels.triton import norm

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def group_norm(run, arguments):
    """The result without the plain one."""
    return run("group_norm_quantize", arguments)[0]


def quantizer_of(arguments):
    return {name: value for name, value in arguments.items() if name.startswith("quantizer_")}


# (channels, channels of the skip, groups)
SOURCES = [
    pytest.param(4, 0, 1, id="one-group"),
    pytest.param(6, 0, 6, id="a-group-a-channel"),
    pytest.param(130, 0, 5, id="many-channels"),
    pytest.param(40, 24, 4, id="third-group-straddles"),
    pytest.param(5, 7, 3, id="two-odd-sources"),
    pytest.param(8, 8, 4, id="groups-of-one-source-each"),
    pytest.param(2, 34, 2, id="almost-all-in-the-skip"),
    pytest.param(70, 66, 1, id="one-group-of-both"),
]
ONE_GROUP, A_GROUP_A_CHANNEL, STRADDLING = SOURCES[0], SOURCES[1], SOURCES[3]


@pytest.mark.parametrize(("channels", "skip_channels", "num_groups"), SOURCES)
def test_group_norm_is_the_references(
    run, group_norm_arguments, assert_quantized_alike, channels, skip_channels, num_groups
):
    """Of two runs of rows, the last of them cut."""
    arguments = group_norm_arguments((2, 9, 8, channels), num_groups, skip_channels)

    assert_quantized_alike(group_norm(run, arguments), reference.group_norm_quantize(**arguments)[0])


@pytest.mark.parametrize("size", [(5, 7), (1, 1), (8, 8)], ids=str)
@pytest.mark.parametrize(("channels", "skip_channels", "num_groups"), [ONE_GROUP, A_GROUP_A_CHANNEL, STRADDLING])
def test_group_norm_is_the_references_for_images_of_one_run(
    run, group_norm_arguments, assert_quantized_alike, channels, skip_channels, num_groups, size
):
    arguments = group_norm_arguments((3, *size, channels), num_groups, skip_channels)

    assert_quantized_alike(group_norm(run, arguments), reference.group_norm_quantize(**arguments)[0])


# All pairs of two of the three.
@pytest.mark.parametrize(
    ("dtype", "bits", "silu"),
    [
        *((torch.float16, bits, silu) for bits, silu in ((8, True), (4, False))),
        *((torch.bfloat16, bits, silu) for bits, silu in ((8, False), (4, True))),
        *((torch.float32, bits, silu) for bits, silu in ((8, True), (4, False))),
    ],
    ids=str,
)
def test_group_norm_takes_every_dtype_and_number_of_bits(
    run, group_norm_arguments, assert_quantized_alike, dtype, bits, silu
):
    arguments = group_norm_arguments((3, 5, 7, 10), 4, 6, dtype) | {"quantizer_bits": bits, "silu": silu}

    assert_quantized_alike(group_norm(run, arguments), reference.group_norm_quantize(**arguments)[0])


def test_group_norm_takes_sources_and_parameters_of_different_dtypes(run, group_norm_arguments, assert_quantized_alike):
    arguments = group_norm_arguments((3, 5, 7, 10), 4, 6)
    for name, dtype in (("x", torch.float16), ("skip", torch.bfloat16), ("norm_weight", torch.float16)):
        arguments[name] = arguments[name].to(dtype)
    wide = {name: arguments[name].float() for name in ("x", "skip", "norm_weight")}

    assert_quantized_alike(group_norm(run, arguments), reference.group_norm_quantize(**arguments | wide)[0])


@pytest.mark.parametrize("skip_channels", [0, 4])
def test_group_norm_takes_any_strides(run, group_norm_arguments, assert_quantized_alike, strided_view, skip_channels):
    images = torch.randn(2, 4, 6, 7, 11, generator=torch.Generator().manual_seed(0))
    x, skip = strided_view(images[0])[..., :8], strided_view(images[1])[..., :skip_channels]
    arguments = group_norm_arguments(x.shape, 3 if skip_channels else 2, skip_channels)
    arguments |= {"x": x, "skip": skip if skip_channels else None}

    assert_quantized_alike(group_norm(run, arguments), reference.group_norm_quantize(**arguments)[0])


@pytest.mark.parametrize(("padding", "skip_channels"), [((1, 1), 0), ((2, 0), 6), ((0, 3), 6)], ids=str)
def test_group_norms_border_holds_the_quantized_zero(run, group_norm_arguments, padding, skip_channels):
    """It does not hold the norm of 0."""
    arguments = group_norm_arguments((4, 3, 5, 10), 2, skip_channels)
    unpadded = group_norm(run, arguments)
    zero_point = (
        arguments["quantizer_zero_point"][arguments["quantizer_timestep_index"]].to(torch.int8).view(-1, 1, 1, 1)
    )
    expected = zero_point.repeat(1, 3 + 2 * padding[0], 5 + 2 * padding[1], 10 + skip_channels)
    expected[:, padding[0] : padding[0] + 3, padding[1] : padding[1] + 5] = unpadded

    assert torch.equal(group_norm(run, arguments | {"padding": padding}), expected)


@pytest.mark.parametrize("padding", [(0, 0), (1, 2)], ids=str)
@pytest.mark.parametrize(("channels", "skip_channels", "num_groups"), [ONE_GROUP, STRADDLING, SOURCES[4]])
def test_group_norm_also_quantizes_the_concat_itself(
    run, group_norm_arguments, assert_quantized_alike, channels, skip_channels, num_groups, padding
):
    arguments = group_norm_arguments((3, 5, 7, channels), num_groups, skip_channels, padding=padding, with_plain=True)
    arguments["plain_quantizer_bits"] = 6
    plain = {name.removeprefix("plain_"): value for name, value in arguments.items() if name.startswith("plain_")}
    concat = torch.cat([arguments[name] for name in ("x", "skip") if arguments[name] is not None], dim=-1)

    q, plain_q = run("group_norm_quantize", arguments)

    assert_quantized_alike(q, reference.group_norm_quantize(**arguments)[0])
    assert torch.equal(reference.group_norm_quantize(**arguments)[1], reference.quantize(concat, **plain))
    assert plain_q.is_contiguous()
    assert torch.equal(plain_q, reference.quantize(concat, **plain))


@pytest.mark.parametrize(("max_runs", "programs"), [(10, 256), (64, 3)])
@pytest.mark.parametrize(("channels", "skip_channels", "num_groups"), [(4, 0, 1), (10, 6, 4)])
def test_group_norm_of_a_larger_image_is_the_references(
    run, group_norm_arguments, assert_quantized_alike, monkeypatch, channels, skip_channels, num_groups, max_runs,
    programs,
):  # fmt: skip
    """Triton's launcher merges runs first (11 of them, the last one cut, become 3), or a program has many tiles."""
    monkeypatch.setattr(norm, "MAX_RUNS", max_runs)
    monkeypatch.setattr(norm, "MERGED_RUNS", 4)
    monkeypatch.setattr(norm, "PROGRAMS", programs)
    arguments = group_norm_arguments((2, 11, 60, channels), num_groups, skip_channels)

    assert_quantized_alike(group_norm(run, arguments), reference.group_norm_quantize(**arguments)[0])


def test_merged_statistics_are_those_of_longer_runs(triton_device, relative_rms):
    x = 7 + torch.randn(2, 11, 60, 70, generator=torch.Generator().manual_seed(0))
    statistics = reference.channel_statistics(x, 64).to(triton_device)

    merged = norm.merge_runs(statistics, 11 * 60).cpu()

    expected = reference.channel_statistics(x, 64 * norm.MERGED_RUNS)
    for row in range(2):
        assert relative_rms(merged[:, :, row], expected[:, :, row]) < 1e-6


@pytest.mark.parametrize("group_size", [1, 7, 10, 20, 30, 40, 60, 80, 128, 136, 2560])
def test_a_program_of_the_group_norm_has_whole_groups_and_aligned_channels(group_size):
    tile = norm.group_tile(group_size)
    channels = tile["GROUPS"] * tile["GROUP_SIZE"]

    assert tile["GROUP_SIZE"] == group_size
    assert tile["BLOCK_K"] / 2 < channels <= tile["BLOCK_K"] or tile["GROUPS"] == 1
    assert channels % 8 == 0
    assert tile["BLOCK_G"] >= tile["GROUPS"]


@pytest.mark.parametrize(
    ("given", "dtype"),
    [
        (("statistics",), torch.float16),
        (("skip_statistics",), torch.float32),
        (("statistics", "skip_statistics"), torch.float16),
    ],
    ids=str,
)
def test_group_norm_with_a_convolutions_statistics_is_group_norm_without(
    run, conv2d_arguments, group_norm_arguments, assert_quantized_alike, given, dtype
):
    made = {}
    for source, channels in (("x", 10), ("skip", 6)):
        convolution, _ = conv2d_arguments((3, 8, 16, 4), channels, (1, 1), padding=(0, 0), dtype=dtype)
        convolution["with_statistics"] = True
        made[source], made["skip_statistics" if source == "skip" else "statistics"] = run("int4_conv2d", convolution)
    arguments = group_norm_arguments((3, 8, 16, 10), 4, 6) | {"x": made["x"], "skip": made["skip"]}

    with_statistics = group_norm(run, arguments | {name: made[name] for name in given})

    assert_quantized_alike(with_statistics, group_norm(run, arguments))


@pytest.mark.parametrize("implementation", ["triton"], indirect=True)
@pytest.mark.parametrize("name", ["statistics", "skip_statistics"])
def test_group_norm_uses_the_statistics_that_it_is_given(run, group_norm_arguments, name):
    arguments = group_norm_arguments((2, 8, 8, 10), 4, 6)
    wrong = 3 * reference.channel_statistics(arguments["skip" if name == "skip_statistics" else "x"])

    q = group_norm(run, arguments | {name: wrong})

    assert not torch.equal(q, reference.group_norm_quantize(**arguments)[0])


@pytest.mark.parametrize(("skip_channels", "num_groups"), [(0, 2), (6, 1), (6, 4)])
def test_group_norm_does_not_cancel(run, group_norm_arguments, num_groups, skip_channels):
    """The mean is 1000 and the standard deviation 1: the difference of mean square and squared mean has no digits."""
    arguments = group_norm_arguments((2, 12, 16, 10), num_groups, skip_channels)
    for name in ("x", "skip") if skip_channels else ("x",):
        values = arguments[name]
        arguments[name] = 1000 + (values - values.mean()) / values.std()

    q = group_norm(run, arguments)

    steps = (q.int() - reference.group_norm_quantize(**arguments)[0].int()).abs()
    assert steps.max() <= 1, "fp32 holds 1000 to 1/100 of a step"
    assert steps.count_nonzero() <= 0.02 * steps.numel()


def test_group_norm_is_the_same_in_every_run(run, group_norm_arguments):
    arguments = group_norm_arguments((2, 12, 16, 10), 4, 6)

    assert torch.equal(group_norm(run, arguments), group_norm(run, arguments))


@pytest.mark.parametrize(
    ("size", "channels"), [((1, 1), 3), ((8, 8), 130), ((9, 15), 3), ((9, 15), 130), ((16, 16), 3)], ids=str
)
def test_statistics_of_images_with_any_strides_are_the_references(triton_device, relative_rms, size, channels):
    x = 7 + torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(0))
    expected = reference.channel_statistics(x.permute(0, 2, 3, 1))

    for layout in (x, x.contiguous(memory_format=torch.channels_last)):
        statistics = norm.channel_statistics(layout.to(triton_device).permute(0, 2, 3, 1)).cpu()

        assert relative_rms(statistics[:, :, 0], expected[:, :, 0]) < 1e-5
        if size != (1, 1):
            assert relative_rms(statistics[:, :, 1], expected[:, :, 1]) < 1e-5
        else:
            assert statistics[:, :, 1].eq(0).all()


@pytest.mark.parametrize(
    ("x_shape", "dtype"),
    [
        *(((3, 7, 34), dtype) for dtype in DTYPES),
        *((x_shape, torch.float32) for x_shape in ((1, 2), (2, 3, 4, 320), (5, 1, 66))),
    ],
    ids=str,
)
def test_layer_norm_is_the_references(run, layer_norm_arguments, assert_quantized_alike, x_shape, dtype):
    arguments = layer_norm_arguments(x_shape, dtype)

    assert_quantized_alike(run("layer_norm_quantize", arguments), reference.layer_norm_quantize(**arguments))


@pytest.mark.parametrize(
    ("absent", "bits"), [(("norm_weight",), 8), (("norm_bias",), 4), (("norm_weight", "norm_bias"), 8)], ids=str
)
def test_layer_norm_needs_no_parameters(run, layer_norm_arguments, assert_quantized_alike, absent, bits):
    arguments = layer_norm_arguments((3, 7, 34)) | dict.fromkeys(absent) | {"quantizer_bits": bits}

    assert_quantized_alike(run("layer_norm_quantize", arguments), reference.layer_norm_quantize(**arguments))


def test_layer_norm_adds_eps_to_the_variance(run, layer_norm_arguments, assert_quantized_alike):
    arguments = layer_norm_arguments((3, 7, 34))
    arguments["x"] /= 1000  # a variance of 9e-6, beside an eps of 1e-5

    assert_quantized_alike(run("layer_norm_quantize", arguments), reference.layer_norm_quantize(**arguments))


def test_layer_norm_of_a_row_that_fills_a_program_is_the_references(run, layer_norm_arguments, assert_quantized_alike):
    arguments = layer_norm_arguments((2, 3, 8192))

    assert_quantized_alike(run("layer_norm_quantize", arguments), reference.layer_norm_quantize(**arguments))


def test_layer_norm_does_not_cancel(run, layer_norm_arguments):
    arguments = layer_norm_arguments((2, 5, 320))
    arguments["x"] = 1000 + (arguments["x"] - 2) / 3

    q = run("layer_norm_quantize", arguments)

    steps = (q.int() - reference.layer_norm_quantize(**arguments).int()).abs()
    assert steps.max() <= 1, "fp32 holds 1000 to 1/100 of a step"
    assert steps.count_nonzero() <= 0.02 * steps.numel()


@pytest.mark.parametrize("silu", [True, False], ids=["silu", "without-silu"])
@pytest.mark.parametrize(("channels", "skip_channels", "num_groups"), SOURCES)
def test_reference_quantizes_torchs_group_norm_of_the_concat(
    group_norm_arguments, channels, skip_channels, num_groups, silu
):
    arguments = group_norm_arguments((3, 5, 7, channels), num_groups, skip_channels) | {"silu": silu}
    sources = [arguments[name] for name in ("x", "skip") if arguments[name] is not None]
    layer = torch.nn.GroupNorm(num_groups, channels + skip_channels, arguments["norm_eps"]).double()
    layer.load_state_dict({name: arguments[f"norm_{name}"] for name in ("weight", "bias")})
    with torch.no_grad():
        y = layer(torch.cat(sources, dim=3).double().movedim(3, 1)).movedim(1, 3)
        y = torch.nn.SiLU()(y) if silu else y

    quantized = reference.group_norm_quantize(**arguments)[0]
    assert torch.equal(quantized, reference.quantize(y, **quantizer_of(arguments)))


def test_reference_quantizes_torchs_layer_norm(layer_norm_arguments):
    arguments = layer_norm_arguments((3, 7, 34))
    layer = torch.nn.LayerNorm(34, arguments["norm_eps"]).double()
    layer.load_state_dict({name: arguments[f"norm_{name}"] for name in ("weight", "bias")})
    with torch.no_grad():
        y = layer(arguments["x"].double())

    assert torch.equal(reference.layer_norm_quantize(**arguments), reference.quantize(y, **quantizer_of(arguments)))
