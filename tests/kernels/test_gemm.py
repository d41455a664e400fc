"""The GEMM's launches: no configuration, tile order or split of the sum may change a result."""

import pytest
import torch
from flat_operators import reference

from dq_kernels.triton import gemm, tuning
from dq_kernels.triton.launch import launch_options
from dq_kernels.triton.tuning import LaunchConfig

pytestmark = pytest.mark.parametrize("implementation", ["triton"], indirect=True)

# On a GPU, what that GPU would launch; in the interpreter, everything that is shipped.
ARCHITECTURES = (
    [tuning.architecture()] if torch.cuda.is_available() else [path.stem for path in tuning.FOLDER.glob("*.json")]
)
SHIPPED = sorted(
    {(shape.op, shape.config) for architecture in ARCHITECTURES for shape in tuning.tuned_shapes(architecture)},
    key=str,
)
# Packed bytes a step: a GPU's int8 dot takes 32 at least, Triton's interpreter any number.
SMALLEST_K = 32 if torch.cuda.is_available() else 16
SMALL = LaunchConfig(16, 16, SMALLEST_K, 4, 2)


def small(**changes):
    return LaunchConfig(**vars(SMALL) | changes)


@pytest.fixture
def arguments_of(linear_arguments, geglu_quantize_arguments, conv2d_arguments):
    """Makes an operator's arguments for 3 samples of some 24 rows, 18 output channels and 38 input channels a tap."""

    def arguments_of(case):
        if case == "int4_linear":
            return linear_arguments((3, 5, 5, 38), 18, torch.float32)[0]
        if case == "int4_geglu_quantize":
            return geglu_quantize_arguments((3, 5, 5, 38), 18)[0]
        shape, geometry = (3, 5, 5, 38), {"kernel": (1, 3), "padding": (0, 1)}
        if case == "upsample":
            shape, geometry = (3, 2, 3, 6), {"upsample": True}
        elif case == "stride":
            shape, geometry = (3, 10, 10, 6), {"stride": (2, 2)}
        elif case == "statistics":
            shape, geometry = (3, 16, 4, 6), {"with_statistics": True}
        return conv2d_arguments(shape, 18, dtype=torch.float32, **geometry)[0]

    return arguments_of


OPERATORS = {
    **dict.fromkeys(("int4_conv2d", "stride", "upsample", "statistics"), "int4_conv2d"),
    "int4_linear": "int4_linear",
    "int4_geglu_quantize": "int4_geglu_quantize",
}


@pytest.fixture(scope="module")
def small_results():
    """Of SMALL, by case, kept because the interpreter is slow."""
    return {}


@pytest.fixture
def assert_bits_of_small_tiles(run, use_config, arguments_of, small_results):
    """Asserts that a configuration gives what SMALL gives, to the bit, and the same statistics but for rounding."""

    def launch(case, config):
        use_config(config)
        result = run(OPERATORS[case], arguments_of(case))
        return result if isinstance(result, tuple) else (result,)

    def assert_bits_of_small_tiles(case, config):
        if case not in small_results:
            small_results[case] = launch(case, SMALL)
        y, *statistics = launch(case, config)
        expected, *expected_statistics = small_results[case]
        assert torch.equal(y, expected)
        torch.testing.assert_close(statistics, expected_statistics, rtol=1e-5, atol=1e-5)  # sums of floats

    return assert_bits_of_small_tiles


@pytest.mark.parametrize("split_k", [2, 3, 5])
@pytest.mark.parametrize("case", [case for case in OPERATORS if case != "int4_geglu_quantize"])
def test_splitting_the_sum_does_not_change_a_bit(assert_bits_of_small_tiles, case, split_k):
    """The sum has 2 steps in a linear layer and 6 or 9 in a convolution, so that some splits have none to do."""
    assert_bits_of_small_tiles(case, small(split_k=split_k))


@pytest.mark.parametrize("split_k", [2, 3, 5])
def test_split_sums_are_exact(run, use_config, linear_arguments, split_k):
    use_config(small(split_k=split_k))
    arguments, _ = linear_arguments((3, 19, 130), 21)

    assert torch.equal(run("int4_linear", arguments), reference.int4_linear(**arguments))


