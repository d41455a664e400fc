"""The registered operators: the requirements of PyTorch's dispatcher and compiler, and refused arguments."""

import itertools

import pytest
import torch
from flat_operators import ops, reference

from dq_kernels.records import Quantizer
from dq_kernels.triton.tuning import LaunchConfig

PLAIN_QUANTIZER, NEXT_QUANTIZER = (
    tuple(f"{name}_quantizer_{field}" for field in Quantizer._fields) for name in ("plain", "next")
)
# Each operator's optional arguments, all of which may be None at once.
OPERATORS = {
    "quantize": (),
    "layer_norm_quantize": ("norm_weight", "norm_bias"),
    "group_norm_quantize": ("skip", "statistics", "skip_statistics", *PLAIN_QUANTIZER),
    "int4_linear": ("bias", "residual", *NEXT_QUANTIZER),
    "int4_geglu_quantize": ("bias",),
    "int4_conv2d": ("bias", "residual", "channel_add"),
    "attention_quantize": (),
    "int8_attention": (),
    "int8_attention_quantize": ("statistics",),
}
WITH_TIMESTEPS = [op for op in OPERATORS if op != "int8_attention"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def without_optional(op, arguments):
    arguments = arguments | dict.fromkeys(OPERATORS[op])
    if op == "group_norm_quantize":
        channels = arguments["x"].shape[-1]
        parameters = ("quantizer_dilation", "norm_weight", "norm_bias")
        arguments |= {name: arguments[name][:channels] for name in parameters if name in arguments}
    return arguments | ({"num_groups": 3} if op == "group_norm_quantize" else {})


@pytest.fixture
def variants(make, conv2d_arguments, group_norm_arguments):
    """Valid arguments that ``make`` does not make, by operator and variant."""
    image = make("quantize")
    together = torch.randn(3, 5, 18, generator=torch.Generator().manual_seed(0))
    chunks = dict(zip(("query", "key", "value"), together.chunk(3, dim=-1), strict=True))
    given = group_norm_arguments((3, 8, 16, 6), 4, 10)
    sources = {"statistics": "x", "skip_statistics": "skip"}
    many = make("int8_attention_quantize", size=(5, 128))
    many_keys = torch.cat([many["key"], many["value"]], dim=-1)
    return {
        **{f"{op} alone": without_optional(op, make(op)) for op in OPERATORS},
        "quantize nchw": image | {"x": image["x"].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)},
        "group_norm_quantize nchw": given | {"x": given["x"].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)},
        "group_norm_quantize given": given | {k: reference.channel_statistics(given[v]) for k, v in sources.items()},
        "int4_conv2d upsample": conv2d_arguments((3, 3, 4, 6), 4, upsample=True, dtype=torch.float16)[0],
        "int4_conv2d statistics": conv2d_arguments((3, 8, 16, 6), 4, with_statistics=True, dtype=torch.float16)[0],
        "int8_attention chunks": make("int8_attention") | chunks,
        "int8_attention_quantize chunks": make("int8_attention_quantize") | chunks,
        "int8_attention_quantize given": many | {"statistics": reference.channel_statistics(many_keys[:, :, None])},
        "attention_quantize chunks": make("attention_quantize") | chunks,
    }


VARIANTS = [
    *(f"{op} alone" for op in OPERATORS),
    "quantize nchw",
    "group_norm_quantize nchw",
    "group_norm_quantize given",
    "int4_conv2d upsample",
    "int4_conv2d statistics",
    "int8_attention chunks",
    "int8_attention_quantize chunks",
    "int8_attention_quantize given",
    "attention_quantize chunks",
]


def as_tuple(result):
    return result if isinstance(result, tuple) else (result,)


def assert_equal(result, expected):
    torch.testing.assert_close(as_tuple(result), as_tuple(expected), rtol=0, atol=0)


@pytest.mark.parametrize(("op", "dtype"), list(zip(OPERATORS, itertools.cycle(DTYPES))), ids=str)
def test_registration_passes_opcheck(make, op, dtype):
    torch.library.opcheck(getattr(torch.ops.dq_kernels, op).default, (), make(op, dtype))


@pytest.mark.parametrize("variant", VARIANTS)
def test_registration_passes_opcheck_with_other_arguments(variants, variant):
    torch.library.opcheck(getattr(torch.ops.dq_kernels, variant.split()[0]).default, (), variants[variant])


