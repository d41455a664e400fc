"""Launch configurations: the shipped files, and the entry that a launch takes."""

import contextlib
import json
import timeit

import pytest
import torch
from triton.backends.compiler import GPUTarget

from dq_kernels.registration import on_the_device_of_x
from dq_kernels.triton import launch, tuning
from dq_kernels.triton.tuning import LaunchConfig, Problem, TunedShape, adjusted

FILES = sorted(tuning.FOLDER.glob("*.json"))
KIB = 1024
SHARED_MEMORY = {"sm_80": 163 * KIB, "sm_89": 99 * KIB, "sm_90": 227 * KIB, "gfx942": 64 * KIB}
A, B, C = (LaunchConfig(16, 16, 16, 4, stages) for stages in (2, 3, 4))


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def file(request):
    return request.param


@pytest.fixture
def lookup(monkeypatch):
    """tuned_config among these shapes only, without its cache."""

    def lookup(shapes, *query):
        monkeypatch.setattr(tuning, "tuned_shapes", lambda architecture: shapes)
        return tuning.tuned_config.__wrapped__("sm_90", *query)

    return lookup


def test_there_is_a_file_for_every_supported_architecture():
    assert [path.stem for path in FILES] == sorted({*tuning.FILES.values(), tuning.AMD_FILE})


def test_file_names_its_architecture_and_source(file):
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


def test_lookup_takes_shapes_of_the_same_operator_only(lookup):
    shapes = [TunedShape("linear", 64, 64, 64, A), TunedShape("conv2d", 2**20, 2**20, 2**20, B)]

    assert lookup(shapes, "conv2d", 64, 64, 64) == B


def test_lookup_reads_the_file_of_the_architecture(monkeypatch):
    asked = []
    monkeypatch.setattr(tuning, "architecture", lambda: "sm_89")
    monkeypatch.setattr(
        tuning, "tuned_shapes", lambda name: asked.append(name) or [TunedShape("linear", 64, 64, 64, A)]
    )

    tuning.launch_config(Problem("linear", 9, 9, 9, rows_per_sample=9))

    assert asked == ["sm_89"]


def test_repeated_lookup_costs_under_5_microseconds():
    def lookup():
        return tuning.launch_config(Problem("conv2d", 8192, 320, 2880, rows_per_sample=4096))

    lookup()
    seconds = [timeit.timeit(lookup, number=1000) / 1000 for _ in range(15)]

    assert min(seconds) < 5e-6


@pytest.mark.parametrize(("block_m", "expected"), [(16, 64), (32, 64), (64, 64), (128, 128), (192, 192), (96, 64)])
def test_tiles_of_whole_runs_keep_all_else(block_m, expected):
    config = LaunchConfig(block_m, 32, 16, 8, 3, 5, 7)

    assert config.with_whole_runs(64) == LaunchConfig(expected, 32, 16, 8, 3, 5, 7)


class Driver:
    """A driver in place of Triton's, with GPUs of several kinds, of which one is current."""

    def __init__(self, *targets):
        self.targets, self.current = targets, 0

    @property
    def active(self):
        return self

    def get_current_device(self):
        if not self.targets:
            raise RuntimeError("0 active drivers ([]). There should only be one.")
        return self.current

    def get_current_target(self):
        return self.targets[self.current]


@pytest.fixture
def install(monkeypatch):
    """Makes a machine have these GPUs; returns its driver."""

    def install(*targets, interpreted=False):
        driver = Driver(*targets)
        monkeypatch.setattr(launch, "driver", driver)
        monkeypatch.setattr(launch, "INTERPRETED", interpreted)
        forget()
        return driver

    def forget():
        for function in (launch.target_of, launch._launch_options, tuning._file_of):
            function.cache_clear()

    yield install
    forget()


def nvidia(capability):
    return GPUTarget("cuda", capability, 32)


AMD, INTEL = GPUTarget("hip", "gfx942", 64), GPUTarget("xpu", {"arch": "pvc"}, 32)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        (70, "sm_80"),
        (75, "sm_80"),
        (80, "sm_80"),
        (86, "sm_89"),
        (89, "sm_89"),
        (90, "sm_90"),
        (100, "sm_90"),
        (103, "sm_90"),
        (120, "sm_89"),
        (121, "sm_89"),
    ],
)
def test_nvidia_gpu_takes_the_file_of_what_it_resembles(install, capability, expected):
    install(nvidia(capability))

    assert tuning.architecture() == expected


def test_amd_gpu_takes_the_amd_file(install):
    install(AMD)

    assert tuning.architecture() == "gfx942"


@pytest.mark.parametrize("targets", [(), (INTEL,)], ids=["none", "another vendor's"])
def test_without_a_known_gpu_the_oldest_nvidia_file_serves(install, targets):
    install(*targets)

    assert tuning.architecture() == "sm_80"


