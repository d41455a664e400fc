"""CUDA graphs of a UNet: when a graph is captured, the results of a replay, and disabling.

Without a GPU a fake graph stands for the real one (``fake_graphs``).
"""

import copy
import gc
import pickle
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny_models
import torch
from fake_graphs import Double, FakeStream, replace_cuda, with_graphs

from dq_runtime import graphs
from dq_runtime.forward_state import ForwardState
from dq_runtime.fused import fuse
from dq_runtime.graphs import disable_cuda_graphs, enable_cuda_graphs
from dq_runtime.timesteps import TimestepGrid


@pytest.fixture
def fake_graphs(monkeypatch):
    return replace_cuda(monkeypatch)


@pytest.fixture
def replayed(fake_graphs):
    """A trivial UNet whose forward is captured."""
    return with_graphs(Double())


X = torch.arange(6.0).reshape(3, 2)


@pytest.mark.supports("Compiling, exporting, graphs", "CUDA graphs", "one graph for each shape serves all timesteps")
def test_replay_computes_from_new_inputs_without_python(replayed, fake_graphs):
    first = replayed(X, 7).sample
    runs = replayed.runs

    second = replayed(-X, 9).sample

    assert torch.equal(first, 2 * X + 7)  # not overwritten by the second call
    assert torch.equal(second, -2 * X + 9)
    assert replayed.runs == runs
    assert fake_graphs.made == 1


def test_inputs_are_left_alone(replayed):
    x, timestep = X.clone(), torch.tensor([3, 2, 1])
    replayed(x, timestep)
    replayed(-X, torch.tensor([4, 4, 4]))

    assert torch.equal(x, X)
    assert timestep.tolist() == [3, 2, 1]


DIFFERENT = {
    "shape": lambda unet: unet(X[:2], 7),
    "dtype": lambda unet: unet(X.double(), 7),
    "strides": lambda unet: unet(X.t().contiguous().t(), 7),
    "timestep of each sample": lambda unet: unet(X, torch.tensor([1, 2, 3])),
    "further tensor": lambda unet: unet(X, 7, X),
    "constant": lambda unet: unet(X, 7, scale=3),
    "structure of the result": lambda unet: unet(X, 7, return_dict=False),
    "order of a dict": lambda unet: unet(X, 7, added={"a": X, "b": X}),
    "list": lambda unet: unet(X, 7, added={"a": [X, X], "b": X}),
}


@pytest.mark.parametrize("call", DIFFERENT.values(), ids=DIFFERENT)
def test_new_signature_gets_a_graph_of_its_own_and_keeps_the_others(replayed, fake_graphs, call):
    replayed(X, 7)

    actual, expected = call(replayed), call(_eager())
    call(replayed)

    assert fake_graphs.made == 2
    assert type(actual) is type(expected)
    assert actual[0].dtype == expected[0].dtype
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(replayed(X, 8).sample, 2 * X + 8)
    assert fake_graphs.made == 2


def _eager():
    class Eager(Double):
        def forward(self, sample, timestep, *args, **kwargs):
            return super().forward(sample, torch.as_tensor(timestep), *args, **kwargs)

    return Eager()


@pytest.mark.parametrize(
    "call",
    [
        lambda unet: unet(X, torch.tensor(7)),
        lambda unet: unet(sample=X, timestep=7),
        lambda unet: unet(X, timestep=torch.tensor(9)),
    ],
    ids=["0-d tensor", "keywords", "timestep as a keyword"],
)
def test_one_signature_has_one_graph_however_it_is_written(replayed, fake_graphs, call):
    replayed(X, 7)
    call(replayed)

    assert fake_graphs.made == 1


def test_constants_of_different_types_have_different_graphs(replayed, fake_graphs):
    x = torch.tensor([[1, 2]])
    assert replayed(x, 1, scale=2).sample.dtype == torch.int64
    assert replayed(x, 1, scale=2.0).sample.dtype == torch.float32
    assert fake_graphs.made == 2