def assert_meta_tensors_give_what_real_ones_give(op, arguments, to_device):
    real = as_tuple(getattr(ops, op)(**arguments))
    fake = as_tuple(getattr(ops, op)(**to_device(arguments, "meta")))

    assert {part.device.type for part in fake} == {"meta"}
    for one, other in zip(fake, real, strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPERATORS)
def test_meta_tensors_give_the_shape_dtype_and_strides_of_real_ones(make, to_device, op, dtype):
    assert_meta_tensors_give_what_real_ones_give(op, make(op, dtype), to_device)


@pytest.mark.parametrize("variant", VARIANTS)
def test_meta_tensors_give_the_shapes_of_real_ones_with_other_arguments(variants, to_device, variant):
    assert_meta_tensors_give_what_real_ones_give(variant.split()[0], variants[variant], to_device)


@pytest.mark.parametrize("op", WITH_TIMESTEPS)
def test_timestep_outside_the_tables_is_clamped_and_nothing_is_read_there(make, run, op):
    """The tables are views of a larger tensor, whose other values would change the result."""
    arguments = make(op, batch=4)
    for name in [name for name in arguments if name.endswith(("quantizer_scale", "quantizer_zero_point"))]:
        garbage = torch.nan if arguments[name].is_floating_point() else 2**20
        surrounded = torch.full((131,), garbage, dtype=arguments[name].dtype)
        surrounded[64:67] = arguments[name]
        arguments[name] = surrounded[64:67]
    indices = [name for name in arguments if name.endswith("timestep_index")]
    inside = arguments | dict.fromkeys(indices, torch.tensor([0, 2, 1, 2], dtype=torch.int32))
    outside = arguments | dict.fromkeys(indices, torch.tensor([0, 3, 1, 60], dtype=torch.int32))

    assert_equal(run(op, outside), run(op, inside))


def test_layer_norm_takes_any_strides(make, strided_view):
    image = torch.randn(4, 6, 7, 9, generator=torch.Generator().manual_seed(0))
    x = strided_view(image)[..., :6]
    arguments = make("layer_norm_quantize", batch=x.shape[0])

    assert_equal(
        ops.layer_norm_quantize(**arguments | {"x": x}), ops.layer_norm_quantize(**arguments | {"x": x.contiguous()})
    )


def test_block_of_all_operators_compiles_without_graph_breaks_to_the_same_result(make, variants):
    """As in a UNet's block: norm, convolution, norm with the convolution's statistics, linear layers and attention."""
    images = make("quantize", size=(8, 16)) | {"padding": (1, 1)}
    conv = variants["int4_conv2d statistics"]
    norm = without_optional("group_norm_quantize", make("group_norm_quantize")) | {"num_groups": 2, "padding": (0, 0)}
    norm |= {name: norm[name][:4] for name in ("norm_weight", "norm_bias", "quantizer_dilation")}
    narrow, wide = without_optional("int4_linear", make("int4_linear")), make("int4_geglu_quantize")
    narrow |= {name: norm[name] for name in ("quantizer_scale", "quantizer_zero_point", "quantizer_timestep_index")}
    layer_norm, attention = make("layer_norm_quantize"), make("int8_attention_quantize")

    def block(x):
        q = ops.quantize(**images | {"x": x})
        q = q[..., :6].contiguous()
        y, statistics = ops.int4_conv2d(**conv | {"x": q, "residual": None})
        q, _ = ops.group_norm_quantize(**norm | {"x": y, "statistics": statistics})
        q = torch.nn.functional.pad(q.flatten(1, 2), (0, 2))
        tokens = ops.int4_linear(**narrow | {"x": q})
        tokens = torch.cat([tokens, tokens[..., :2]], dim=-1)
        tokens = tokens + ops.int8_attention(tokens, tokens, tokens, 2)
        q = ops.layer_norm_quantize(**layer_norm | {"x": tokens})
        attended = ops.int8_attention_quantize(**attention | dict.fromkeys(("query", "key", "value"), tokens))
        return ops.int4_geglu_quantize(**wide | {"x": q}), attended, y, statistics

    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")

    assert_equal(compiled(images["x"]), block(images["x"]))


