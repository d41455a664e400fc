"""Mapping the UNet's ``timestep`` argument to the nearest row of the tables, on the device, for every sample."""

import copy

import numpy as np
import pytest
import tiny_unets
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import dq_runtime
from dq_runtime.timesteps import TimestepGrid, grouped

CPU = torch.device("cpu")
GRID = [1.0, 250.0, 500.0, 999.0]


def nearest_row(grid, timestep):
    """The expected row in plain Python: smallest distance, then smaller timestep."""
    return min(range(len(grid)), key=lambda row: (abs(grid[row] - timestep), row))


def rows(grid, timestep, batch_size=3):
    index = TimestepGrid(grid).nearest(timestep, batch_size, CPU)
    assert index.shape == (batch_size,)
    assert index.dtype == torch.int32
    return index.tolist()


@pytest.mark.parametrize(
    "timestep",
    [
        400,
        400.0,
        torch.tensor(400),
        torch.tensor(400.0),
        torch.tensor([400]),
        torch.tensor([400.0]),
        torch.tensor([400, 400, 400]),
        np.float64(400.0),
    ],
    ids=repr,
)
def test_number_scalar_and_one_per_sample_are_one_timestep(timestep):
    assert rows(GRID, timestep) == [2, 2, 2]


@pytest.mark.parametrize(
    "dtype", [torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
def test_every_real_dtype_is_taken(dtype):
    assert rows(GRID, torch.tensor([999, 1, 300], dtype=dtype)) == [3, 0, 1]


def test_each_sample_has_its_own_timestep():
    assert rows(GRID, torch.tensor([999, 0, 260])) == [3, 0, 1]


@pytest.mark.parametrize("timestep", [0, 1, 999, 1000, -5, 1e9, -float("inf"), float("inf")])
def test_timesteps_beyond_the_ends_take_the_end(timestep):
    assert rows(GRID, timestep, 1) == [0 if timestep <= 1 else 3]


@pytest.mark.parametrize(
    ("timestep", "row"), [(125.5, 0), (125.498, 0), (125.502, 1), (375, 1), (375.01, 2), (749.5, 2), (749.51, 3)]
)
def test_fractions_go_to_the_nearest_and_ties_to_the_smaller(timestep, row):
    assert rows(GRID, timestep, 1) == [row]
    assert rows(GRID, torch.tensor(timestep), 1) == [row]


def test_nearest_agrees_with_a_search_in_plain_python():
    generator = torch.Generator().manual_seed(0)
    for size in (2, 3, 20, 50):
        grid = torch.randperm(1000, generator=generator)[:size].sort().values.double().tolist()
        timesteps = (torch.randint(-80, 4400, (400,), generator=generator) / 4).tolist()  # quarters, exact in fp32

        assert rows(grid, torch.tensor(timesteps), 400) == [nearest_row(grid, timestep) for timestep in timesteps]


def test_grid_of_fractional_timesteps():
    grid = [0.0, 58.7692, 117.5385, 940.2308, 999.0]

    assert rows(grid, torch.tensor(grid), 5) == [0, 1, 2, 3, 4]


def test_neighbours_that_differ_in_the_last_bit_have_rows_of_their_own():
    """As the timesteps of KDPM2's ancestral sampler do."""
    values = torch.arange(50.0, 1000.0, 50.0)
    values = torch.cat([values, torch.nextafter(values, torch.tensor(0.0))]).sort().values
    grid = TimestepGrid(values.tolist())

    assert grid.rows_of(values.tolist()) == list(range(len(values)))


@pytest.mark.parametrize("timestep", [0, 1, 999, torch.tensor([5.5, 0.0, 999.0])], ids=repr)
def test_one_calibrated_timestep_serves_all(timestep):
    assert rows([999.0], timestep) == [0, 0, 0]


def test_every_timestep_of_a_full_grid_is_told_apart_even_after_a_cast_of_the_model():
    grid = TimestepGrid([float(t) for t in range(1000)])
    timesteps = torch.arange(1000)
    for cast in (lambda g: g, torch.nn.Module.half, torch.nn.Module.bfloat16, torch.nn.Module.double):
        index = cast(grid).nearest(timesteps, 1000, CPU)

        assert torch.equal(index, timesteps.int())
        assert grid.boundaries.dtype == torch.float32


def test_numbers_keep_their_precision_whatever_the_default_dtype():
    grid = [float(t) for t in range(1000)]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # which cannot represent 981
    try:
        assert rows(grid, 981, 1) == [981]
        assert rows(grid, 981.0, 1) == [981]
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(
    ("timestep", "found"),
    [
        (True, "bool"),
        ("500", "str"),
        (None, "NoneType"),
        (5j, "complex"),
        ([500], "list"),
        (torch.tensor([True]), "bool"),
        (torch.tensor([5j]), "complex64"),
    ],
    ids=repr,
)
def test_what_is_no_real_number_is_refused_by_its_type(timestep, found):
    with pytest.raises(TypeError, match=f"timestep must .*{found}"):
        TimestepGrid(GRID).nearest(timestep, 3, CPU)


@pytest.mark.parametrize("shape", [(2,), (4,), (0,), (3, 1), (1, 1), (1, 3)])
def test_other_shapes_are_refused_by_name(shape):
    with pytest.raises(ValueError, match=rf"timestep must .*3 samples.*\[{', '.join(map(str, shape))}\]"):
        TimestepGrid(GRID).nearest(torch.zeros(shape), 3, CPU)


@pytest.mark.parametrize("grid", [[], [2.0, 1.0], [1.0, 1.0], [0.0, 500.0, 250.0]], ids=repr)
def test_grid_must_be_sorted_without_repeats(grid):
    with pytest.raises(ValueError, match="sorted"):
        TimestepGrid(grid)


class NoSync(TorchDispatchMode):
    """Raises if the host would wait for a value from the device."""

    WAITING = (
        torch.ops.aten._local_scalar_dense,
        torch.ops.aten.item,
        torch.ops.aten.nonzero,
        torch.ops.aten.equal,
        torch.ops.aten.is_nonzero,
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in self.WAITING:
            raise RuntimeError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "timestep", [7, 7.5, torch.tensor(7), torch.tensor([7.5]), torch.tensor([0, 500, 999])], ids=repr
)
def test_index_is_found_without_a_sync(timestep):
    grid = TimestepGrid(GRID)
    with pytest.raises(RuntimeError, match="waits"), NoSync():
        torch.tensor(7).item()

    with NoSync():
        grid.before_forward(None, (torch.empty(3, 1), timestep), {})

    assert grid.index.tolist() == [nearest_row(GRID, t) for t in torch.as_tensor(timestep).expand(3).tolist()]


@pytest.mark.parametrize("timestep", [7, torch.tensor(7), torch.tensor([7.5]), torch.tensor([0, 500, 999])], ids=repr)
def test_index_is_found_without_reading_a_value(timestep):
    """Meta tensors have no values; ``tolist`` bypasses PyTorch's dispatcher."""
    meta = torch.device("meta")
    timestep = timestep.to(meta) if torch.is_tensor(timestep) else timestep

    index = TimestepGrid(GRID).nearest(timestep, 3, meta)

    assert (index.shape, index.dtype, index.device) == ((3,), torch.int32, meta)


def test_sample_and_timestep_may_come_by_position_or_by_name(unet2d):
    unet, sample, timestep, rows = unet2d.copy(), unet2d.sample, torch.tensor([0, 750]), []
    unet.mid_block.register_forward_pre_hook(lambda *_: rows.append(unet.timestep_grid.index.tolist()))

    expected = unet(sample, timestep).sample

    assert torch.equal(unet(sample, timestep=timestep).sample, expected)
    assert torch.equal(unet(timestep=timestep, sample=sample).sample, expected)
    assert rows == 3 * [[0, 3]]


@pytest.mark.parametrize(
    ("timestep", "error"), [(True, TypeError), (torch.tensor([1, 2, 3]), ValueError)], ids=["bool", "shape"]
)
def test_unet_refuses_what_the_grid_refuses(unet2d, timestep, error):
    with pytest.raises(error, match="timestep must"):
        unet2d.call(unet2d.quantized, timestep)


def test_another_timestep_selects_another_row(unet2d):
    """Without the time embedding: only the tables differ here."""
    unet, sample = unet2d.copy(), unet2d.sample
    unet.time_proj.forward = lambda timesteps: torch.zeros(len(timesteps), 32)

    assert not torch.equal(unet(sample, 0).sample, unet(sample, 750).sample)
    assert torch.equal(unet(sample, 0).sample, unet(sample, 124).sample)


@pytest.fixture(scope="module")
def plain_unet(new_unet, calibration_call):
    """The smallest quantized UNet: compiling takes long."""
    unet = new_unet(
        block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False
    )
    calibration_set = calibration_call(unet)
    calibration_set.calls.append(copy.deepcopy(calibration_set.calls[0]))
    calibration_set.calls[1].timestep.fill_(20)
    return dq_runtime.calibrate(unet, calibration_set, distillation=None)


def test_compiled_unet_has_no_graph_breaks_and_does_not_recompile_for_another_timestep(plain_unet):
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(plain_unet, fullgraph=True, backend=backend)
    sample = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    compiled(sample, torch.tensor(500))
    frames = backend.frame_count
    outputs = [compiled(sample, torch.tensor(timestep)).sample for timestep in (0, 20, 333, 999)]

    assert backend.frame_count == frames
    for timestep, output in zip((0, 20, 333, 999), outputs, strict=True):
        assert torch.equal(output, plain_unet(sample, torch.tensor(timestep)).sample)


def test_a_group_that_is_no_timesteps_nearest_is_left_out():
    """The middle of 2 and 1000 is 501: 2 is nearer to the group before, 1000 to the one behind."""
    timesteps = [0.0, 1.0, 2.0, 1000.0, 1001.0, 1002.0]

    assert grouped(timesteps, 3) == [0.5, 1001.5]
    assert TimestepGrid(grouped(timesteps, 3)).rows_of(timesteps) == [0, 0, 0, 1, 1, 1]


def test_a_grid_that_was_made_without_memory_has_its_timesteps():
    with torch.device("meta"):
        grid = TimestepGrid([1.0, 5.0, 9.0])

    assert grid.to("meta").to_empty(device=CPU).nearest(torch.tensor([0, 4, 8]), 3, CPU).tolist() == [0, 1, 2]


def failing_call(unet, sample):
    """A forward pass that fails after its first blocks."""
    unet.mid_block.register_forward_pre_hook(fail)
    with pytest.raises(ArithmeticError, match="on purpose"):
        unet(sample, 500)


def fail(*_):
    raise ArithmeticError("on purpose")


def test_a_forward_that_failed_leaves_no_timestep_behind(unet2d):
    unet = unet2d.copy()
    failing_call(unet, unet2d.sample)
    unet.mid_block._forward_pre_hooks.clear()

    with pytest.raises(RuntimeError, match="no timestep is known"):
        unet.forward(unet2d.sample, 0)
    assert torch.equal(unet2d.call(unet), unet2d.call(unet2d.quantized))


def test_a_fused_forward_that_failed_leaves_nothing_behind(unet2d):
    unet = unet2d.copy()
    dq_runtime.fuse(unet)
    state = unet.mid_block.resnets[0].state
    seen = []
    unet.mid_block.register_forward_pre_hook(
        lambda *_: seen.append((len(state._calls.now().statistics), group._calls.now().read))
    )
    (group,) = state.groups.values()

    failing_call(unet, unet2d.sample)

    ((statistics, read),) = seen
    assert read is not None
    assert statistics >= 0
    assert not state._calls.now().statistics
    assert group._calls.now().read is None


@pytest.mark.cuda
def test_the_boundaries_follow_the_sample_once():
    """Weights may be loaded onto a GPU without a move of the model; a copy at each call cannot be captured."""
    grid = TimestepGrid(GRID)
    grid.before_forward(None, (torch.empty(1, 3, device="cuda"), 500), {})
    boundaries = grid.boundaries

    grid.before_forward(None, (torch.empty(1, 3, device="cuda"), 500), {})

    assert boundaries.is_cuda
    assert grid.boundaries is boundaries


def test_copies_of_the_index_end_with_the_call(unet2d_condition):
    unet, copies = unet2d_condition.copy(), []
    tiny_unets.attend_twice(unet)
    unet.conv_out.register_forward_hook(lambda *_: copies.append(len(unet.timestep_grid.calls.now().copies)))

    unet2d_condition.call(unet)
    assert copies == [1]
    assert unet.timestep_grid.calls.now().copies == {}
