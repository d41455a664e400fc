"""The registered operators: what PyTorch's dispatcher and compiler ask of them, and what they refuse."""

import pytest
import torch

from dq_kernels import ops


@pytest.fixture
def make(linear_arguments, conv2d_arguments):
    """Makes valid arguments of an operator, small, with every optional one present."""

    def make(op, dtype=torch.float32, batch=3, size=(5, 7)):
        if op == "int4_linear":
            arguments, _ = linear_arguments((batch, size[0], 6), 4, dtype)
        elif op == "int4_conv2d":
            arguments, _ = conv2d_arguments((batch, *size, 6), 4, stride=(2, 1), dtype=dtype)
        else:
            arguments, _ = linear_arguments((batch, 6), 4, dtype)
            arguments = {key: arguments[key] for key in ("act_scale", "act_zero_point", "timestep_index")}
            x = torch.randn(batch, *size, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
            arguments = {"x": x, "weight_dilation": torch.linspace(1, 3, 5), **arguments, "bits": 8}
        return arguments

    return make


OPERATORS = ("quantize", "int4_linear", "int4_conv2d")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OPTIONAL = ("bias", "residual", "channel_add")


def to_device(arguments, device):
    return {key: value.to(device) if torch.is_tensor(value) else value for key, value in arguments.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPERATORS)
def test_registration_passes_opcheck(make, op, dtype):
    torch.library.opcheck(getattr(torch.ops.dq_kernels, op).default, (), make(op, dtype))


@pytest.mark.parametrize("op", ["int4_linear", "int4_conv2d"])
def test_registration_passes_opcheck_without_optional_arguments(make, op):
    arguments = make(op) | dict.fromkeys(OPTIONAL if op == "int4_conv2d" else OPTIONAL[:2])

    torch.library.opcheck(getattr(torch.ops.dq_kernels, op).default, (), arguments)


def test_registration_of_quantize_passes_opcheck_for_nchw_strides(make):
    arguments = make("quantize")
    arguments["x"] = arguments["x"].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)

    torch.library.opcheck(torch.ops.dq_kernels.quantize.default, (), arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPERATORS)
def test_meta_tensors_give_the_shape_dtype_and_strides_of_real_ones(make, op, dtype):
    arguments = make(op, dtype)
    real = getattr(ops, op)(**arguments)

    fake = getattr(ops, op)(**to_device(arguments, "meta"))

    assert fake.device.type == "meta"
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize("op", OPERATORS)
def test_compiles_without_graph_breaks_to_the_same_result(make, op):
    arguments = make(op)
    torch.compiler.reset()

    compiled = torch.compile(getattr(ops, op), fullgraph=True, backend="aot_eager")

    assert torch.equal(compiled(**arguments), getattr(ops, op)(**arguments))


@pytest.mark.parametrize("op", OPERATORS)
def test_one_compilation_serves_every_batch_and_image_size(make, op):
    torch.compiler.reset()
    compiled = torch.compile(getattr(ops, op), fullgraph=True, dynamic=True, backend="aot_eager")
    compiled(**make(op, batch=7, size=(17, 23)))  # sizes unlike each other: torch takes equal ones to be so for ever

    with torch.compiler.set_stance("fail_on_recompile"):
        for batch, size in [(2, (5, 7)), (4, (9, 8)), (5, (8, 11))]:
            arguments = make(op, batch=batch, size=size)
            assert torch.equal(compiled(**arguments), getattr(ops, op)(**arguments))


def strided(tensor):
    """The same numbers, every other one in memory."""
    return torch.stack([tensor, torch.zeros_like(tensor)], dim=-1)[..., 0]


def both(name, expected, change):
    return [(op, name, expected, change) for op in ("int4_linear", "int4_conv2d")]


def every(name, expected, change):
    return [(op, name, expected, change) for op in OPERATORS]