@pytest.mark.parametrize(
    ("target", "interpreted", "expected"),
    [
        (nvidia(80), False, {"PTX": True, "PDL": False}),
        (nvidia(89), False, {"PTX": True, "PDL": False}),
        (nvidia(90), False, {"PTX": True, "PDL": True, "launch_pdl": True}),
        (nvidia(120), False, {"PTX": True, "PDL": True, "launch_pdl": True}),
        (nvidia(90), True, {"PTX": False, "PDL": False}),
        (AMD, False, {"PTX": False, "PDL": False}),
        (INTEL, False, {"PTX": False, "PDL": False}),
    ],
    ids=str,
)
def test_options_are_for_gpus_that_have_the_instructions(install, target, interpreted, expected):
    install(target, interpreted=interpreted)

    assert launch.launch_options() == expected
    assert launch.launch_options(ptx=False) == {name: value for name, value in expected.items() if name != "PTX"}


@pytest.mark.parametrize(
    ("target", "expected"),
    [*((nvidia(arch), arch == 90) for arch in (80, 89, 90, 100, 120)), (AMD, False), (INTEL, False), (None, False)],
    ids=str,
)
def test_products_are_joined_on_hopper_alone(target, expected):
    assert tuning.joins_halves(target) is expected


def test_every_gpu_of_a_machine_has_its_own_options_and_configurations(install):
    driver = install(nvidia(89), nvidia(90), AMD)
    expected = [("sm_89", False), ("sm_90", True), ("gfx942", False)]

    for driver.current in (0, 1, 2, 1, 0):
        assert (tuning.architecture(), launch.launch_options()["PDL"]) == expected[driver.current]


@pytest.fixture
def counters():
    """Counters with a small reserve for captures."""
    counters = launch.ArrivalCounters(torch.device("cpu"))
    counters.REGION, counters.BLOCK = 4, 16
    return counters


def addresses(counters):
    assert not counters.any()
    assert counters.data_ptr() % 16 == 0  # otherwise Triton compiles another kernel
    return set(range(counters.data_ptr(), counters.data_ptr() + 4 * counters.numel(), 4))


def test_launches_share_counters_on_one_stream_alone(counters):
    first, again, other = (counters.take(3, stream) for stream in (7, 7, 8))

    assert addresses(first) == addresses(again)
    assert addresses(first).isdisjoint(addresses(other))


def test_counters_grow_without_giving_any_to_two_streams(counters):
    before = [counters.take(3, stream) for stream in (7, 8)]
    grown = counters.take(50, 7)
    after = [counters.take(3, stream) for stream in (8, 9)]

    assert grown.numel() >= 50
    assert addresses(counters.take(3, 7)) == addresses(grown)
    distinct = [addresses(region) for region in (*before, grown, after[1])]
    assert sum(map(len, distinct)) == len(set.union(*distinct))
    assert addresses(after[0]) == addresses(before[1])


def test_captured_launches_share_counters_with_none(counters):
    eager = counters.take(3, 7)
    captured = [counters.take(3, None) for _ in range(20)]  # more than the reserve holds: the last are new tensors
    later = counters.take(3, 8)

    distinct = [addresses(region) for region in (eager, *captured, later)]
    assert sum(map(len, distinct)) == len(set.union(*distinct))


def test_a_capture_allocates_no_block(monkeypatch, counters):
    counters.take(3, 7)
    monkeypatch.setattr(counters, "_allocate", lambda number: pytest.fail("allocated inside a capture"))

    for _ in range(20):
        assert counters.take(3, None).numel() >= 3


def test_a_capture_after_a_launch_needs_no_fill(counters):
    counters.take(3, 7)
    reserve = addresses(counters._blocks[-1])

    assert addresses(counters.take(8, None)) < reserve


def test_a_launch_happens_on_the_device_of_its_tensors(monkeypatch):
    entered = []

    @contextlib.contextmanager
    def device_of(tensor):
        entered.append(tensor)
        yield
        entered.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    x = torch.ones(2)

    result = on_the_device_of_x(lambda x, factor: (len(entered), factor * x))(x, 3)

    assert result[0] == 1
    assert torch.equal(result[1], 3 * x)
    assert not entered


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


PLAIN = Problem("linear", 512, 64, 64, rows_per_sample=256)
WIDE = LaunchConfig(128, 128, 64, 8, 3, group_m=4, split_k=2)


def test_a_plain_product_is_launched_as_it_was_tuned():
    assert adjusted(WIDE, PLAIN) == WIDE


def test_geglu_is_never_split():
    assert adjusted(WIDE, PLAIN._replace(op="linear_geglu")) == LaunchConfig(128, 128, 64, 8, 3, 4, split_k=1)


def test_tiles_with_rows_of_several_samples_have_fewer_registers():
    assert adjusted(WIDE, PLAIN._replace(rows_per_sample=200)) == WIDE.with_fewer_registers()


@pytest.mark.parametrize("rows_per_sample", [64, 192, 256])
def test_tiles_with_statistics_hold_whole_runs(rows_per_sample):
    problem = PLAIN._replace(rows_per_sample=rows_per_sample, with_statistics=True)

    for block_m in (16, 32, 64, 128):
        assert adjusted(LaunchConfig(block_m, 128, 64, 8, 3), problem).block_m % 64 == 0