def test_tensors_in_dicts_and_lists_are_inputs(replayed, fake_graphs):
    for factor in (1, 2, 3):
        added = {"a": [X, factor * X], "b": (torch.tensor(factor), factor)}
        expected = 2 * X + 7 + X + factor * X - 2 * factor
        assert torch.equal(replayed(X, 7, added=added).sample, expected)

    assert fake_graphs.made == 3  # factor is a constant in "b"
    added = {"a": [-X, X], "b": (torch.tensor(5), 3)}
    assert torch.equal(replayed(X, 7, added=added).sample, 2 * X + 7 - 5 - 3)
    assert fake_graphs.made == 3


def test_names_of_arguments_and_of_dicts_are_part_of_the_key(replayed):
    assert torch.equal(replayed(X, 7, X).sample, 3 * X + 7)
    assert torch.equal(replayed(X, 7, scale=X).sample, X * X + 7)
    assert torch.equal(replayed(X, 7, added={"a": X}).sample, 3 * X + 7)
    assert torch.equal(replayed(X, 7, added={"b": X}).sample, X + 7)


def test_inputs_of_one_dtype_are_copied_together(replayed, monkeypatch):
    copies = []
    own = torch._foreach_copy_
    call = {"added": {"a": [X, X.double()], "b": [X, X]}, "encoder_hidden_states": X.double()}
    expected = replayed(X, 7, **call).sample
    monkeypatch.setattr(torch, "_foreach_copy_", lambda *lists: copies.append(len(lists[0])) or own(*lists))

    assert torch.equal(replayed(X, 7, **call).sample, expected)

    assert sorted(copies) == [2, 4]


class Own:
    """An argument whose value may change."""

    def __mul__(self, x):
        return 3 * x


@pytest.mark.parametrize(
    "arguments", [{"scale": Own()}, {"scale": Own(), "added": {"a": X}}, {"added": OrderedDict(a=X)}]
)
def test_arguments_that_may_change_run_eagerly(replayed, fake_graphs, arguments):
    for runs in (1, 2):
        replayed(X, torch.tensor(7), **arguments)
        assert replayed.runs == runs

    assert fake_graphs.made == 0


@pytest.mark.parametrize(
    "call",
    [
        lambda unet: unet(X),
        lambda unet: unet(X, 7, sample=X),
        lambda unet: unet(X, 7, None, 2, True, None, 1),
        lambda unet: unet(X, 7, unknown=3),
        lambda unet: unet(X, "7"),
    ],
    ids=["missing", "twice", "too many", "unknown", "no number"],
)
def test_wrong_arguments_are_errors_as_without_graphs(replayed, call):
    replayed(X, 7)

    with pytest.raises((TypeError, AttributeError)):
        call(replayed)


def test_a_replay_maps_no_timestep_in_python(subject, fake_graphs, monkeypatch):
    """The graph maps it: other rows of the tables give other results."""
    unet = with_graphs(subject.copy())
    first = subject.call(unet, 0)
    monkeypatch.setattr(TimestepGrid, "nearest", None)
    monkeypatch.setattr(ForwardState, "begin", None)

    assert not torch.equal(subject.call(unet, 750), first)
    assert torch.equal(subject.call(unet, torch.tensor(0)), first)


def test_a_call_that_wants_a_gradient_runs_eagerly(replayed, fake_graphs):
    x = X.clone().requires_grad_()
    replayed(X, 7)

    with torch.enable_grad():
        replayed(x, torch.tensor(7)).sample.sum().backward()

    assert torch.equal(x.grad, torch.full_like(X, 2))
    assert torch.equal(replayed(x, 7).sample, 2 * X + 7)  # without autograd: the graph
    assert fake_graphs.made == 1


def test_a_gradient_for_a_parameter_runs_eagerly(fake_graphs):
    unet = Double()
    unet.weight = torch.nn.Parameter(torch.tensor(3.0))
    with_graphs(unet)

    with torch.enable_grad():
        unet(X, torch.tensor(7), scale=1).sample.sum()
    assert fake_graphs.made == 0
    unet(X, 7)
    assert fake_graphs.made == 1