# (operator, argument, what the message must say was expected, how a valid argument is spoilt)
BAD_ARGUMENTS = {
    # tables and indices
    "act_scale-float16": every("act_scale", "float32", lambda t: t.half()),
    "act_scale-column": every("act_scale", r"\[T\]", lambda t: t[:, None]),
    "act_scale-strided": every("act_scale", "contiguous", strided),
    "act_zero_point-int64": every("act_zero_point", "int32", lambda t: t.long()),
    "act_zero_point-shorter-than-act_scale": every("act_zero_point", r"\[3\]", lambda t: t[:2]),
    "act_zero_point-strided": every("act_zero_point", "contiguous", strided),
    "timestep_index-int64": every("timestep_index", "int32", lambda t: t.long()),
    "timestep_index-too-long": every("timestep_index", r"\[3\]", lambda t: t.repeat(2)),
    "timestep_index-one-for-all": every("timestep_index", r"\[3\]", lambda t: t[:1]),
    "timestep_index-scalar": every("timestep_index", r"\[3\]", lambda t: t[0]),
    "timestep_index-expanded": every("timestep_index", "contiguous", lambda t: t[:1].expand(3)),
    # quantize
    "x-int8": [("quantize", "x", "float", lambda t: t.to(torch.int8))],
    "x-float64": [("quantize", "x", "float32", lambda t: t.double())],
    "x-without-channels": [("quantize", "x", r"\[B, ..., K\]", lambda t: t[:, 0, 0, 0])],
    "weight_dilation-too-long": [("quantize", "weight_dilation", r"\[5\]|5 channels", lambda t: t.repeat(2))],
    "weight_dilation-scalar": [("quantize", "weight_dilation", r"\[5\]|5 channels", lambda t: t[0])],
    "weight_dilation-float16": [("quantize", "weight_dilation", "float32", lambda t: t.half())],
    "weight_dilation-strided": [("quantize", "weight_dilation", "contiguous", strided)],
    "bits-1": [("quantize", "bits", "2 to 8", lambda _: 1)],
    "bits-9": [("quantize", "bits", "2 to 8", lambda _: 9)],
    # operands
    "x-uint8": both("x", "int8", lambda t: t.to(torch.uint8)),
    "x-float32": both("x", "int8", lambda t: t.float()),
    "x-strided": both("x", "contiguous", lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)),
    "x-of-other-channels": both("x", "6 input channels", lambda t: t[..., :4].contiguous()),
    "x-without-samples": [
        ("int4_linear", "x", r"\[B, ..., K", lambda t: t[0, 0]),
        ("int4_conv2d", "x", r"\[B, H, W, K", lambda t: t[0]),
    ],
    "weight-int8": both("weight", "uint8", lambda t: t.view(torch.int8)),
    "weight-strided": both("weight", "contiguous", strided),
    "weight-of-other-rank": [
        ("int4_linear", "weight", r"\[N, K", lambda t: t[:, None, None]),
        ("int4_conv2d", "weight", r"\[N, KH, KW, K", lambda t: t[:, 0, 0].contiguous()),
    ],
    "weight_scale-float16": both("weight_scale", "float32", lambda t: t.half()),
    "weight_scale-per-tensor": both("weight_scale", r"\[4\]", lambda t: t[:1]),
    "weight_scale-strided": both("weight_scale", "contiguous", strided),
    "weight_sum-int64": both("weight_sum", "int32", lambda t: t.long()),
    "weight_sum-too-short": both("weight_sum", r"\[4\]", lambda t: t[:3]),
    "weight_sum-strided": both("weight_sum", "contiguous", strided),
    # addends
    "bias-too-short": both("bias", r"\[4\]", lambda t: t[:3]),
    "bias-per-tensor": both("bias", r"\[4\]", lambda t: t[:1]),
    "bias-int32": both("bias", "float", lambda t: t.int()),
    "residual-of-one-sample": both("residual", r"\[3, ", lambda t: t[:1]),
    "residual-of-other-channels": both("residual", r", 4\]", lambda t: t[..., :1]),
    "residual-int32": both("residual", "float", lambda t: t.int()),
    "channel_add-per-channel": [("int4_conv2d", "channel_add", r"\[3, 4\]", lambda t: t[0])],
    "channel_add-of-one-sample": [("int4_conv2d", "channel_add", r"\[3, 4\]", lambda t: t[:1])],
    "channel_add-int32": [("int4_conv2d", "channel_add", "float", lambda t: t.int())],
    # the rest
    "out_dtype-int8": both("out_dtype", "float16, bfloat16 or float32", lambda _: torch.int8),
    "out_dtype-float64": both("out_dtype", "float16, bfloat16 or float32", lambda _: torch.float64),
    "image-smaller-than-the-kernel": [
        ("int4_conv2d", "dilation", r"image of \[5, 7\] .*kernel \[3, 3\]", lambda _: (4, 1))
    ],
    "stride-0": [("int4_conv2d", "stride", "at least 1", lambda _: (0, 1))],
    "dilation-0": [("int4_conv2d", "dilation", "at least 1", lambda _: (1, 0))],
    "padding-negative": [("int4_conv2d", "padding", "at least 0", lambda _: (-1, 1))],
}