def test_every_launch_of_a_split_counts_its_arrivals_anew(run, use_config, linear_arguments):
    use_config(small(split_k=3))
    arguments, _ = linear_arguments((3, 19, 130), 21)
    expected = reference.int4_linear(**arguments)

    for _ in range(3):
        assert torch.equal(run("int4_linear", arguments), expected)


@pytest.mark.parametrize("group_m", [3, 8])
@pytest.mark.parametrize(
    ("case", "split_k"), [("int4_linear", 1), ("int4_linear", 2), ("int4_conv2d", 2), ("int4_geglu_quantize", 1)]
)
def test_order_of_the_tiles_does_not_change_a_bit(assert_bits_of_small_tiles, case, split_k, group_m):
    """5 x 2 tiles, so that the last group of tiles is cut."""
    assert_bits_of_small_tiles(case, small(group_m=group_m, split_k=split_k))


@pytest.mark.parametrize("block_m", [32, 64])
@pytest.mark.parametrize("case", OPERATORS)
def test_size_of_the_tiles_does_not_change_a_bit(assert_bits_of_small_tiles, case, block_m):
    """The sums are integers and the epilogue works on each value alone."""
    assert_bits_of_small_tiles(case, LaunchConfig(block_m, 32, 32, 4, 2))


@pytest.mark.parametrize("rows", [16, 48, 21])
def test_rows_of_a_tile_take_their_own_samples_timestep(run, use_config, linear_arguments, rows):
    """Whether tiles lie within a sample or span several."""
    use_config(SMALL)
    arguments, _ = linear_arguments((5, rows, 34), 9)
    arguments |= {"quantizer_scale": torch.tensor([1.0, 2.0, 4.0])}

    assert torch.equal(run("int4_linear", arguments), reference.int4_linear(**arguments))


@pytest.mark.parametrize("channels", [64, 72], ids=["even", "ragged"])
@pytest.mark.parametrize(
    ("op", "config"), SHIPPED, ids=[f"{op}-{'x'.join(map(str, config.to_list()))}" for op, config in SHIPPED]
)
def test_every_shipped_configuration_is_exact(
    run, use_config, linear_arguments, geglu_quantize_arguments, conv2d_arguments, assert_quantized_alike, op, config,
    channels,
):  # fmt: skip
    use_config(config)
    channels *= config.block_k // 32
    if op == "linear_geglu":
        arguments, _ = geglu_quantize_arguments((3, 47, channels), 66)
        assert_quantized_alike(run("int4_geglu_quantize", arguments), reference.int4_geglu_quantize(**arguments))
    elif op == "linear":
        arguments, _ = linear_arguments((3, 47, channels), 67)
        assert torch.equal(run("int4_linear", arguments), reference.int4_linear(**arguments))
    else:
        arguments, _ = conv2d_arguments((3, 8, 8, channels), 67, kernel=(1, 2), padding=(0, 1), stride=(1, 2))
        y, _ = run("int4_conv2d", arguments)
        assert torch.equal(y, reference.int4_conv2d(**arguments)[0])


@pytest.mark.cuda
@pytest.mark.parametrize("case", OPERATORS)
def test_plain_code_gives_what_inline_ptx_gives(monkeypatch, run, arguments_of, assert_quantized_alike, case):
    """The unpacked integers to the bit; exp and the reciprocal, before a quantization, but for their last bits."""
    with_ptx = run(OPERATORS[case], arguments_of(case))

    monkeypatch.setattr(gemm, "launch_options", lambda: launch_options() | {"PTX": False})
    plain = run(OPERATORS[case], arguments_of(case))

    if OPERATORS[case] == "int4_geglu_quantize":
        assert_quantized_alike(plain, with_ptx)
    else:
        torch.testing.assert_close(plain, with_ptx, rtol=1e-6, atol=1e-6)


@pytest.mark.cuda
@pytest.mark.parametrize("split_k", [2, 3, 5])
def test_split_sums_of_many_tiles_are_exact_however_the_programs_race(run, use_config, linear_arguments, split_k):
    use_config(LaunchConfig(64, 64, 32, 4, 3, 1, split_k))
    arguments, _ = linear_arguments((4, 1024, 640), 640)
    expected = reference.int4_linear(**arguments)

    for _ in range(20):
        assert torch.equal(run("int4_linear", arguments), expected)
