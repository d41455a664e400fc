"""Launches of the GEMM: its results do not depend on tile sizes, tile order or split-K."""

import pytest
import torch
from flat_operators import reference, triton

from dq_kernels.triton import gemm, tuning
from dq_kernels.triton.launch import launch_options
from dq_kernels.triton.tuning import LaunchConfig, Problem, adjusted

pytestmark = pytest.mark.parametrize("implementation", ["triton"], indirect=True)


def interpreted(op, config):
    """The part of a configuration that the interpreter executes: the tile of samples that share tiles, and split-K.

    It ignores num_warps and num_stages; group_m permutes the tiles, which test_order_of_the_tiles checks.
    """
    tile = adjusted(config, Problem(op, 1, 1, 1, rows_per_sample=1))
    return LaunchConfig(tile.block_m, tile.block_n, tile.block_k, 4, 2, 1, tile.split_k)


def shipped():
    """Pairs of operator and configuration: the current GPU's; in the interpreter, all that it can tell apart."""
    if torch.cuda.is_available():
        pairs = {(shape.op, shape.config) for shape in tuning.tuned_shapes(tuning.architecture())}
    else:
        shapes = [shape for path in tuning.FOLDER.glob("*.json") for shape in tuning.tuned_shapes(path.stem)]
        pairs = {(shape.op, interpreted(shape.op, shape.config)) for shape in shapes}
    return sorted(pairs, key=str)


SHIPPED = shipped()
# Packed bytes of a step: an int8 dot on a GPU needs at least 32, Triton's interpreter any number.
SMALLEST_K = 32 if torch.cuda.is_available() else 16
SMALL = LaunchConfig(16, 16, SMALLEST_K, 4, 2)


def small(**changes):
    return LaunchConfig(**vars(SMALL) | changes)


@pytest.fixture
def arguments_of(linear_arguments, geglu_quantize_arguments, conv2d_arguments):
    """Makes an operator's arguments: 3 samples of 12 rows, 18 output channels, 38 or (with 9 taps) 6 input channels.

    With statistics a sample has 64 rows.
    """

    def arguments_of(case):
        if case == "int4_linear":
            return linear_arguments((3, 3, 4, 38), 18, torch.float32)[0]
        if case == "int4_geglu_quantize":
            return geglu_quantize_arguments((3, 3, 4, 38), 18)[0]
        shape, geometry = (3, 3, 4, 38), {"kernel": (1, 3), "padding": (0, 1)}
        if case == "upsample":
            shape, geometry = (3, 1, 3, 6), {"upsample": True}
        elif case == "stride":
            shape, geometry = (3, 6, 8, 6), {"stride": (2, 2)}
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
    """The results with SMALL, by case: each is computed once."""
    return {}


@pytest.fixture
def assert_bits_of_small_tiles(run, use_config, arguments_of, small_results):
    """Asserts that a configuration gives the result of SMALL bit for bit, and its statistics up to rounding."""

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
        torch.testing.assert_close(statistics, expected_statistics, rtol=1e-5, atol=1e-5)  # another order of float sums

    return assert_bits_of_small_tiles


@pytest.mark.parametrize(
    ("case", "split_k"),
    [
        *(("int4_conv2d", split_k) for split_k in (2, 3, 5)),
        *(("int4_linear", 2), ("int4_linear", 5), ("stride", 2), ("upsample", 3), ("statistics", 5)),
    ],
)
def test_splitting_the_sum_does_not_change_a_bit(assert_bits_of_small_tiles, case, split_k):
    """The sum has 2 steps in a linear layer and 6 or 9 in a convolution: some splits have no step."""
    assert_bits_of_small_tiles(case, small(split_k=split_k))


@pytest.mark.parametrize("case", OPERATORS)
def test_joining_the_products_of_a_step_does_not_change_a_bit(monkeypatch, run, use_config, arguments_of, case):
    """The products of both halves of K and, for GEGLU, of the hidden rows and the gates."""
    use_config(small(split_k=2))

    def launch(joins):
        monkeypatch.setattr(gemm, "joins_halves", lambda target: joins)
        return run(OPERATORS[case], arguments_of(case))

    torch.testing.assert_close(launch(True), launch(False), rtol=0, atol=0)


@pytest.mark.parametrize("channels", [64, 72], ids=["even", "ragged"])
def test_joined_products_are_exact(
    monkeypatch, run, use_config, linear_arguments, geglu_quantize_arguments, assert_quantized_alike, channels
):
    monkeypatch.setattr(gemm, "joins_halves", lambda target: True)
    use_config(LaunchConfig(32, 16, 32, 4, 2))
    arguments, _ = linear_arguments((3, 11, channels), 35)
    geglu_arguments, _ = geglu_quantize_arguments((3, 11, channels), 34)

    assert torch.equal(run("int4_linear", arguments), reference.int4_linear(**arguments))
    assert_quantized_alike(
        run("int4_geglu_quantize", geglu_arguments), reference.int4_geglu_quantize(**geglu_arguments)
    )


