"""A failed call leaves a model as it was, whichever line fails, and Ctrl-C waits while a model is restored."""

import random
import signal
import threading

import pytest
import torch
from failing_calls import CALLS, differences, failures, number_of_lines, state_of
from torch import nn

from dq_runtime.rollback import _Attributes, unchanged_on_error, uninterrupted

SLOW = {name for name in CALLS if name.startswith("calibrate")}  # ``make interruptions`` runs them


@pytest.mark.parametrize("name", [name for name in CALLS if name not in SLOW])
def test_a_call_that_fails_at_some_line_leaves_the_model_as_it_was(name):
    lines = number_of_lines(name)
    chosen = random.Random(0).sample(range(lines), 3)

    assert failures(name, [*chosen, lines - 2]) == []


def small_model():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    model[0].register_forward_hook(lambda *_: None)
    model[0].weight.requires_grad_(False)
    return model


def change(model):
    model[1][0] = nn.Identity()
    model.add_module("added", nn.Linear(1, 1))
    model.train(not model.training)
    model.requires_grad_(not model[1].training)
    model[0].register_forward_pre_hook(lambda *_: None)
    model[0]._forward_hooks.clear()
    model[0].__class__ = nn.Identity
    model[0].extra = 3
    del model[0].in_features


def test_an_error_takes_every_change_back():
    model = small_model()
    before = state_of(model)

    def fail():
        with unchanged_on_error(model):
            change(model)
            assert len(differences(before, state_of(model))) > 5
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert differences(before, state_of(model)) == []


def test_without_an_error_every_change_stays():
    model = small_model()
    with unchanged_on_error(model):
        change(model)
    assert isinstance(model[0], nn.Identity)


def test_a_second_ctrl_c_waits_until_the_model_is_restored(monkeypatch):
    model, restore = small_model(), _Attributes.restore
    before = state_of(model)

    def impatient(attributes):
        signal.raise_signal(signal.SIGINT)
        restore(attributes)

    def fail():
        with unchanged_on_error(model):
            change(model)
            raise KeyboardInterrupt

    monkeypatch.setattr(_Attributes, "restore", impatient)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            fail()
    finally:
        signal.signal(signal.SIGINT, handler)
    assert differences(before, state_of(model)) == []


def test_ctrl_c_reaches_the_handler_of_the_user_once_at_the_end():
    calls = []
    before = signal.signal(signal.SIGINT, lambda *_: calls.append("handled"))
    try:
        handler = signal.getsignal(signal.SIGINT)
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            calls.append("end")
        assert calls == ["end", "handled"]
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_sets_no_handler():
    handlers = []

    def run():
        with uninterrupted():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGINT)]


def test_values_of_tensors_stay():
    model = small_model()

    def fail():
        with unchanged_on_error(model), torch.no_grad():
            model[0].bias.fill_(3)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert model[0].bias.tolist() == [3, 3]