@pytest.mark.parametrize(
    ("op", "name", "expected", "change"),
    [pytest.param(*case, id=f"{case[0]}-{id}") for id, cases in BAD_ARGUMENTS.items() for case in cases],
)
def test_bad_argument_is_refused_by_name_with_what_was_expected(make, op, name, expected, change):
    arguments = make(op)
    spoilt = arguments | {name: change(arguments[name])}

    with pytest.raises(ValueError, match=f"^{op}: .*({expected})") as error:
        getattr(ops, op)(**spoilt)

    assert name in str(error.value) or "image" in str(error.value)


@pytest.mark.parametrize(("op", "size"), [("int4_linear", (2**15,)), ("int4_conv2d", (2**8, 2**8))])
def test_result_with_more_elements_than_int32_counts_is_refused(make, op, size):
    out_channels = 2**16
    arguments = make(op) | dict.fromkeys(OPTIONAL if op == "int4_conv2d" else OPTIONAL[:2])
    arguments["x"] = torch.empty(3, *size, 6, dtype=torch.int8)
    for name in ("weight", "weight_scale", "weight_sum"):
        arguments[name] = arguments[name][:1].expand(out_channels, *arguments[name].shape[1:]).clone()

    with pytest.raises(ValueError, match=rf"^{op}: .*2\^31 elements or more; split the batch"):
        getattr(ops, op)(**to_device(arguments, "meta"))


@pytest.mark.cuda
@pytest.mark.parametrize("op", OPERATORS)
def test_gpu_gives_what_the_cpu_gives(make, relative_rms, op):
    arguments = make(op)

    y = getattr(ops, op)(**to_device(arguments, "cuda"))

    assert y.is_cuda
    assert relative_rms(y.cpu(), getattr(ops, op)(**arguments)) < (1e-6 if y.is_floating_point() else 1e-12)


@pytest.mark.cuda
@pytest.mark.parametrize("op", OPERATORS)
def test_gpu_result_replays_in_a_cuda_graph_with_new_timesteps(make, op):
    """Capture fails on any synchronisation; a timestep read by the host would be frozen in the graph."""
    arguments = to_device(make(op), "cuda")
    getattr(ops, op)(**arguments)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = getattr(ops, op)(**arguments)
    arguments["timestep_index"].copy_(torch.tensor([0, 0, 2]))

    graph.replay()

    assert torch.equal(y, getattr(ops, op)(**arguments))


@pytest.mark.cuda
def test_gpu_takes_a_residual_of_any_strides(make, relative_rms):
    arguments = make("int4_conv2d")
    expected = ops.int4_conv2d(**arguments)
    arguments = to_device(arguments, "cuda")
    for name in ("residual", "channel_add"):
        arguments[name] = arguments[name].transpose(0, -1).contiguous().transpose(0, -1)

    assert relative_rms(ops.int4_conv2d(**arguments).cpu(), expected) < 1e-6
