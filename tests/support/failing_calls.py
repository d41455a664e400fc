"""Calls that fail at any line of dq_runtime, and whether they leave a model as it was."""

import copy
import functools
import sys
import tempfile
from pathlib import Path
from unittest import mock

import distilling
import torch
from diffusers import UNet2DConditionModel
from fake_graphs import with_graphs

import dq_runtime
from dq_runtime import DilateQuantConfig, Distillation
from dq_runtime.fused import unfuse

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


@functools.cache
def _stock():
    return distilling.unet2d_condition()


@functools.cache
def _calibration_set():
    return distilling.recorded(_stock())


@functools.cache
def _quantized():
    config = DilateQuantConfig(dilation="weight", int8_attention=["attn1"])
    return dq_runtime.calibrate(copy.deepcopy(_stock()), _calibration_set(), config, distillation=None)


@functools.cache
def _quantized_on_loading():
    with tempfile.TemporaryDirectory() as folder:
        _stock().save_pretrained(folder)
        return UNet2DConditionModel.from_pretrained(folder, quantization_config=DilateQuantConfig())


def _copied(make):
    return lambda: copy.deepcopy(make())


def _fused():
    unet = copy.deepcopy(_quantized())
    dq_runtime.fuse(unet)
    return unet


@torch.no_grad()
def call(unet):
    recorded = _calibration_set().calls[1]
    return unet(recorded.sample[:2], 300, **{n: value[:2] for n, value in recorded.arguments.items()}).sample


def _record(unet):
    with dq_runtime.record(unet):
        call(unet)


def _distil(unet):
    settings = distilling.SMALL | {
        "samples": 8,
        "iterations": 1,
        "polish_iterations": 1,
        "gradient_checkpointing": True,
    }
    dq_runtime.calibrate(unet, _calibration_set(), DilateQuantConfig(**distilling.FEW_BLOCKS), Distillation(**settings))


def _calibrate(unet):
    config = DilateQuantConfig(dilation="joint", int8_attention=["attn1"], **_FEW)
    dq_runtime.calibrate(unet, _calibration_set(), config, distillation=None)


def _training():
    unet = copy.deepcopy(_stock()).train()
    unet.conv_in.requires_grad_(False)
    return unet


_FEW = {"modules_to_not_convert": distilling.FEW_BLOCKS["modules_to_not_convert"]}
CALLS = {  # how the model is made, and what is called with it
    "forward": (_copied(_quantized), call),
    "forward of a fused model": (_fused, call),
    "fuse": (_copied(_quantized), dq_runtime.fuse),
    "unfuse": (_fused, unfuse),
    "dequantize": (_fused, dq_runtime.dequantize),
    "record": (_copied(_stock), _record),
    "enable_cuda_graphs": (_copied(_quantized), with_graphs),
    "disable_cuda_graphs": (lambda: with_graphs(copy.deepcopy(_quantized())), dq_runtime.disable_cuda_graphs),
    "calibrate": (_training, _calibrate),
    "calibrate what was quantized on loading": (
        _copied(_quantized_on_loading), lambda unet: dq_runtime.calibrate(unet, _calibration_set(), distillation=None)
    ),
    "calibrate with distillation": (_training, _distil),
}  # fmt: skip


def number_of_lines(name):
    make, function = CALLS[name]
    unet = make()
    return run_counting(lambda: function(unet))[0]


def _outline(model):
    """The classes of all modules, and the names of their attributes."""
    return [(name, type(module), sorted(vars(module))) for name, module in model.named_modules()]


def failures(name, lines):
    """Fails a call before each of some lines, half of them with a Ctrl-C; returns what differed afterwards, as text.

    The model may also be what a successful call makes of it: the call may fail on its way out.
    """
    make, function = CALLS[name]
    unet, found = make(), []
    function(unet)
    complete, unet = _outline(unet), None
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(tempfile, "tempdir", folder):
        for number, line in enumerate(lines):
            if unet is None:
                unet = make()
                expected = None if "graphs" in name else call(unet)
                before = state_of(unet)
            error = (KeyboardInterrupt, MemoryError)[number % 2]
            _, caught = run_counting(lambda unet=unet: function(unet), line, error)
            if caught is None:  # caches make a later call shorter
                unet = None
                continue
            place = f"{error.__name__} at {str(caught).removeprefix(OURS)}"
            caught = None
            different = differences(before, state_of(unet))
            if not different and expected is not None and not torch.equal(call(unet), expected):
                different = ["the result"]
            if different and _outline(unet) == complete:
                different, unet = [], None
            different += [f"{file} is left" for file in Path(folder).rglob("*") if file.is_file()]
            if different:
                found.append(f"{place}: {', '.join(different[:5])}" + f" and {len(different)} in all")
                unet = None
    return found