@pytest.mark.parametrize("op", OPERATORS)
def test_one_compilation_serves_every_batch_and_image_size(make, op):
    torch.compiler.reset()
    compiled = torch.compile(getattr(ops, op), fullgraph=True, dynamic=True, backend="aot_eager")
    compiled(**make(op, batch=7, size=(17, 23)))  # different sizes: torch assumes that equal ones stay equal

    with torch.compiler.set_stance("fail_on_recompile"):
        for batch, size in [(2, (5, 7)), (5, (9, 8))]:
            arguments = make(op, batch=batch, size=size)
            assert_equal(compiled(**arguments), getattr(ops, op)(**arguments))


def strided(tensor):
    """The same values, with a stride of 2 in memory."""
    return torch.stack([tensor, torch.zeros_like(tensor)], dim=-1)[..., 0]


GEMMS = ("int4_linear", "int4_geglu_quantize", "int4_conv2d")
QUANTIZERS = ("quantize", "layer_norm_quantize", "group_norm_quantize")
ATTENTION = ("int8_attention", "int8_attention_quantize", "attention_quantize")
DILATING = (*QUANTIZERS, *ATTENTION[1:])


def each(ops, name, expected, change):
    return [(op, name, expected, change) for op in ops]


def of(op, name, expected, change):
    return [(op, name, expected, change)]


