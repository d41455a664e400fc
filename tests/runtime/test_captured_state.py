"""A model with CUDA graphs may be changed at any time: it is captured again, or runs eagerly."""

import copy
import gc
import weakref

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from fake_graphs import Double, replace_cuda, with_graphs
from torch import nn

from dq_runtime.attention import Int8AttnProcessor
from dq_runtime.captured_state import ModelState
from dq_runtime.fused import fuse, unfuse


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("table", torch.tensor([1.0, 2.0]))
        self.register_buffer("single", torch.tensor([1.0]))
        self.gain = 1.0
        self.norm = nn.LayerNorm(2)
        self.dropout = nn.Dropout(1.0).eval()
        self.tail = nn.Sequential()
        self.processor = AttnProcessor2_0()

    def forward(self, x):
        x = self.dropout(self.linear(x)) + self.norm(x)
        return self.tail(self.gain * x * self.table + self.single)


class Weighted(Double):
    """A UNet with weights, a table and an attribute."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, sample, timestep):
        self.counter[0] += 1
        for block in self.blocks:
            sample = block(sample)
        return (sample + timestep,)


X = torch.arange(6.0).reshape(3, 2)
KEPT = []  # old tensors stay alive, so that no memory is freed


@pytest.fixture
def fake_graphs(monkeypatch):
    KEPT.clear()
    return replace_cuda(monkeypatch)


@pytest.fixture
def unet(fake_graphs):
    torch.manual_seed(0)
    return Weighted()


def other_data(block):
    KEPT.append(block.linear.weight.data)
    block.linear.weight.data = block.linear.weight.data + 1


def other_parameter(block):
    KEPT.append(block.linear.bias)
    block.linear.bias = nn.Parameter(block.linear.bias + 1)


def other_buffer(block):
    KEPT.append(block.table)
    block.table = block.table + 1


def other_single_value(block):
    """The new tensor has the same value at first."""
    KEPT.append(block.single)
    block.single = block.single.clone()
    KEPT.append(block.single)


def assigned_weights(block):
    state = block.linear.state_dict()
    KEPT.append(state)
    block.linear.load_state_dict({name: tensor + 1 for name, tensor in state.items()}, assign=True)


def another_dtype_and_back(block):
    block.linear.weight.data[0, 0] = 1.001
    block.linear.half().float()


def other_module(block):
    KEPT.append(block.linear)
    block.linear = nn.Linear(2, 2)


def further_layer(block):
    """The last dict of members grows."""
    block.linear = nn.Sequential(block.linear, nn.ReLU())


def first_member(block):
    block.tail.append(nn.Tanh())


def other_class(block):
    class Negative(nn.Linear):
        def forward(self, x):
            return -super().forward(x)

    block.linear.__class__ = Negative


def other_attribute(block):
    block.gain = 3.0


def other_constant_of_a_norm(block):
    block.norm.eps = 10.0


def dropout_switched_on(block):
    block.dropout.train()


CHANGES = [
    other_data,
    other_parameter,
    other_buffer,
    assigned_weights,
    another_dtype_and_back,
    other_module,
    further_layer,
    first_member,
    other_class,
    other_attribute,
    other_constant_of_a_norm,
    dropout_switched_on,
]


@pytest.mark.supports("Compiling, exporting, graphs", "CUDA graphs of a changed model", "are captured again")
@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_captured_again(unet, fake_graphs, change, position):
    with_graphs(unet)
    unet(X, 7)

    change(unet.blocks[position])
    actual = unet(X, 7)

    assert torch.equal(actual[0], copy.deepcopy(unet)(X, 7)[0])
    assert fake_graphs.made == 2
    assert torch.equal(unet(X, 8)[0], copy.deepcopy(unet)(X, 8)[0])
    assert fake_graphs.made == 2


def test_a_single_value_that_was_replaced_by_an_equal_one_is_found(unet):
    with_graphs(unet)
    unet(X, 7)

    other_single_value(unet.blocks[1])
    unet(X, 7)
    unet.blocks[1].single.fill_(5)

    assert torch.equal(unet(X, 7)[0], copy.deepcopy(unet)(X, 7)[0])


def test_tensors_that_the_first_call_replaces_are_those_of_the_graph(fake_graphs):
    """As a call merges the weights of a model that was copied."""

    class Lazy(Weighted):
        def forward(self, sample, timestep):
            weight = self.blocks[0].linear.weight
            if not self.runs:
                weight.data = weight.data.clone()
            return super().forward(sample, timestep)

    unet = with_graphs(Lazy())
    for _ in range(2):
        unet(X, 7)

    assert fake_graphs.made == 1


def test_values_that_are_loaded_in_place_keep_the_graph(unet, fake_graphs):
    with_graphs(unet)
    unet(X, 7)

    unet.load_state_dict({name: tensor + 1 for name, tensor in unet.state_dict().items()})

    assert torch.equal(unet(X, 7)[0], copy.deepcopy(unet)(X, 7)[0])
    assert fake_graphs.made == 1


def test_all_graphs_of_a_changed_model_are_freed(unet, fake_graphs):
    with_graphs(unet)
    unet(X, 7)
    unet(X[:2], 7)

    other_attribute(unet.blocks[0])
    unet(X, 7)
    gc.collect()

    assert len(fake_graphs.alive) == 1


# Python code that must run at each call.


def count(calls, *_):
    calls.append(1)


def forward_hook(unet, calls):
    return unet.blocks[1].linear.register_forward_hook(lambda *_: count(calls)).remove


def pre_hook(unet, calls):
    return unet.blocks[0].register_forward_pre_hook(lambda *_: count(calls)).remove


def hook_of_the_entry(unet, calls):
    return unet.register_forward_hook(lambda *_: count(calls)).remove


def global_hook(unet, calls):
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, *_: count(calls) if module is unet.blocks[0] else None
    )
    return hook.remove


def replaced_forward(module):
    """As offloading and caching replace it."""

    def replaced_forward(unet, calls):
        replaced = module(unet)
        own = replaced.forward

        def forward(*args, **kwargs):
            count(calls)
            return own(*args, **kwargs)

        replaced.forward = forward
        return lambda: delattr(replaced, "forward")

    return replaced_forward


class OwnProcessor(AttnProcessor2_0):
    pass


HOOKS = {
    "forward hook": forward_hook,
    "pre-hook": pre_hook,
    "entry": hook_of_the_entry,
    "global hook": global_hook,
    "layer's forward": replaced_forward(lambda unet: unet.blocks[0].linear),
    "block's forward": replaced_forward(lambda unet: unet.blocks[1]),
    "entry's forward": replaced_forward(lambda unet: unet),
}


@pytest.mark.supports("Compiling, exporting, graphs", "hooks", "run at each call")
@pytest.mark.parametrize("register", HOOKS.values(), ids=HOOKS)
def test_hooks_run_at_each_call_and_the_graph_serves_again_without_them(unet, fake_graphs, register):
    with_graphs(unet)
    unet(X, 7)
    calls, expected = [], copy.deepcopy(unet)(X, 8)[0]

    remove = register(unet, calls)
    for _ in range(3):
        assert torch.equal(unet(X, 8)[0], expected)
    assert len(calls) == 3
    remove()

    runs = unet.runs
    assert torch.equal(unet(X, 8)[0], expected)
    assert len(calls) == 3
    assert unet.runs == runs
    assert fake_graphs.made == 1


@pytest.mark.parametrize("register", HOOKS.values(), ids=HOOKS)
def test_hooks_that_are_there_before_the_graphs_run_at_each_call(unet, fake_graphs, register):
    calls = []
    remove = register(unet, calls)
    with_graphs(unet)

    for _ in range(3):
        unet(X, 8)
    remove()

    assert len(calls) == 3
    assert fake_graphs.made == 0


def test_users_attention_processors_run_at_each_call(unet, fake_graphs):
    with_graphs(unet)
    unet(X, 7)
    runs = unet.runs

    unet.blocks[1].processor = OwnProcessor()
    for _ in range(3):
        unet(X, 7)

    assert unet.runs == runs + 3
    assert fake_graphs.made == 1


def test_users_attention_processors_that_are_there_before_run_at_each_call(unet, fake_graphs):
    unet.blocks[1].processor = OwnProcessor()
    with_graphs(unet)

    for runs in (1, 2, 3):
        unet(X, 7)
        assert unet.runs == runs

    assert fake_graphs.made == 0


def test_a_compiled_forward_of_the_entry_is_captured(unet, fake_graphs):
    unet.forward = torch.compile(unet.forward, backend="eager")
    with_graphs(unet)

    assert torch.equal(unet(X, 7)[0], Weighted.forward(unet, X, 7)[0])
    assert fake_graphs.made == 1


# Memory.


def replaced(layer):
    layer.weight = nn.Parameter(torch.ones(2, 2))


def assigned(layer):
    layer.load_state_dict({name: tensor.clone() for name, tensor in layer.state_dict().items()}, assign=True)


def test_freed_memory_is_known_at_once():
    layer = nn.Linear(2, 2)
    state = ModelState(layer)
    assert not state.freed

    layer.half()

    assert state.freed


@pytest.mark.parametrize("change", [replaced, assigned])
def test_the_memory_of_replaced_weights_is_not_freed_before_the_next_call(change):
    layer = nn.Linear(2, 2)
    memory = weakref.ref(layer.weight.untyped_storage())
    state = ModelState(layer)

    change(layer)

    assert memory() is not None
    assert not state.unchanged()


def test_no_graph_is_launched_that_reads_freed_memory(unet, monkeypatch, fake_graphs):
    """The fake graph holds the weights that it reads, so the note of freed memory is made by hand."""
    with_graphs(unet)
    unet(X, 7)
    (old,) = fake_graphs.alive
    launches = []
    monkeypatch.setattr(old, "replay", lambda: launches.append(1))

    unet._compiled_call_impl._state.freed.append("a weight")
    result = unet(X, 7)[0]

    assert not launches
    assert torch.equal(result, copy.deepcopy(unet)(X, 7)[0])


@pytest.mark.supports("Offloading", "CUDA graphs", "are freed, and calls run eagerly")
def test_graphs_of_an_offloaded_model_are_freed(unet, fake_graphs):
    """An offloader replaces forwards, and moves the weights."""
    with_graphs(unet)
    unet(X, 7)
    own = unet.blocks[0].forward
    unet.blocks[0].forward = lambda x: own(x)
    unet(X, 7)
    assert len(fake_graphs.alive) == 1

    unet._compiled_call_impl._state.freed.append("a weight")
    unet(X, 7)
    gc.collect()

    assert not fake_graphs.alive


# Real UNets.


@pytest.fixture
def replayed(unet2d_condition, fake_graphs):
    """A quantized UNet with graphs, and a function that compares it with its eager copy."""
    unet = with_graphs(unet2d_condition.copy())

    def check():
        actual = unet2d_condition.call(unet)
        assert torch.equal(actual, unet2d_condition.call(copy.deepcopy(unet)))
        return actual

    check()
    return unet, check


def test_an_unchanged_unet_is_found_unchanged(replayed, fake_graphs, unet2d_condition):
    unet, check = replayed
    assert unet._compiled_call_impl._state.unchanged()
    unet._compiled_call_impl.eager(unet2d_condition.sample, 0, **unet2d_condition.arguments)

    check()

    assert fake_graphs.made == 1


def test_a_unet_is_fused_and_unfused_between_calls(replayed, fake_graphs):
    unet, check = replayed

    fuse(unet)
    check()
    unfuse(unet)
    check()

    assert fake_graphs.made == 3


def test_freeu_is_part_of_the_key(replayed, fake_graphs):
    unet, check = replayed
    plain = check()
    for _ in range(2):
        unet.enable_freeu(0.9, 0.2, 1.2, 1.4)
        assert not torch.equal(check(), plain)
        unet.disable_freeu()
        assert torch.equal(check(), plain)

    assert fake_graphs.made == 2


def test_other_processors_are_captured(replayed, fake_graphs):
    unet, check = replayed

    unet.set_attn_processor(Int8AttnProcessor())
    check()

    assert fake_graphs.made == 2


@pytest.mark.supports("Compiling, exporting, graphs", "scales of IP-Adapters", "are heeded by CUDA graphs")
def test_the_scale_of_an_ip_adapter_is_part_of_the_key(unet, fake_graphs):
    """diffusers changes it inside of a list."""
    for block in unet.blocks:
        block.processor.scale = [1.0]
    with_graphs(unet)
    unet(X, 7)
    for scale in (0.5, 1.0, 0.5):
        unet.blocks[1].processor.scale[0] = scale
        unet(X, 7)

    assert fake_graphs.made == 2


def test_adapters_and_their_scales_are_part_of_the_key(replayed, fake_graphs):
    peft = pytest.importorskip("peft")
    unet, check = replayed
    plain = check()
    config = peft.LoraConfig(r=2, target_modules=["to_q", "conv1"], init_lora_weights=False)
    unet.add_adapter(config, "style")
    full = check()
    assert not torch.equal(full, plain)

    results = []
    for scale in (0.5, 1.0, 0.5):
        unet.set_adapters("style", scale)
        results.append(check())
    unet.disable_adapters()
    results.append(check())

    assert fake_graphs.made == 4  # without the adapter, with both scales, disabled
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], full)
    assert not torch.equal(results[0], full)
    unet.delete_adapters("style")
    assert torch.equal(check(), plain)
