"""Launch configurations: the shipped files, and which entry a launch takes."""

import json
import statistics
import timeit

import pytest
import torch

from dq_kernels import tuning
from dq_kernels.tuning import LaunchConfig, TunedShape

FILES = sorted(tuning.FOLDER.glob("*.json"))
KIB = 1024
SHARED_MEMORY = {"sm_80": 163 * KIB, "sm_89": 99 * KIB, "sm_90": 227 * KIB, "gfx942": 64 * KIB}
A, B, C = (LaunchConfig(16, 16, 16, 4, stages) for stages in (2, 3, 4))


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def file(request):
    return request.param


@pytest.fixture
def lookup(monkeypatch):
    """launch_config among these shapes alone, without its cache."""

    def lookup(shapes, *query):
        monkeypatch.setattr(tuning, "tuned_shapes", lambda architecture: shapes)
        return tuning.launch_config.__wrapped__(*query)

    return lookup


def test_there_is_a_file_for_every_architecture_that_we_serve():
    assert [path.stem for path in FILES] == sorted({*tuning.FILES.values(), tuning.AMD_FILE})


def test_file_says_for_what_and_whence_it_is(file):
    document, shapes = tuning.read_tuning(file)

    assert document["architecture"] == file.stem
    assert isinstance(document["measured"], bool)
    assert document["source"]
    assert document["fields"] == list(LaunchConfig.__dataclass_fields__)
    assert shapes == tuning.tuned_shapes(file.stem)


def test_file_has_shapes_for_every_operator_and_none_twice(file):
    shapes = [(shape.op, shape.rows, shape.out_channels, shape.reduction) for shape in tuning.tuned_shapes(file.stem)]

    assert {op for op, *_ in shapes} == {"linear", "linear_geglu", "conv2d"}
    assert len(set(shapes)) == len(shapes)
    assert all(size >= 1 for _, *sizes in shapes for size in sizes)


def test_configurations_fit_the_architecture(file):
    for shape in tuning.tuned_shapes(file.stem):
        config = shape.config
        for tile in (config.block_m, config.block_n, config.block_k, config.num_warps):
            assert tile.bit_count() == 1, f"{shape}: not a power of 2"
        assert min(config.block_m, config.block_n, config.block_k) >= 16, f"{shape}: too small for tl.dot"
        assert config.num_warps <= 16
        assert config.num_stages >= 1
        assert config.group_m >= 1
        assert 1 <= config.split_k <= 32
        # Two blocks of activations meet one of packed weights, for GEGLU two. AMD's pipeline has one buffer fewer.
        weight_tiles = 2 if shape.op == "linear_geglu" else 1
        step = weight_tiles * config.block_n * config.block_k + 2 * config.block_m * config.block_k
        buffers = max(1, config.num_stages - 1) if file.stem == tuning.AMD_FILE else config.num_stages
        assert buffers * step <= SHARED_MEMORY[file.stem], f"{shape}: more shared memory than there is"


def test_operators_that_cannot_split_have_no_splits(file):
    assert all(shape.config.split_k == 1 for shape in tuning.tuned_shapes(file.stem) if shape.op == "linear_geglu")


def test_shapes_are_read_in_the_order_of_the_fields(tmp_path):
    shapes = [["conv2d", 1, 2, 3, [16, 32, 64, 4, 5, 6, 7]]]
    (tmp_path / "gpu.json").write_text(json.dumps({"architecture": "gpu", "shapes": shapes}))

    document, (shape,) = tuning.read_tuning(tmp_path / "gpu.json")

    config = LaunchConfig(block_m=16, block_n=32, block_k=64, num_warps=4, num_stages=5, group_m=6, split_k=7)
    assert document == {"architecture": "gpu"}
    assert shape == TunedShape(op="conv2d", rows=1, out_channels=2, reduction=3, config=config)
    assert config.to_list() == shapes[0][-1]