# (operator, argument, expectation that the message must state, change that makes a valid argument bad)
BAD_ARGUMENTS = {
    # tables and indices
    "quantizer_scale-float16": each(WITH_TIMESTEPS, "quantizer_scale", "float32", lambda t: t.half()),
    "quantizer_scale-column": each(WITH_TIMESTEPS, "quantizer_scale", r"\[T\]", lambda t: t[:, None]),
    "quantizer_scale-strided": each(WITH_TIMESTEPS, "quantizer_scale", "contiguous", strided),
    "quantizer_zero_point-int64": each(WITH_TIMESTEPS, "quantizer_zero_point", "int32", lambda t: t.long()),
    "quantizer_zero_point-shorter-than-act_scale": each(
        WITH_TIMESTEPS, "quantizer_zero_point", r"\[3\]", lambda t: t[:2]
    ),
    "quantizer_zero_point-strided": each(WITH_TIMESTEPS, "quantizer_zero_point", "contiguous", strided),
    "quantizer_timestep_index-int64": each(WITH_TIMESTEPS, "quantizer_timestep_index", "int32", lambda t: t.long()),
    "quantizer_timestep_index-too-long": each(
        WITH_TIMESTEPS, "quantizer_timestep_index", r"\[3\]", lambda t: t.repeat(2)
    ),
    "quantizer_timestep_index-one-for-all": each(WITH_TIMESTEPS, "quantizer_timestep_index", r"\[3\]", lambda t: t[:1]),
    "quantizer_timestep_index-scalar": each(WITH_TIMESTEPS, "quantizer_timestep_index", r"\[3\]", lambda t: t[0]),
    "quantizer_timestep_index-expanded": each(
        WITH_TIMESTEPS, "quantizer_timestep_index", "contiguous", lambda t: t[:1].expand(3)
    ),
    # quantizing operators
    "x-int8": each(QUANTIZERS, "x", "float", lambda t: t.to(torch.int8)),
    "x-float64": each(QUANTIZERS, "x", "float32", lambda t: t.double()),
    "x-without-channels": [
        *each(QUANTIZERS[:2], "x", r"\[B, ..., K\]", lambda t: t.flatten()),
        *of("group_norm_quantize", "x", r"\[B, H, W, K\]", lambda t: t[..., 0]),
    ],
    "quantizer_dilation-too-long": each(DILATING, "quantizer_dilation", r"\[(6|16)\]", lambda t: t.repeat(2)),
    "quantizer_dilation-scalar": each(DILATING, "quantizer_dilation", r"\[(6|16)\]", lambda t: t[0]),
    "quantizer_dilation-float16": each(DILATING, "quantizer_dilation", "float32", lambda t: t.half()),
    "quantizer_dilation-strided": each(DILATING, "quantizer_dilation", "contiguous", strided),
    "quantizer_bits-1": each(DILATING, "quantizer_bits", "2 to 8", lambda _: 1),
    "quantizer_bits-9": each(DILATING, "quantizer_bits", "2 to 8", lambda _: 9),
    "padding-negative": each(QUANTIZERS[::2], "padding", "not be negative", lambda _: (-1, 1)),
    "skip-of-other-samples": of("group_norm_quantize", "skip", r"\[3, 5, 7, K2\]", lambda t: t[:1]),
    "skip-of-other-size": of("group_norm_quantize", "skip", r"\[3, 5, 7, K2\]", lambda t: t[:, :, 1:]),
    "skip-int8": of("group_norm_quantize", "skip", "float", lambda t: t.to(torch.int8)),
    # norms
    "weight-of-other-channels": each(QUANTIZERS[1:], "norm_weight", r"\[(6|16)\]", lambda t: t[:4]),
    "weight-int32": each(QUANTIZERS[1:], "norm_weight", "float", lambda t: t.int()),
    "norms-bias-strided": each(QUANTIZERS[1:], "norm_bias", "contiguous", strided),
    "norms-bias-float64": each(QUANTIZERS[1:], "norm_bias", "float32", lambda t: t.double()),
    "channels-odd": [
        *of("layer_norm_quantize", "x", "channels must be even .* got 5", lambda t: t[..., :5]),
        *of("group_norm_quantize", "x", "15 channels must be even", lambda t: t[..., :5]),
    ],
    "channels-too-many": of("layer_norm_quantize", "x", "at most 8192, got 8194", lambda t: t.new_empty(3, 8194)),
    "num_groups-of-no-even-size": of("group_norm_quantize", "num_groups", "divide into 5 groups", lambda _: 5),
    "num_groups-0": of("group_norm_quantize", "num_groups", "divide into 0 groups", lambda _: 0),
    "statistics-of-cut-runs": of("group_norm_quantize", "statistics", "64 pixels", lambda _: torch.ones(3, 1, 2, 6)),
    "skip_statistics-of-cut-runs": of(
        "group_norm_quantize", "skip_statistics", "64 pixels", lambda _: torch.ones(3, 1, 2, 10)
    ),
    "plain_quantizer_dilation-too-long": of(
        "group_norm_quantize", "plain_quantizer_dilation", r"\[16\]", lambda t: t.repeat(2)
    ),
    "plain_quantizer_bits-9": of("group_norm_quantize", "plain_quantizer_bits", "bits must be 2 to 8", lambda _: 9),
    # operands
    "x-uint8": each(GEMMS, "x", "int8", lambda t: t.to(torch.uint8)),
    "x-float32": each(GEMMS, "x", "int8", lambda t: t.float()),
    "x-strided": each(GEMMS, "x", "contiguous", lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)),
    "x-of-other-channels": each(GEMMS, "x", "6 input channels", lambda t: t[..., :4].contiguous()),
    "x-without-samples": [
        *each(GEMMS[:2], "x", r"\[B, ..., K", lambda t: t[0, 0]),
        *of("int4_conv2d", "x", r"\[B, H, W, K", lambda t: t[0]),
    ],
    "weight-int8": each(GEMMS, "weight_values", "uint8", lambda t: t.view(torch.int8)),
    "weight-strided": each(GEMMS, "weight_values", "contiguous", strided),
    "weight-of-other-rank": [
        *each(GEMMS[:2], "weight_values", r"\[N, K", lambda t: t[:, None, None]),
        *of("int4_conv2d", "weight_values", r"\[N, KH, KW, K", lambda t: t[:, 0, 0].contiguous()),
    ],
    "weight_scale-float16": each(GEMMS, "weight_scale", "float32", lambda t: t.half()),
    "weight_scale-per-tensor": each(GEMMS, "weight_scale", r"\[(4|8)\]", lambda t: t[:1]),
    "weight_scale-strided": each(GEMMS, "weight_scale", "contiguous", strided),
    "weight_sum-int64": each(GEMMS, "weight_sum", "int32", lambda t: t.long()),
    "weight_sum-too-short": each(GEMMS, "weight_sum", r"\[(4|8)\]", lambda t: t[:3]),
    "weight_sum-strided": each(GEMMS, "weight_sum", "contiguous", strided),
    # the next layer's quantizer
    "next_quantizer_dilation-of-the-weights-rows": of(
        "int4_geglu_quantize", "next_quantizer_dilation", r"\[4\]", lambda t: t.repeat(2)
    ),
    "next_quantizer_dilation-of-other-channels": of(
        "int4_linear", "next_quantizer_dilation", r"\[4\]", lambda t: t[:3]
    ),
    "next_quantizer_dilation-float16": of(
        "int4_geglu_quantize", "next_quantizer_dilation", "float32", lambda t: t.half()
    ),
    "next_quantizer_scale-int32": of("int4_geglu_quantize", "next_quantizer_scale", "float32", lambda t: t.int()),
    "next_quantizer_scale-strided": of("int4_geglu_quantize", "next_quantizer_scale", "contiguous", strided),
    "next_quantizer_zero_point-int64": of(
        "int4_geglu_quantize", "next_quantizer_zero_point", "int32", lambda t: t.long()
    ),
    "next_quantizer_zero_point-of-other-timesteps": of(
        "int4_geglu_quantize", "next_quantizer_zero_point", r"\[3\]", lambda t: t[:2]
    ),
    "next_quantizer_bits-9": of("int4_geglu_quantize", "next_quantizer_bits", "bits must be 2 to 8", lambda _: 9),
    # addends
    "bias-too-short": each(GEMMS, "bias", r"\[(4|8)\]", lambda t: t[:3]),
    "bias-per-tensor": each(GEMMS, "bias", r"\[(4|8)\]", lambda t: t[:1]),
    "bias-int32": each(GEMMS, "bias", "float", lambda t: t.int()),
    "residual-of-one-sample": each(GEMMS[::2], "residual", r"\[3, ", lambda t: t[:1]),
    "residual-of-other-channels": each(GEMMS[::2], "residual", r", 4\]", lambda t: t[..., :1]),
    "residual-int32": each(GEMMS[::2], "residual", "float", lambda t: t.int()),
    "channel_add-per-channel": of("int4_conv2d", "channel_add", r"\[3, 4\]", lambda t: t[0]),
    "channel_add-of-one-sample": of("int4_conv2d", "channel_add", r"\[3, 4\]", lambda t: t[:1]),
    "channel_add-int32": of("int4_conv2d", "channel_add", "float", lambda t: t.int()),
    # attention
    "heads-that-do-not-divide": each(
        ATTENTION, "heads", "6 channels must divide into 4 heads of 1 to (128|256)", lambda _: 4
    ),
    "heads-0": each(ATTENTION, "heads", "6 channels must divide into 0 heads", lambda _: 0),
    "heads-negative": each(ATTENTION, "heads", "6 channels must divide into -2 heads", lambda _: -2),
    **{
        f"{name}-{dtype}": each(
            ATTENTION, name, "float16 or torch.bfloat16 or torch.float32", lambda t, d=dtype: t.to(d)
        )
        for name in ("query", "key", "value")
        for dtype in (torch.int8, torch.float64)
    },
    "query-of-other-rank": each(ATTENTION, "query", r"\[B, L, H D\]", lambda t: t.unflatten(-1, (2, 3))),
    "query-without-samples": each(ATTENTION, "query", r"\[B, L, H D\]", lambda t: t[0]),
    "key-of-one-sample": each(ATTENTION, "key", r"\[3, S, 6\]", lambda t: t[:1]),
    "key-of-other-channels": each(ATTENTION, "key", r"\[3, S, 6\]", lambda t: t[..., :4]),
    "key-of-one-head": each(ATTENTION, "key", r"\[3, S, 6\]", lambda t: t[..., :3]),
    "value-of-other-length": each(ATTENTION, "value", r"\[3, 7, 6\]", lambda t: t[:, 1:]),
    "value-of-one-sample": each(ATTENTION, "value", r"\[3, 7, 6\]", lambda t: t[:1]),
    "value-of-other-channels": each(ATTENTION, "value", r"\[3, 7, 6\]", lambda t: t[..., :4]),
    # others
    "out_dtype-int8": each(GEMMS[::2], "out_dtype", "float16, bfloat16 or float32", lambda _: torch.int8),
    "out_dtype-float64": each(GEMMS[::2], "out_dtype", "float16, bfloat16 or float32", lambda _: torch.float64),
    "image-smaller-than-the-kernel": of(
        "int4_conv2d", "dilation", r"image of \[7, 9\] .*kernel \[3, 3\]", lambda _: (4, 1)
    ),
    "stride-0": of("int4_conv2d", "stride", "at least 1", lambda _: (0, 1)),
    "dilation-0": of("int4_conv2d", "dilation", "at least 1", lambda _: (1, 0)),
    "upsample-of-stride-2": of("int4_conv2d", "upsample", "upsampling takes .* stride", lambda _: True),
}


