"""The int8 copies of weights: counted, dropped and refreshed with the weight, and exact in every later call.

They are oneDNN's or, on a processor that it runs on, those of ``gemm.cpp``.
"""

import gc
import pathlib

import pytest
import torch
from flat_operators import ops, reference

from dq_kernels.cpu import compiled
from dq_kernels.ops import PackedWeight, Quantizer, int4_linear
from dq_kernels.packing import pack_int4, unpack_int4


def call(module, op, arguments):
    """The result of an operator, without the convolution's statistics."""
    result = getattr(module, op)(**arguments)
    return result[0] if op == "int4_conv2d" else result


def assert_exact(op, arguments):
    assert torch.equal(call(ops, op, arguments), call(reference, op, arguments))


@pytest.fixture
def make(linear_arguments, conv2d_arguments):
    """Makes arguments of an operator with unit scales, so that fp32 results are integers."""

    def make(op, batch=2, size=(8, 8), seed=0):
        if op == "int4_linear":
            return linear_arguments((batch, size[0], 34), 9, seed=seed)[0]
        return conv2d_arguments((batch, *size, 34), 9, seed=seed)[0]

    return make


OPERATORS = pytest.mark.parametrize("op", ["int4_linear", "int4_conv2d"])
WEIGHTS = {"int4_linear": 9 * 34, "int4_conv2d": 9 * 9 * 34}


def cpu_flags():
    """The processor's instruction sets as Linux names them; none elsewhere."""
    path = pathlib.Path("/proc/cpuinfo")
    return path.read_text().split() if path.exists() else []


@pytest.fixture(scope="module")
def with_avx2(tmp_path_factory):
    """The compiled functions without AVX-512."""
    folder, patch = tmp_path_factory.mktemp("avx2"), pytest.MonkeyPatch()
    with patch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(folder))
        patched.setattr(compiled, "OPTIONAL_FLAGS", (("-march=native", "-mno-avx512f", "-fopenmp"),))
        compiled._cache_folder.cache_clear()
        functions = compiled.library.__wrapped__()
    compiled._cache_folder.cache_clear()
    return functions


@pytest.fixture(autouse=True, params=["gemm.cpp", "gemm.cpp with AVX2", "oneDNN"])
def product(request, monkeypatch):
    """Who multiplies. ``gemm.cpp`` pads the copy to 64 output and a multiple of 4 input channels, and adds sums."""
    if request.param == "oneDNN":
        monkeypatch.setattr(compiled, "gemm", lambda products: None)
    else:
        if request.param == "gemm.cpp with AVX2":
            functions = request.getfixturevalue("with_avx2")
            monkeypatch.setattr(compiled, "library", lambda: functions)
        if compiled.gemm(1) is None:
            pytest.skip("needs a C++ compiler and a processor with AVX2")
        monkeypatch.setattr(compiled, "MOST_PRODUCTS", (-1, 2**63, 2**63))
        monkeypatch.setitem(WEIGHTS, "int4_linear", 64 * (36 + 4))
        monkeypatch.setitem(WEIGHTS, "int4_conv2d", 64 * (9 * 36 + 4))
    return request.param


@OPERATORS
def test_one_int8_copy_of_a_weight_is_counted_however_often_it_is_used(make, op):
    arguments = make(op)
    before = ops.prepacked_bytes()

    for batch in (1, 2, 5):
        getattr(ops, op)(**make(op, batch=batch) | {"weight_values": arguments["weight_values"]})

        assert ops.prepacked_bytes() == before + WEIGHTS[op]


@OPERATORS
def test_every_weight_has_a_copy_of_its_own(make, op):
    first, second = make(op, seed=0), make(op, seed=1)
    before = ops.prepacked_bytes()

    for arguments in (first, second, first):
        assert_exact(op, arguments)

    assert ops.prepacked_bytes() == before + 2 * WEIGHTS[op]