@pytest.mark.parametrize("split_k", [2, 3, 5])
def test_split_sums_are_exact_and_leave_zeroed_counters(
    monkeypatch, run, use_config, linear_arguments, triton_device, split_k
):
    """Of 5 steps, the last of them ragged, in 2 tiles; the second launch counts from what the first one left."""
    counters = torch.zeros(3, dtype=torch.int32, device=triton_device)
    monkeypatch.setattr(gemm, "arrival_counters", lambda number, device: counters)
    use_config(small(split_k=split_k))
    arguments, _ = linear_arguments((3, 7, 130), 9)
    expected = reference.int4_linear(**arguments)

    for _ in range(2):
        assert torch.equal(run("int4_linear", arguments), expected)
        assert not counters.any()


@pytest.mark.parametrize("group_m", [2, 8])
@pytest.mark.parametrize(
    ("case", "split_k"), [("int4_linear", 1), ("int4_linear", 2), ("int4_conv2d", 2), ("int4_geglu_quantize", 1)]
)
def test_order_of_the_tiles_does_not_change_a_bit(assert_bits_of_small_tiles, case, split_k, group_m):
    """3 x 2 tiles: the last group of 2 is cut, and a group of 8 is larger than all."""
    assert_bits_of_small_tiles(case, small(group_m=group_m, split_k=split_k))


@pytest.mark.parametrize("block_m", [32, 64])
@pytest.mark.parametrize("case", OPERATORS)
def test_size_of_the_tiles_does_not_change_a_bit(assert_bits_of_small_tiles, case, block_m):
    """The sums are integers and the epilogue is elementwise."""
    assert_bits_of_small_tiles(case, LaunchConfig(block_m, 32, 32, 4, 2))


@pytest.mark.parametrize("rows", [32, 21, 7], ids=["tiles-within-a-sample", "tiles-of-two-samples", "of-three"])
def test_rows_of_a_tile_take_their_own_samples_timestep(run, use_config, linear_arguments, rows):
    use_config(SMALL)
    arguments, _ = linear_arguments((3, rows, 34), 9)
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
        arguments, _ = geglu_quantize_arguments((3, 11, channels), 66)
        assert_quantized_alike(run("int4_geglu_quantize", arguments), reference.int4_geglu_quantize(**arguments))
    elif op == "linear":
        arguments, _ = linear_arguments((3, 11, channels), 67)
        assert torch.equal(run("int4_linear", arguments), reference.int4_linear(**arguments))
    else:
        arguments, _ = conv2d_arguments((3, 3, 8, channels), 67, kernel=(1, 2), padding=(0, 1), stride=(1, 2))
        y, _ = run("int4_conv2d", arguments)
        assert torch.equal(y, reference.int4_conv2d(**arguments)[0])


@pytest.mark.cuda
@pytest.mark.parametrize("case", OPERATORS)
def test_plain_code_gives_what_inline_ptx_gives(monkeypatch, run, arguments_of, assert_quantized_alike, case):
    """Unpacked integers are equal bit for bit; exp and the reciprocal may differ in their last bits."""
    with_ptx = run(OPERATORS[case], arguments_of(case))

    monkeypatch.setattr(gemm, "launch_options", lambda: launch_options() | {"PTX": False})
    plain = run(OPERATORS[case], arguments_of(case))

    if OPERATORS[case] == "int4_geglu_quantize":
        assert_quantized_alike(plain, with_ptx)
    else:
        torch.testing.assert_close(plain, with_ptx, rtol=1e-6, atol=1e-6)


@pytest.mark.cuda
@pytest.mark.parametrize("split_k", [2, 3, 5])
def test_split_sums_of_many_tiles_are_exact_in_any_order_of_arrival(run, use_config, linear_arguments, split_k):
    use_config(LaunchConfig(64, 64, 32, 4, 3, 1, split_k))
    arguments, _ = linear_arguments((4, 1024, 640), 640)
    expected = reference.int4_linear(**arguments)

    for _ in range(20):
        assert torch.equal(run("int4_linear", arguments), expected)


@pytest.mark.cuda
def test_split_sums_are_exact_on_two_streams_and_in_a_graph(use_config, linear_arguments, to_device, implementation):
    use_config(LaunchConfig(64, 64, 32, 4, 3, 1, 3))
    arguments, _ = linear_arguments((4, 1024, 640), 640)
    expected = reference.int4_linear(**arguments).cuda()
    arguments = to_device(arguments, "cuda")
    torch.cuda.synchronize()

    results, streams, graph = [], [torch.cuda.Stream() for _ in range(2)], torch.cuda.CUDAGraph()
    for stream in 20 * streams:
        with torch.cuda.stream(stream):
            results.append(triton.int4_linear(**arguments))
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        results += [triton.int4_linear(**arguments) for _ in range(2)]
    for _ in range(20):
        graph.replay()

    assert all(torch.equal(result, expected) for result in results)