@pytest.mark.parametrize(
    ("op", "name", "expected", "change"),
    [pytest.param(*case, id=f"{case[0]}-{id}") for id, cases in BAD_ARGUMENTS.items() for case in cases],
)
def test_bad_argument_is_refused_by_name_with_what_was_expected(make, op, name, expected, change):
    arguments = make(op)
    changed = arguments | {name: change(arguments[name])}

    with pytest.raises(ValueError, match=f"^{op}: .*({expected})") as error:
        getattr(ops, op)(**changed)

    # Channels, images and statistics concern several arguments; the message names the quantity that does not fit.
    record, _, field = name.rpartition("_")
    words = (name, f"{record}.{field}", name.replace("quantizer_", "quantizer."))
    assert any(word in str(error.value) for word in (*words, "image", "channels", "upsampling", "statistics"))


def refused(op, expected, arguments):
    with pytest.raises(ValueError, match=f"^{op}: .*({expected})"):
        getattr(ops, op)(**arguments)


@pytest.mark.parametrize("x_shape", [(3, 4), (3, 5, 4)], ids=str)
def test_only_images_are_padded(make, x_shape):
    arguments = without_optional("quantize", make("quantize"))
    arguments |= {"x": torch.zeros(x_shape), "quantizer_dilation": torch.ones(4)}

    refused("quantize", r"padding .* only an image \[B, H, W, K\]", arguments)