def test_autocast_runs_eagerly(replayed, fake_graphs):
    """It keeps casted weights only until it ends."""
    with torch.autocast("cpu", torch.bfloat16):
        replayed(X, torch.tensor(7))

    assert fake_graphs.made == 0


def test_a_model_that_left_its_device_runs_eagerly(replayed, fake_graphs):
    replayed(X, 7)
    runs = replayed.runs

    replayed(X.to("meta"), torch.tensor(7, device="meta"))

    assert replayed.runs == runs + 1
    assert fake_graphs.made == 1


def test_the_least_recently_used_graph_is_freed(fake_graphs):
    unet = with_graphs(Double(), max_graphs=2)
    for rows in (1, 2, 1, 3, 1):  # 3 replaces 2
        assert torch.equal(unet(X[:rows], 7).sample, 2 * X[:rows] + 7)
    assert fake_graphs.made == 3
    gc.collect()
    assert len(fake_graphs.alive) == 2

    unet(X[:2], 7)
    assert fake_graphs.made == 4


@pytest.mark.parametrize("max_graphs", [1, 2, 8])
def test_all_graphs_share_one_pool(fake_graphs, max_graphs):
    """A pool ends with its last graph: the fake one asserts that a graph still holds it."""
    unet = with_graphs(Double(), max_graphs=max_graphs)
    for rows in (1, 2, 3, 1):
        unet(X[:rows], 7)
        gc.collect()
        assert len({graph.memory for graph in fake_graphs.alive}) == 1


def test_no_graph_is_too_few(fake_graphs):
    with pytest.raises(ValueError, match="max_graphs must be at least 1, got 0"):
        with_graphs(Double(), max_graphs=0)


def test_calls_of_several_threads_run_one_after_another(replayed, monkeypatch, fake_graphs):
    replayed(X, 7)
    own = fake_graphs.replay

    def slow_replay(graph):
        time.sleep(0.002)
        own(graph)
        time.sleep(0.002)

    monkeypatch.setattr(fake_graphs, "replay", slow_replay)

    def calls(factor):
        return all(torch.equal(replayed(factor * X, factor).sample, 2 * factor * X + factor) for _ in range(10))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(calls, range(1, 5)))


def test_another_stream_waits_for_the_stream_of_the_call_before(replayed, monkeypatch):
    replayed(X, 7)
    first, second = torch.cuda.current_stream(), FakeStream()
    before = list(first.waits_for)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: second)
    replayed(X, 7)
    replayed(X, 7)
    assert second.waits_for == [first]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: first)
    replayed(X, 7)
    assert first.waits_for == [*before, second]


@pytest.mark.parametrize("failing_run", [1, graphs.WARM_UP_CALLS + 1], ids=["warm-up", "capture"])
def test_a_failed_capture_names_its_remedy_and_changes_nothing(replayed, fake_graphs, monkeypatch, failing_run):
    replayed(X, 7)
    own, runs = Double.forward, replayed.runs

    def forward(self, *args, **kwargs):
        if replayed.runs == runs + failing_run - 1:
            raise torch.OutOfMemoryError("no memory is left")
        return own(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Double, "forward", forward)
        with pytest.raises(
            RuntimeError, match=r"Double cannot be captured .*: no memory is left\..*disable_cuda_graphs"
        ):
            replayed(X[:2], 7)

    made = fake_graphs.made
    assert torch.equal(replayed(X, 8).sample, 2 * X + 8)
    assert fake_graphs.made == made
    assert torch.equal(replayed(X[:2], 7).sample, 2 * X[:2] + 7)


def test_errors_of_the_model_itself_stay_as_they_are(replayed):
    with pytest.raises(RuntimeError, match=r"^The size of tensor a"):
        replayed(X, 7, torch.ones(5, 5))


def test_a_copy_of_the_model_is_eager(replayed, fake_graphs):
    replayed(X, 7)

    copies = [copy.deepcopy(replayed), pickle.loads(pickle.dumps(replayed))]

    for unet in copies:
        assert not graphs.replays_graphs(unet)
        assert torch.equal(unet(X, torch.tensor(7)).sample, 2 * X + 7)
    assert replayed.runs == graphs.WARM_UP_CALLS + 1


