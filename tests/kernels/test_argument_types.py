"""Operators whose arguments are of another class: a TypeError with the parameter's name and what it must be."""

import inspect
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from flat_operators import OPERATORS, ops

import dq_kernels.ops
from dq_kernels.registration import record_of

NOBODY_TAKES = ("x", {}, object(), b"x", 1j, torch.nn.Identity(), torch.Tensor)
OTHERS = {
    torch.Tensor: ("a tensor", (*NOBODY_TAKES, 3, 0.5, True, [1.0], (1,), np.ones((3, 5, 7, 6)), torch.int8)),
    int: ("an integer", (*NOBODY_TAKES, 2.5, [2], (2,), torch.ones(3), np.ones(3))),
    float: ("a number", (*NOBODY_TAKES, [1e-5], torch.ones(3))),
    bool: ("True or False", ("no", {}, object(), b"x", torch.Tensor, [True])),  # PyTorch takes numbers as well
    tuple[int, int]: ("two integers", (*NOBODY_TAKES, None, 1, (1,), (1, 1, 1), (1.0, 1), ("1", 1), [None, 1])),
    torch.dtype: ("a torch.dtype", (*NOBODY_TAKES, None, 32, np.float32, "float32", torch.ones(3))),
}


def parameters_of(op):
    """Flat names, annotations and the names in messages: ``quantizer_scale``, Tensor, ``quantizer.scale``."""
    operator = getattr(dq_kernels.ops, op)
    hints = get_type_hints(operator)
    for name in inspect.signature(operator).parameters:
        record, _ = record_of(hints[name])
        if record is None:
            yield name, hints[name], name
        else:
            for field, hint in get_type_hints(record).items():
                yield f"{name}_{field}", hint, f"{name}.{field}"


@pytest.mark.parametrize("op", OPERATORS)
def test_an_argument_of_another_class_is_refused_by_name(make, op):
    arguments, unclear = make(op), []
    getattr(ops, op)(**arguments)  # these are valid
    for flat, annotation, name in parameters_of(op):
        if name == "with_statistics":
            continue  # any object is a condition in Python
        kinds = get_args(annotation) if type(None) in get_args(annotation) else (annotation,)
        expected, values = OTHERS[kinds[0]]
        for value in values:
            try:
                getattr(ops, op)(**arguments | {flat: value})
            except TypeError as error:
                if not str(error).startswith(f"{op}: {name} must be {expected}") or len(str(error)) > 200:
                    unclear.append(f"{name}={value!r}: {error}")
            except Exception as error:
                unclear.append(f"{name}={value!r}: {error!r}")
            else:
                unclear.append(f"{name}={value!r}: accepted")
    assert not unclear, "\n".join(unclear)


@pytest.mark.parametrize("value", [None, 3, "x", torch.ones(3), (1, 2), []], ids=str)
@pytest.mark.parametrize(
    ("name", "record"), [("weight", "a PackedWeight"), ("quantizer", "a Quantizer"), ("next_quantizer", "a Quantizer")]
)
def test_a_record_of_another_class_is_refused_by_name(name, record, value):
    tensor = torch.ones(3)
    weight, quantizer = dq_kernels.ops.PackedWeight(tensor, tensor, tensor), dq_kernels.ops.Quantizer(*[tensor] * 4, 8)
    records = {"weight": weight, "quantizer": quantizer, "next_quantizer": quantizer} | {name: value}
    operator = dq_kernels.ops.int4_geglu_quantize

    with pytest.raises(TypeError, match=f"^int4_geglu_quantize: {name} must be {record}, got "):
        operator(tensor, **records)


def test_too_many_or_too_few_arguments_are_told_as_python_does():
    with pytest.raises(TypeError, match=r"quantize\(\) missing 1 required positional argument: 'quantizer'"):
        dq_kernels.ops.quantize(torch.ones(2, 4))
    with pytest.raises(TypeError, match=r"quantize\(\) got an unexpected keyword argument 'bits'"):
        dq_kernels.ops.quantize(torch.ones(2, 4), bits=3)