@pytest.mark.parametrize("op", ATTENTION)
def test_attention_to_no_token_is_refused(make, op):
    arguments = make(op)

    refused(
        op, r"key \[3, 0, 6\] has no token", arguments | {name: arguments[name][:, :0] for name in ("key", "value")}
    )


@pytest.mark.parametrize("op", ATTENTION)
def test_attention_with_too_large_heads_is_refused(make, op):
    arguments = make(op)
    wide = {name: arguments[name].repeat(1, 1, 86) for name in ("query", "key", "value")}

    refused(op, "516 channels must divide into 2 heads of 1 to (128|256)", arguments | wide)


def test_floating_point_attention_to_many_keys_is_refused(make):
    arguments = make("attention_quantize")
    many = {name: arguments[name].repeat(1, 19, 1)[:, :129] for name in ("key", "value")}

    refused("attention_quantize", r"key \[3, 129, 6\] has more than 128 tokens", arguments | many)


@pytest.mark.parametrize("op", ATTENTION)
def test_attention_without_channels_is_refused(make, op):
    arguments = make(op)
    empty = {name: arguments[name][..., :0] for name in ("query", "key", "value")}

    refused(op, "0 channels must divide into 2 heads of 1 to (128|256)", arguments | empty)


@pytest.mark.parametrize("op", ATTENTION[1:])
def test_odd_number_of_quantized_attentions_channels_is_refused(make, op):
    arguments = make(op)
    odd = {name: arguments[name][..., :3] for name in ("query", "key", "value")}
    odd |= {"heads": 1, "quantizer_dilation": arguments["quantizer_dilation"][:3]}

    refused(op, "channels must be even, got 3", arguments | odd)
    assert ops.int8_attention(*(odd[name] for name in ("query", "key", "value", "heads"))).shape == (3, 5, 3)


@pytest.mark.parametrize(("name", "shape"), [("statistics", (3, 2, 2, 6)), ("skip_statistics", (3, 2, 2, 10))])
@pytest.mark.parametrize("change", [lambda t: t.half(), lambda t: t[:, :1], lambda t: t[..., :4], strided])
def test_statistics_that_do_not_fit_are_refused(variants, name, shape, change):
    arguments = variants["group_norm_quantize given"]
    assert arguments[name].shape == shape

    refused(
        "group_norm_quantize", f"{name} must be contiguous torch.float32", arguments | {name: change(arguments[name])}
    )


@pytest.mark.parametrize("change", [lambda t: t.half(), lambda t: t[:, :1], lambda t: t[..., :6]])
def test_statistics_that_are_not_of_the_keys_and_values_are_refused(variants, change):
    arguments = variants["int8_attention_quantize given"]

    refused(
        "int8_attention_quantize", r"statistics must be torch.float32 \[3, 2, 2, 12\]",
        arguments | {"statistics": change(arguments["statistics"])},
    )  # fmt: skip


def test_statistics_of_a_part_of_the_keys_are_refused(variants):
    arguments = variants["int8_attention_quantize given"]
    fewer = {name: arguments[name][:, :127] for name in ("key", "value")}

    refused("int8_attention_quantize", "whole runs of 64 keys", arguments | fewer)


