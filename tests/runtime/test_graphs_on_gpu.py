"""CUDA graphs of UNets on a GPU: replays have the results of eager calls."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import UNet2DModel

from dq_runtime.fused import fuse
from dq_runtime.graphs import disable_cuda_graphs, enable_cuda_graphs


@pytest.fixture(params=["stock", "quantized", "fused"])
def on_gpu(request, subject):
    """A UNet on a GPU in fp16, and a function that calls it or another."""
    unet = copy.deepcopy(subject.stock if request.param == "stock" else subject.quantized)
    if request.param == "fused":
        fuse(unet)
    arguments = {name: value.cuda().half() for name, value in subject.arguments.items()}

    def call(unet, timestep, sample=subject.sample, **changed):
        timestep = timestep.cuda() if isinstance(timestep, torch.Tensor) else timestep
        return unet(sample.cuda().half(), timestep, **arguments | changed).sample

    return unet.cuda().half(), call


# The eager forward and the captured one run the same kernels.
TIMESTEPS = [0, 750, 500.5, torch.tensor(250), torch.tensor([0, 750]), torch.tensor([750.0, 0.0])]


@pytest.mark.cuda
def test_replay_is_the_eager_forward(on_gpu):
    unet, call = on_gpu
    expected = [call(unet, timestep) for timestep in TIMESTEPS]

    enable_cuda_graphs(unet)
    captured = [call(unet, timestep) for timestep in TIMESTEPS]
    replayed = [call(unet, timestep) for timestep in TIMESTEPS]

    for results in (captured, replayed):  # all still alive: no call may write into an earlier one's result
        for actual, wanted in zip(results, expected, strict=True):
            assert torch.equal(actual, wanted)
    # Integer or float, one for all samples or one for each; UNet2DModel makes an integer of Python's float.
    assert len(unet._compiled_call_impl._graphs) == (3 if isinstance(unet, UNet2DModel) else 4)


@pytest.mark.cuda
def test_replay_reads_every_input(on_gpu, subject):
    unet, call = on_gpu
    sample = -subject.sample
    changed = {name: -value.cuda().half() for name, value in subject.arguments.items()}
    expected = call(unet, 500, sample, **changed)

    enable_cuda_graphs(unet)
    call(unet, 0)

    assert torch.equal(call(unet, 500, sample, **changed), expected)


@pytest.mark.cuda
def test_new_shapes_are_captured_and_old_ones_replayed(on_gpu, subject):
    unet, call = on_gpu
    wide = torch.cat([subject.sample, subject.sample], dim=-1)
    expected = call(unet, 500), call(unet, 500, wide)

    enable_cuda_graphs(unet)

    for _ in range(2):
        assert torch.equal(call(unet, 500), expected[0])
        assert torch.equal(call(unet, 500, wide), expected[1])
    assert len(unet._compiled_call_impl._graphs) == 2


@pytest.mark.cuda
def test_inference_mode_and_no_grad_share_a_graph(on_gpu):
    unet, call = on_gpu
    expected = call(unet, 500)
    enable_cuda_graphs(unet)

    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(call(unet, 500), expected)
    assert len(unet._compiled_call_impl._graphs) == 1


@pytest.mark.cuda
def test_disabled_graphs_leave_an_eager_unet(on_gpu):
    unet, call = on_gpu
    expected = call(unet, 500)
    enable_cuda_graphs(unet)
    call(unet, 500)
    with pytest.raises(ValueError, match="already"):
        enable_cuda_graphs(unet)

    disable_cuda_graphs(unet)

    assert unet._compiled_call_impl is None
    assert torch.equal(call(unet, 500), expected)


@pytest.mark.cuda
def test_a_unet_that_is_moved_away_and_back_is_captured_again(on_gpu):
    unet, call = on_gpu
    expected = call(unet, 500)
    enable_cuda_graphs(unet)
    call(unet, 0)
    before = torch.cuda.memory_allocated()

    unet.to("cpu")

    weights = sum(p.numel() * p.element_size() for p in unet.parameters())
    assert torch.cuda.memory_allocated() < before - weights / 2
    unet.to("cuda")
    occupied = [torch.full_like(p, 1) for p in unet.parameters()]  # where the weights were
    assert torch.equal(call(unet, 500), expected)
    assert len(occupied) == len(list(unet.parameters()))


@pytest.mark.cuda
def test_weights_that_are_replaced_are_used(on_gpu):
    unet, call = on_gpu
    enable_cuda_graphs(unet)
    call(unet, 500)
    state = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    state["conv_out.bias"] += 1

    unet.load_state_dict(state, assign=True)
    actual = call(unet, 500)

    disable_cuda_graphs(unet)
    assert torch.equal(actual, call(unet, 500))


@pytest.mark.cuda
def test_graphs_of_several_shapes_share_their_memory(on_gpu, subject):
    unet, call = on_gpu
    samples = [torch.cat(n * [subject.sample], dim=-1) for n in (1, 2, 3)]
    expected = [call(unet, 500, sample) for sample in samples]
    enable_cuda_graphs(unet, max_graphs=2)

    for _ in range(2):
        for sample, wanted in zip(samples, expected, strict=True):
            assert torch.equal(call(unet, 500, sample), wanted)

    captured = unet._compiled_call_impl._graphs.values()
    assert len(captured) == 2
    assert len({forward.graph.pool() for forward in captured}) == 1


@pytest.mark.cuda
def test_calls_on_two_streams_do_not_mix(on_gpu):
    unet, call = on_gpu
    expected = [call(unet, timestep) for timestep in (0, 750)]
    enable_cuda_graphs(unet)
    call(unet, 0)
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()

    for _ in range(20):
        results = []
        for stream, timestep in zip(streams, (0, 750), strict=True):
            with torch.cuda.stream(stream):
                results.append(call(unet, timestep))
        torch.cuda.synchronize()
        assert all(torch.equal(actual, wanted) for actual, wanted in zip(results, expected, strict=True))


@pytest.mark.cuda
def test_threads_get_their_own_results(on_gpu):
    unet, call = on_gpu
    timesteps = (0, 250, 500, 750)
    expected = [call(unet, timestep) for timestep in timesteps]
    enable_cuda_graphs(unet)
    torch.cuda.synchronize()

    def calls(timestep, wanted):
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            return all(torch.equal(call(unet, timestep), wanted) for _ in range(10))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(calls, timesteps, expected))
