"""NaN and infinity, which int8 does not hold: operators mark the sample in the timestep index; GEMMs make it NaN."""

import pytest
import torch
from flat_operators import ops, reference, triton

BAD = [torch.nan, -torch.inf]
BATCH, SICK = 3, 1
INDEX = torch.tensor([2, 1, 0], dtype=torch.int32)
# Each operator that quantizes floats, with the arguments that it quantizes or normalizes.
QUANTIZING = {
    "quantize": ["x"],
    "layer_norm_quantize": ["x"],
    "group_norm_quantize": ["x", "skip"],
    "attention_quantize": ["query", "key", "value"],
    "int8_attention_quantize": ["query", "key", "value"],
}
CASES = [(op, name) for op, names in QUANTIZING.items() for name in names]
MULTIPLYING = ["int4_linear", "int4_conv2d"]


@pytest.fixture
def make(
    layer_norm_arguments, group_norm_arguments, attention_quantize_arguments, linear_arguments, conv2d_arguments,
    geglu_quantize_arguments, quantizer_arguments,
):  # fmt: skip
    """Makes arguments of an operator for ``BATCH`` samples of several timesteps; all quantizers share the index."""

    def make(op, dtype=torch.float32):
        if op == "quantize":
            x = torch.randn(BATCH, 5, 7, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
            arguments = {"x": x, **quantizer_arguments(BATCH, 6), "padding": (1, 1)}
        elif op == "layer_norm_quantize":
            arguments = layer_norm_arguments((BATCH, 5, 6), dtype)
        elif op == "group_norm_quantize":
            arguments = group_norm_arguments((BATCH, 5, 7, 6), 4, 10, dtype, padding=(1, 1), with_plain=True)
        elif op == "int4_linear":
            arguments = linear_arguments((BATCH, 5, 6), 4, dtype)[0]
        elif op == "int4_geglu_quantize":
            arguments = geglu_quantize_arguments((BATCH, 5, 6), 4, dtype)[0]
        elif op == "int4_conv2d":
            arguments = conv2d_arguments((BATCH, 8, 8, 6), 4, with_statistics=True, dtype=dtype)[0]
        else:
            arguments = attention_quantize_arguments(BATCH, 5, 7, 2, 4, dtype=dtype)
        return with_index(arguments, INDEX)

    return make


def with_index(arguments, index):
    index = index.clone()
    return arguments | {
        name: index for name, value in arguments.items() if name.endswith("index") and value is not None
    }


def marked(*samples):
    """The index with these samples marked, as the CPU's operators do: on GPUs any negative number serves."""
    index = INDEX.clone()
    index[list(samples)] = ~index[list(samples)]
    return index


def is_marked(index, *samples):
    """True if the index is as before, but for these samples, whose are negative."""
    expected = INDEX.clone()
    expected[list(samples)] = -1
    return torch.equal(index.clamp(min=-1), expected)


def as_tuple(result):
    return result if isinstance(result, tuple) else (result,)


def assert_others_equal(result, expected):
    others = [sample for sample in range(BATCH) if sample != SICK]
    for part, wanted in zip(as_tuple(result), as_tuple(expected), strict=True):
        assert torch.equal(part[others], wanted[others])


def with_value(arguments, name, value):
    """The middle element of one sample is replaced."""
    tensor = arguments[name].clone()
    tensor[SICK].view(-1)[tensor[SICK].numel() // 2] = value
    return arguments | {name: tensor}


@pytest.fixture
def run_and_index(implementation, triton_device, to_device):
    """Calls one implementation of an operator; returns the results and the timestep index after it, on the CPU."""

    def run_and_index(op, arguments):
        if implementation == "triton":
            arguments = to_device(arguments, triton_device)
        result = getattr(triton if implementation == "triton" else ops, op)(**arguments)
        return tuple(part.cpu() for part in as_tuple(result)), arguments["quantizer_timestep_index"].cpu()

    return run_and_index


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize(("op", "name"), CASES)
def test_sample_that_is_not_finite_is_marked_and_others_are_as_without_it(make, run_and_index, op, name, value):
    expected, index = run_and_index(op, make(op))
    assert torch.equal(index, INDEX)

    result, index = run_and_index(op, with_value(make(op), name, value))

    assert is_marked(index, SICK)
    assert_others_equal(result, expected)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize(("op", "name"), CASES)
def test_reference_marks_the_same_samples(make, op, name, value):
    arguments = with_value(make(op), name, value)

    getattr(reference, op)(**arguments)

    assert is_marked(arguments["quantizer_timestep_index"], SICK)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", ["quantize", "layer_norm_quantize", "group_norm_quantize"])
def test_infinity_of_a_narrow_dtype_is_marked_and_its_largest_number_is_not(make, run_and_index, op, dtype):
    largest = torch.finfo(dtype).max

    assert is_marked(run_and_index(op, with_value(make(op, dtype), "x", torch.inf))[1], SICK)
    if op == "quantize" or dtype == torch.float16:  # the variance of bfloat16's largest number overflows
        assert torch.equal(run_and_index(op, with_value(make(op, dtype), "x", largest))[1], INDEX)


@pytest.mark.parametrize("op", ["layer_norm_quantize", "group_norm_quantize"])
@pytest.mark.parametrize("parameter", ["norm_weight", "norm_bias"])
def test_parameter_of_a_norm_that_is_not_finite_marks_all_samples(make, run_and_index, op, parameter):
    arguments = make(op)
    arguments[parameter][2] = torch.nan

    assert is_marked(run_and_index(op, arguments)[1], 0, 1, 2)


def test_marks_of_many_tiles_and_rows_are_of_their_sample(layer_norm_arguments, run_and_index):
    """Programs of a layer norm hold rows of several samples."""
    arguments = with_index(layer_norm_arguments((BATCH, 33, 64)), INDEX)
    arguments["x"][SICK, 32, 63] = torch.nan

    assert is_marked(run_and_index("layer_norm_quantize", arguments)[1], SICK)


@pytest.mark.parametrize("op", MULTIPLYING)
def test_results_of_a_marked_sample_are_nan_and_others_are_as_without_it(make, run_and_index, op):
    expected, _ = run_and_index(op, make(op))

    result, index = run_and_index(op, with_index(make(op), marked(SICK)))

    assert is_marked(index, SICK)
    assert_others_equal(result, expected)
    assert all(part[SICK].isnan().all() for part in result)
    oracle = as_tuple(getattr(reference, op)(**with_index(make(op), marked(SICK))))
    assert all(part[SICK].isnan().all() for part in oracle)


@pytest.mark.parametrize("op", MULTIPLYING)
def test_the_only_sample_that_is_left_is_as_in_the_whole_batch(make, run_and_index, op):
    """On CPUs a batch of several timesteps is computed otherwise than one of a single timestep."""
    expected, _ = run_and_index(op, make(op))

    result, _ = run_and_index(op, with_index(make(op), marked(0, 1)))

    for part, wanted in zip(result, expected, strict=True):
        assert part[:2].isnan().all()
        assert torch.equal(part[2], wanted[2])


@pytest.mark.parametrize("op", ["int4_linear", "int4_geglu_quantize"])
def test_int8_results_keep_the_index_and_the_other_samples(make, quantizer_arguments, run_and_index, op):
    arguments = make(op)
    if op == "int4_linear":
        arguments |= {f"next_{name}": value for name, value in quantizer_arguments(BATCH, 4).items()}
    expected, _ = run_and_index(op, with_index(arguments, INDEX))

    result, index = run_and_index(op, with_index(arguments, marked(SICK)))

    assert is_marked(index, SICK)
    assert_others_equal(result, expected)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_int8_attention_is_not_finite_natively(attention_arguments, run, name, value):
    expected = run("int8_attention", attention_arguments(BATCH, 5, 7, 2, 4))

    result = run("int8_attention", with_value(attention_arguments(BATCH, 5, 7, 2, 4), name, value))

    assert not result[SICK].isfinite().all()
    assert_others_equal(result, expected)


def test_overflow_between_layers_is_marked_from_the_statistics_of_the_convolution(
    conv2d_arguments, group_norm_arguments, run_and_index
):
    """The largest finite sum becomes infinite in float16, of which the statistics are."""
    conv = with_index(conv2d_arguments((BATCH, 8, 8, 6), 4, with_statistics=True, dtype=torch.float16)[0], INDEX)
    conv["residual"][SICK, 3, 3, 0] = 65504
    conv["bias"] += 1000

    (image, statistics), index = run_and_index("int4_conv2d", conv)

    assert torch.equal(index, INDEX)
    assert image[SICK].isinf().sum() == 1
    norm = with_index(group_norm_arguments((BATCH, 8, 8, 4), 2, dtype=torch.float16), INDEX)
    assert is_marked(run_and_index("group_norm_quantize", norm | {"x": image, "statistics": statistics})[1], SICK)


def test_schemas_declare_the_index_that_operators_change():
    for op in QUANTIZING:
        arguments = getattr(torch.ops.dq_kernels, op).default._schema.arguments
        changed = [argument.name for argument in arguments if argument.alias_info and argument.alias_info.is_write]
        assert changed == ["quantizer_timestep_index"]
