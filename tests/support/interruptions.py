"""Calls that fail at any line of dq_runtime, and whether they leave a model as it was."""

import sys
from pathlib import Path

import torch

import dq_runtime

OURS = str(Path(dq_runtime.__file__).parent)


def run_counting(function, failing_line=None, error=KeyboardInterrupt):
    """Calls a function and raises an error before its ``failing_line``-th line in dq_runtime, counted from 0.

    Returns:
        the number of lines that ran, and the error that came out of the function, None if none did.
    """
    lines = 0

    def trace(frame, event, argument):
        nonlocal lines
        if event == "call":
            return trace if frame.f_code.co_filename.startswith(OURS) else None
        if event == "line":
            lines += 1
            if lines - 1 == failing_line:
                sys.settrace(None)
                raise error(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    except BaseException as caught:
        sys.settrace(before)
        if not isinstance(caught, error):
            raise
        return lines, caught
    finally:
        sys.settrace(before)
    return lines, None


def _described(value):
    """A value that can be compared later: objects by identity, containers by their content."""
    if isinstance(value, dict):
        return [(key, _described(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return [_described(item) for item in value]
    return value if isinstance(value, (int, float, str, type(None))) else id(value)


def state_of(model):
    """Everything about a model but the values of its tensors: modules, classes, attributes, hooks, flags."""
    modules = {
        name: (id(module), type(module), {key: _described(value) for key, value in vars(module).items()})
        for name, module in model.named_modules()
    }
    return modules, [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]


def differences(before, after):
    """What differs between two states, as text."""
    (modules, parameters), (modules_now, parameters_now) = before, after
    found = [f"{name}: a module came or went" for name in modules.keys() ^ modules_now.keys()]
    for name in modules.keys() & modules_now.keys():
        (_, kind, own), (_, kind_now, own_now) = modules[name], modules_now[name]
        if modules[name][:2] != modules_now[name][:2]:
            found.append(f"{name}: a {kind_now.__name__}, was a {kind.__name__}")
        found += [f"{name}.{key}" for key in own.keys() | own_now.keys() if own.get(key) != own_now.get(key)]
    if parameters != parameters_now:
        found.append("parameters or their requires_grad")
    return found


def same_tensors(a, b):
    """True if two state dicts hold the same bits."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