def test_statistics_of_no_skip_are_refused(variants):
    arguments = without_optional("group_norm_quantize", variants["group_norm_quantize given"])

    refused("group_norm_quantize", "without a skip", arguments | {"skip_statistics": torch.ones(3, 2, 2, 10)})


@pytest.mark.parametrize("kernel", [(1, 1), (3, 1), (5, 5)], ids=str)
def test_upsampling_for_another_kernel_is_refused(conv2d_arguments, kernel):
    arguments, _ = conv2d_arguments((3, 5, 7, 6), 4, kernel, padding=(2, 2))

    refused("int4_conv2d", "upsampling takes a 3x3 kernel", arguments | {"upsample": True})


def test_upsampling_without_a_border_is_refused(conv2d_arguments):
    arguments, _ = conv2d_arguments((3, 2, 7, 6), 4, padding=(0, 0))

    refused("int4_conv2d", "border of 1", arguments | {"upsample": True})


@pytest.mark.parametrize("rows", [6, 7])
def test_odd_number_of_requantized_channels_is_refused(make, linear_arguments, rows):
    weight = linear_arguments((3, 5, 6), rows, torch.float32)[0]
    names = ("weight_values", "weight_scale", "weight_sum", "bias")

    refused(
        "int4_geglu_quantize",
        f"half of the weight's {rows} output channels must be an even number",
        make("int4_geglu_quantize") | {name: weight[name] for name in names},
    )
    if rows % 2:
        refused(
            "int4_linear",
            f"the {rows} output channels must be an even number to be quantized",
            make("int4_linear") | {"residual": None} | {name: weight[name] for name in names},
        )


@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("int4_linear", "next_quantizer"),
        ("int4_geglu_quantize", "next_quantizer"),
        ("group_norm_quantize", "plain_quantizer"),
    ],
)
def test_another_quantizer_with_other_timesteps_is_refused(make, op, name):
    arguments = make(op)
    arguments |= {f"{name}_{table}": arguments[f"{name}_{table}"][:2] for table in ("scale", "zero_point")}

    refused(op, f"{name}.scale has 2 timesteps, quantizer.scale 3", arguments)


@pytest.mark.parametrize("op", QUANTIZERS)
def test_sample_with_more_elements_than_int32_counts_is_refused(make, to_device, op):
    arguments = to_device(without_optional(op, make(op)), "meta")
    channels = arguments["x"].shape[-1]

    refused(
        op,
        r"a sample of x .* 2\^31 elements or more",
        arguments | {"x": torch.empty(3, 2**15, 2**16, channels, device="meta")},
    )


@pytest.mark.parametrize("name", ["query", "key"])
@pytest.mark.parametrize("op", ATTENTION)
def test_attention_with_more_elements_than_int32_counts_is_refused(make, to_device, op, name):
    arguments = to_device(make(op), "meta") | {name: torch.empty(3, 2**29, 6, device="meta")}

    refused(op, rf"a sample of {name} .* 2\^31 elements or more", arguments)


@pytest.mark.parametrize(
    ("op", "size"), [("int4_linear", (2**15,)), ("int4_geglu_quantize", (2**15,)), ("int4_conv2d", (2**8, 2**8))]
)
def test_result_with_more_elements_than_int32_counts_is_refused(make, to_device, op, size):
    out_channels = 2**16
    arguments = without_optional(op, make(op))
    arguments["x"] = torch.empty(3, *size, 6, dtype=torch.int8)
    for name in ("weight_values", "weight_scale", "weight_sum"):
        arguments[name] = arguments[name][:1].expand(out_channels, *arguments[name].shape[1:]).clone()

    refused(op, r"2\^31 elements or more; split the batch", to_device(arguments, "meta"))


@pytest.mark.cuda
@pytest.mark.parametrize("op", OPERATORS)
def test_gpu_gives_what_the_cpu_gives(make, to_device, relative_rms, op):
    arguments = make(op)

    y, *_ = as_tuple(getattr(ops, op)(**to_device(arguments, "cuda")))

    expected, *_ = as_tuple(getattr(ops, op)(**arguments))
    assert y.is_cuda
    if y.is_floating_point():
        # One probability at a rounding boundary is 1/255 of itself in attention.
        assert relative_rms(y.cpu(), expected) < (1e-3 if op == "int8_attention" else 1e-6)
    else:
        assert (y.cpu().int() - expected.int()).abs().max() <= 1


