"""Calls past PyTorch's dispatcher: only where nothing could intercept them, and with the dispatched result."""

import pytest
import torch
from flat_operators import ops
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dq_kernels import registration


class SeesDispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **kwargs or {})


class SeesFunctions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **kwargs or {})


INTERCEPTIONS = {
    "autograd": torch.enable_grad,
    "dispatch mode": SeesDispatch,
    "function mode": SeesFunctions,
    "profiler": lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
}


@pytest.fixture
def plain_calls(monkeypatch):
    """For each call of an operator, whether it went past the dispatcher."""
    known, is_plain = [], registration.is_plain

    def recorded(arguments):
        known.append(is_plain(arguments))
        return known[-1]

    monkeypatch.setattr(registration, "is_plain", recorded)
    return known


@pytest.fixture
def arguments(linear_arguments, quantizer_arguments):
    following = {f"next_{name}": value for name, value in quantizer_arguments(2, 4).items()}
    return linear_arguments((2, 5, 6), 4)[0] | following


@pytest.mark.parametrize("following", [True, False])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_result_is_the_dispatched_one(arguments, plain_calls, mode, following):
    if not following:
        arguments |= {name: None for name in arguments if name.startswith("next_")}
    expected = ops.int4_linear(**arguments)

    with mode():
        assert torch.equal(ops.int4_linear(**arguments), expected)

    assert plain_calls == [False, True]


@pytest.mark.parametrize("interception", INTERCEPTIONS.values(), ids=INTERCEPTIONS)
def test_what_intercepts_operators_sees_them(arguments, plain_calls, interception):
    with torch.no_grad(), interception():
        ops.int4_linear(**arguments)

    assert plain_calls == [False]


def test_functional_transforms_see_operators(arguments, plain_calls):
    def call(x):
        return ops.int4_linear(**arguments | {"x": x})

    with torch.no_grad():
        torch.vmap(call)(arguments["x"][None])

    assert plain_calls == [False]


def test_weights_on_another_device_are_reported_as_ever(arguments, plain_calls):
    """Their memory must not be read."""
    with torch.no_grad(), pytest.raises(ValueError, match="one argument is on cpu, another on meta"):
        ops.int4_linear(**arguments | {"weight_values": arguments["weight_values"].to("meta")})

    assert plain_calls == [False]


@pytest.mark.parametrize("name", ["quantizer_scale", "next_quantizer_dilation"])
def test_tables_on_another_device_are_left_to_the_dispatcher(arguments, plain_calls, name):
    with torch.no_grad():
        ops.int4_linear(**arguments | {name: arguments[name].to("meta")})

    assert plain_calls == [False]