def test_copies_of_some_weights_can_be_counted(make):
    used, unused = make("int4_linear", seed=0)["weight_values"], make("int4_linear", seed=1)["weight_values"]
    conv = make("int4_conv2d")
    ops.int4_linear(**make("int4_linear") | {"weight_values": used})
    ops.int4_conv2d(**conv)

    assert ops.prepacked_bytes([used]) == WEIGHTS["int4_linear"]
    assert ops.prepacked_bytes([unused]) == 0
    assert ops.prepacked_bytes([used, unused, conv["weight_values"]]) == sum(WEIGHTS.values())


def test_copies_can_be_freed_and_are_made_again(make):
    freed, kept = make("int4_linear", seed=0), make("int4_linear", seed=1)
    before = ops.prepacked_bytes()
    for arguments in (freed, kept):
        ops.int4_linear(**arguments)

    ops.free_prepacked([freed["weight_values"]])

    assert ops.prepacked_bytes() == before + WEIGHTS["int4_linear"]
    assert_exact("int4_linear", freed)
    assert ops.prepacked_bytes() == before + 2 * WEIGHTS["int4_linear"]
    ops.free_prepacked()
    assert ops.prepacked_bytes() == 0


@OPERATORS
def test_copy_goes_when_the_weight_goes(make, op):
    gc.collect()  # weights of other tests
    arguments = make(op)
    before = ops.prepacked_bytes()
    getattr(ops, op)(**arguments)
    assert ops.prepacked_bytes() > before

    del arguments
    gc.collect()

    assert ops.prepacked_bytes() == before


def change_in_place(weight, other):
    weight.copy_(other)


def change_one_byte(weight, other):
    weight.view(-1)[-1] ^= 0xFF


def replace_data(weight, other):
    weight.data = other.clone()


@pytest.mark.parametrize("change", [change_in_place, change_one_byte, replace_data])
@OPERATORS
def test_copy_is_refreshed_when_the_weight_changes(make, op, change):
    arguments, other = make(op, seed=0), make(op, seed=1)
    before = ops.prepacked_bytes()
    first = call(ops, op, arguments)

    change(arguments["weight_values"], other["weight_values"])
    weight_sum = unpack_int4(arguments["weight_values"]).flatten(1).sum(1, dtype=torch.int32)
    second = call(ops, op, arguments | {"weight_sum": weight_sum})

    assert not torch.equal(first, second)
    assert torch.equal(second, call(reference, op, arguments))
    assert ops.prepacked_bytes() == before + WEIGHTS[op]


@OPERATORS
def test_weight_made_in_inference_mode_works_in_and_after_it(make, op):
    with torch.inference_mode():
        arguments = make(op)
        assert_exact(op, arguments)
    assert_exact(op, arguments)


def test_conv_copy_serves_other_image_sizes_and_batches(make):
    weight = {key: make("int4_conv2d")[key] for key in ("weight_values", "weight_sum")}

    for batch, size in [(2, (8, 8)), (2, (13, 5)), (5, (13, 5)), (1, (1, 1)), (3, (40, 64)), (2, (8, 8))]:
        assert_exact("int4_conv2d", make("int4_conv2d", batch, size, seed=batch) | weight)


def test_conv_copy_serves_other_strides_dilations_and_upsampling(make):
    arguments = make("int4_conv2d")

    for stride, dilation, upsample in [(1, 1, False), (2, 1, False), (1, 2, False), (1, 1, True), (3, 2, False)]:
        geometry = {"stride": (stride,) * 2, "dilation": (dilation,) * 2, "upsample": upsample}
        assert_exact("int4_conv2d", arguments | geometry)


def test_requantizing_shares_the_copy_of_the_plain_layer(linear_arguments, geglu_quantize_arguments):
    plain, _ = linear_arguments((2, 8, 34), 20)
    requantizing, _ = geglu_quantize_arguments((2, 8, 34), 10)
    ops.int4_linear(**plain)
    before = ops.prepacked_bytes()

    ops.int4_geglu_quantize(**requantizing | {"weight_values": plain["weight_values"]})

    assert ops.prepacked_bytes() == before


def test_conv_copy_serves_other_weight_scales(make):
    arguments = make("int4_conv2d")
    assert_exact("int4_conv2d", arguments)

    assert_exact("int4_conv2d", arguments | {"weight_scale": torch.full((9,), 0.25)})