@pytest.mark.cuda
@pytest.mark.parametrize("op", OPERATORS)
def test_gpu_result_replays_in_a_cuda_graph_with_new_timesteps(make, to_device, op):
    """Capture fails on any synchronisation; a timestep that the host has read would be constant in the graph."""
    arguments = to_device(make(op), "cuda")
    getattr(ops, op)(**arguments)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = getattr(ops, op)(**arguments)
    if op in WITH_TIMESTEPS:
        for name in [name for name in arguments if name.endswith("timestep_index")]:
            arguments[name].copy_(torch.tensor([0, 0, 2]))

    for _ in range(2):
        graph.replay()

        assert_equal(y, getattr(ops, op)(**arguments))


@pytest.mark.cuda
@pytest.mark.parametrize("split_k", [2, 5])
def test_gpu_replays_a_split_sum_in_a_cuda_graph(make, to_device, use_config, split_k):
    """A captured launch has counters of its own, which it leaves zero for the next replay."""
    use_config(LaunchConfig(16, 16, 32, 4, 2, 1, split_k))
    arguments = to_device(without_optional("int4_conv2d", make("int4_conv2d")), "cuda")
    expected = ops.int4_conv2d(**arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.int4_conv2d(**arguments)

    for _ in range(3):
        y[0].zero_()
        graph.replay()

        assert_equal(y, expected)


@pytest.mark.cuda
def test_gpu_takes_a_residual_of_any_strides(make, to_device, relative_rms):
    arguments = make("int4_conv2d")
    expected, _ = ops.int4_conv2d(**arguments)
    arguments = to_device(arguments, "cuda")
    for name in ("residual", "channel_add"):
        arguments[name] = arguments[name].transpose(0, -1).contiguous().transpose(0, -1)

    assert relative_rms(ops.int4_conv2d(**arguments)[0].cpu(), expected) < 1e-6


def test_statistics_of_runs_that_would_not_be_whole_are_empty(conv2d_arguments):
    arguments, _ = conv2d_arguments((2, 6, 7, 8), 16)

    y, statistics = ops.int4_conv2d(**arguments | {"with_statistics": True})

    assert y.shape[1] * y.shape[2] % ops.STATISTICS_ROWS
    assert statistics.shape == (0, 0, 2, 16)


@pytest.mark.parametrize("op", ["quantize", "group_norm_quantize"])
def test_padding_that_makes_more_elements_than_int32_counts_is_refused(make, to_device, op):
    arguments = to_device(without_optional(op, make(op)), "meta")
    channels = arguments["x"].shape[-1]
    image = torch.empty(3, 2**10, 2**10, channels, device="meta")

    refused(
        op, r"a sample of the result .* 2\^31 elements or more", arguments | {"x": image, "padding": (2**14, 2**14)}
    )


@pytest.mark.parametrize("op", ["quantize", "group_norm_quantize", *ATTENTION])
def test_more_samples_than_a_launch_takes_are_refused(make, to_device, op):
    arguments = to_device(without_optional(op, make(op)), "meta")
    for name in ("x", "query", "key", "value", "quantizer_timestep_index"):
        if name in arguments:
            arguments[name] = arguments[name][:1].expand(2**16, *arguments[name].shape[1:]).contiguous()

    refused(op, "at most 65535 samples are launched at a time, got 65536", arguments)


@pytest.mark.parametrize("op", GEMMS)
def test_sum_that_may_exceed_int32_is_refused(make, to_device, op):
    """16 q_w (q_x - zero_point) is at most 32640: 65793 such products fit into int32, 65794 do not."""
    arguments = to_device(without_optional(op, make(op)), "meta")
    taps = arguments["weight_values"].shape[1:-1]
    fits = 2 * (65793 // (2 * taps.numel()))
    assert 32640 * fits * taps.numel() < 2**31 <= 32640 * (fits + 2) * taps.numel()

    def of_channels(channels):
        weight = torch.empty(*arguments["weight_values"].shape[:-1], channels // 2, dtype=torch.uint8, device="meta")
        x = torch.empty(*arguments["x"].shape[:-1], channels, dtype=torch.int8, device="meta")
        return arguments | {"x": x, "weight_values": weight}

    getattr(ops, op)(**of_channels(fits))
    refused(op, "may exceed int32; at most 65793 fit", of_channels(fits + 2))