def test_every_shipped_shape_gets_its_own_configuration(file, lookup):
    shapes = tuning.tuned_shapes(file.stem)

    for shape in shapes:
        assert lookup(shapes, shape.op, shape.rows, shape.out_channels, shape.reduction) == shape.config


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ((64, 64, 64), A),
        ((1, 64, 64), A),
        ((1, 1, 1), A),
        ((127, 127, 64), A),  # 2 doublings from A, 2.02 from B
        ((1024, 64, 64), B),
        ((257, 64, 64), B),  # beyond the geometric middle
        ((255, 64, 64), A),
        ((64, 64, 4096), C),
        ((2**20, 2**14, 2**10), B),
    ],
    ids=str,
)
def test_lookup_takes_the_shape_that_is_fewest_doublings_away(lookup, query, expected):
    shapes = [
        TunedShape("linear", 64, 64, 64, A),
        TunedShape("linear", 1024, 64, 64, B),
        TunedShape("linear", 64, 64, 1024, C),
    ]

    assert lookup(shapes, "linear", *query) == expected


def test_lookup_takes_shapes_of_the_same_operator_alone(lookup):
    shapes = [TunedShape("linear", 64, 64, 64, A), TunedShape("conv2d", 2**20, 2**20, 2**20, B)]

    assert lookup(shapes, "conv2d", 64, 64, 64) == B


def test_lookup_reads_the_file_of_the_architecture(monkeypatch):
    asked = []
    monkeypatch.setattr(tuning, "architecture", lambda: "sm_89")
    monkeypatch.setattr(
        tuning, "tuned_shapes", lambda name: asked.append(name) or [TunedShape("linear", 64, 64, 64, A)]
    )

    tuning.launch_config.__wrapped__("linear", 1, 1, 1)

    assert asked == ["sm_89"]


def test_repeated_lookup_costs_under_5_microseconds():
    def lookup():
        return tuning.launch_config("conv2d", 8192, 320, 2880)

    lookup()
    seconds = [timeit.timeit(lookup, number=1000) / 1000 for _ in range(15)]

    assert statistics.median(seconds) < 5e-6


@pytest.mark.parametrize(("block_m", "expected"), [(16, 64), (32, 64), (64, 64), (128, 128), (192, 192), (96, 64)])
def test_tiles_of_whole_runs_keep_all_else(block_m, expected):
    config = LaunchConfig(block_m, 32, 16, 8, 3, 5, 7)

    assert config.with_whole_runs(64) == LaunchConfig(expected, 32, 16, 8, 3, 5, 7)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((7, 0), "sm_80"),
        ((7, 5), "sm_80"),
        ((8, 0), "sm_80"),
        ((8, 6), "sm_89"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_90"),
        ((10, 3), "sm_90"),
        ((12, 0), "sm_89"),
        ((12, 1), "sm_89"),
    ],
    ids=str,
)
def test_nvidia_gpu_takes_the_file_of_what_it_resembles(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.version, "hip", None)

    assert tuning.architecture.__wrapped__() == expected


def test_amd_gpu_takes_the_amd_file(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", "6.4")

    assert tuning.architecture.__wrapped__() == "gfx942"


def test_without_a_gpu_the_oldest_nvidia_file_serves(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    assert tuning.architecture.__wrapped__() == "sm_80"


@pytest.mark.parametrize(
    ("hip", "interpret", "expected"), [(None, "0", True), (None, "1", False), ("6.4", "0", False), ("6.4", "1", False)]
)
def test_ptx_is_for_nvidia_gpus_alone(monkeypatch, hip, interpret, expected):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setenv("TRITON_INTERPRET", interpret)

    assert tuning.use_ptx.__wrapped__() is expected


@pytest.mark.parametrize(
    ("tile", "expected"),
    [
        ((64, 64, 64, 4, 4), (64, 64, 64, 4, 4)),  # 32 accumulators a thread
        ((64, 128, 64, 8, 3), (64, 128, 64, 8, 3)),
        ((64, 128, 64, 4, 4), (64, 64, 64, 4, 4)),  # 64
        ((128, 128, 64, 8, 3), (64, 64, 64, 4, 3)),
        ((256, 64, 64, 4, 3), (64, 64, 64, 4, 3)),  # 128
        ((32, 256, 64, 4, 3), (32, 64, 64, 4, 3)),
    ],
    ids=str,
)
def test_tiles_with_fewer_registers_hold_fewer_than_64_accumulators_a_thread(tile, expected):
    config = LaunchConfig(*tile, group_m=4, split_k=2)

    assert config.with_fewer_registers() == LaunchConfig(*expected, group_m=4, split_k=2)


def test_programs_follow_each_other_early_since_hopper_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tuning, "use_ptx", lambda: True)
    for capability, expected in (((8, 9), False), ((9, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        assert tuning.use_pdl.__wrapped__() is expected