@pytest.mark.parametrize("zero_points", [(5, -128, 5), (-128, 127, -128), (127, -128, 0, -1)], ids=str)
@OPERATORS
def test_every_zero_point_is_exact_whichever_came_first(make, op, zero_points):
    """-128 is 0 in oneDNN's uint8, for which a cached primitive could omit the correction."""
    arguments = make(op)

    for zero_point in zero_points:
        assert_exact(op, arguments | {"quantizer_zero_point": torch.full((3,), zero_point, dtype=torch.int32)})


@OPERATORS
def test_batch_of_mixed_timesteps_gives_what_its_samples_give_alone(make, op):
    arguments = make(op, batch=5) | {"quantizer_timestep_index": torch.tensor([2, 0, 2, 1, 0], dtype=torch.int32)}

    together = call(ops, op, arguments)

    per_sample = ("x", "quantizer_timestep_index")
    for sample in range(5):
        alone = arguments | {name: arguments[name][sample : sample + 1] for name in per_sample}
        assert torch.equal(together[sample : sample + 1], call(ops, op, alone))


def test_torch_without_onednn_is_reported_as_such(make, monkeypatch, product):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)

    if product == "oneDNN":
        with pytest.raises(RuntimeError, match="built with oneDNN"):
            ops.int4_linear(**make("int4_linear"))
    else:
        assert_exact("int4_linear", make("int4_linear"))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("shape", "out_channels", "options"),
    [
        ((1, 1, 30), 18, {}),
        ((3, 100, 64), 64, {}),
        ((2, 97, 34), 130, {}),
        ((1, 9, 7, 34), 70, {}),
        ((2, 12, 13, 6), 20, {"stride": (2, 1), "dilation": (1, 2)}),
        ((2, 3, 4, 8), 64, {"upsample": True}),
    ],
    ids=str,
)
def test_results_have_the_bits_of_onednns(
    linear_arguments, conv2d_arguments, monkeypatch, product, shape, out_channels, options, bias
):
    """For scales that are no powers of 2, so that every operation rounds; all samples have the same timestep."""
    if product == "oneDNN":
        pytest.skip("compares both")
    op = "int4_linear" if len(shape) == 3 else "int4_conv2d"
    arguments = (linear_arguments if op == "int4_linear" else conv2d_arguments)(shape, out_channels, **options)[0]
    generator = torch.Generator().manual_seed(1)
    arguments |= {
        "weight_scale": 0.01 * torch.rand(out_channels, generator=generator) + 0.001,
        "quantizer_scale": 0.1 * torch.rand(3, generator=generator) + 0.01,
        "quantizer_timestep_index": torch.full((shape[0],), 2, dtype=torch.int32),
        "bias": torch.randn(out_channels, generator=generator) if bias else None,
    }
    y = call(ops, op, arguments)
    ops.free_prepacked()
    monkeypatch.setattr(compiled, "gemm", lambda products: None)
    expected = call(ops, op, arguments)

    if "avx512f" in cpu_flags() and not ("avx512_vnni" in cpu_flags() and product == "gemm.cpp"):
        torch.testing.assert_close(y, expected)  # the AVX2 code has the order of operations of oneDNN's for AVX2
    else:
        assert torch.equal(y, expected)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_share_a_large_product(linear_arguments, threads):
    arguments, _ = linear_arguments((2, 300, 128), 130)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)

    try:
        assert_exact("int4_linear", arguments)
    finally:
        torch.set_num_threads(before)


def test_both_halves_of_a_byte_reach_onednn():
    """x selects one channel at a time, so that the result is its weight."""
    values = torch.tensor([[1, -2, 3, -4, 5, -6, 7, -8]], dtype=torch.int8)
    one, zero = torch.ones(1), torch.zeros(1, dtype=torch.int32)
    weight = PackedWeight(pack_int4(values), one, zero)
    quantizer = Quantizer(torch.ones(8), one, zero, torch.zeros(8, dtype=torch.int32), 8)

    y = int4_linear(torch.eye(8, dtype=torch.int8), weight, quantizer, out_dtype=torch.float32)

    assert y.flatten().tolist() == values.flatten().tolist()