def test_modes_of_autograd_may_alternate(replayed, fake_graphs):
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            assert torch.equal(replayed(X + 1, 7).sample, 2 * X + 9)

    assert fake_graphs.made == 1


@pytest.mark.parametrize("is_fused", [False, True], ids=["unfused", "fused"])
def test_every_result_of_a_quantized_unet_is_computed_within_the_graph(
    subject, fake_graphs, relative_rms, is_fused, monkeypatch
):
    """No state of the calls before the capture may be kept: a replay would use it for a new input."""
    unet = subject.copy()
    if is_fused:
        fuse(unet)
    eager = copy.deepcopy(unet)
    with_graphs(unet)
    subject.call(unet, 0)

    changed = copy.deepcopy(subject)
    for value in (changed.sample, *changed.arguments.values()):
        value.copy_(value.flip(0))
    for timestep in (750, torch.tensor([0, 750])):
        assert torch.equal(changed.call(unet, timestep), changed.call(eager, timestep))


@pytest.mark.supports("Pipelines", "T2I-Adapter", "features are added, in CUDA graphs, too")
def test_features_of_a_t2i_adapter_are_captured(unet2d_condition, fake_graphs, relative_rms):
    """The UNet takes them out of the list that it is given."""
    unet, eager = unet2d_condition.copy(), unet2d_condition.copy()
    with_graphs(unet)

    def call(unet):
        features = [torch.ones(2, 32, 4, 4), torch.ones(2, 64, 4, 4)]
        arguments = unet2d_condition.arguments | {"down_intrablock_additional_residuals": features}
        return unet(unet2d_condition.sample, 500, **arguments).sample

    assert relative_rms(unet2d_condition.call(eager), call(eager)) > 0.1
    for _ in range(2):
        assert torch.equal(call(unet), call(eager))


def test_a_fractional_number_of_python_s_is_what_the_unet_takes_it_for(subject, fake_graphs):
    """UNet2DModel makes an integer of it, UNet2DConditionModel does not."""
    unet = subject.copy()
    expected = subject.call(unet, 500.9)

    with_graphs(unet)

    for _ in range(2):
        assert torch.equal(subject.call(unet, 500.9), expected)


def test_the_decoder_of_an_autoencoder_is_captured(fake_graphs):
    vae = tiny_models.autoencoder()
    latents = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = [vae.decode(z).sample for z in latents]
    with_graphs(vae)

    for _ in range(2):
        for z, image in zip(latents, expected, strict=True):
            assert torch.equal(vae.decode(z).sample, image)
    assert fake_graphs.made == 1

    disable_cuda_graphs(vae)
    assert vae.decoder._compiled_call_impl is None


def test_unet_on_a_cpu_is_refused(unet2d):
    with pytest.raises(ValueError, match=r"CUDA device, it is on cpu: move it first"):
        enable_cuda_graphs(unet2d.copy())


@pytest.fixture
def on_fake_cuda(fake_graphs):
    unet = Double()
    unet.device = torch.device("cuda")
    return unet


def test_graphs_cannot_be_enabled_twice(on_fake_cuda):
    enable_cuda_graphs(on_fake_cuda)

    with pytest.raises(ValueError, match="already"):
        enable_cuda_graphs(on_fake_cuda)


def test_disabling_restores_the_forward(on_fake_cuda):
    enable_cuda_graphs(on_fake_cuda)

    disable_cuda_graphs(on_fake_cuda)

    assert on_fake_cuda._compiled_call_impl is None
    disable_cuda_graphs(on_fake_cuda)  # has nothing to do
    enable_cuda_graphs(on_fake_cuda)


def test_disabling_restores_a_call_that_was_compiled_before(on_fake_cuda):
    compiled = on_fake_cuda._compiled_call_impl = lambda *args: "compiled"
    enable_cuda_graphs(on_fake_cuda)

    disable_cuda_graphs(on_fake_cuda)

    assert on_fake_cuda._compiled_call_impl is compiled


def test_warm_up_runs_before_the_capture(replayed):
    replayed(X, 7)

    assert replayed.runs == graphs.WARM_UP_CALLS + 1
