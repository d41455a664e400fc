"""The operators with flat keyword arguments: the fields of records as in the registered schemas, ``quantizer_scale``.

So a test can replace one tensor of a record: ``arguments | {"quantizer_scale": ...}``.
"""

import inspect
from types import ModuleType
from typing import get_type_hints

import dq_kernels.cpu
import dq_kernels.ops
import dq_kernels.reference
import dq_kernels.triton
from dq_kernels.registration import record_of

OPERATORS = dq_kernels.triton.__all__


def _parameters(operator):
    """Yields each parameter's name, its record, and the flat names of the record's fields."""
    oracle = getattr(dq_kernels.reference, operator)
    hints = get_type_hints(oracle)
    for name in inspect.signature(oracle).parameters:
        record, _ = record_of(hints[name])
        yield name, record, [f"{name}_{field}" for field in record._fields] if record else [name]


PARAMETERS = {operator: list(_parameters(operator)) for operator in OPERATORS}


class FlatOperators:
    """A module whose operators take the fields of records; its other functions are unchanged."""

    def __init__(self, module: ModuleType):
        self.module = module

    def __getattr__(self, name):
        function = getattr(self.module, name)
        if name not in OPERATORS:
            return function

        def flat(*leading, **fields):
            arguments = {}
            fields |= zip([parameter for parameter, _, _ in PARAMETERS[name]], leading, strict=False)
            for parameter, record, names in PARAMETERS[name]:
                if record is not None:
                    values = [fields.pop(field, None) for field in names]
                    arguments[parameter] = None if values[-1] is None else record(*values)
                elif parameter in fields:
                    arguments[parameter] = fields.pop(parameter)
            assert not fields, f"{name} has no {list(fields)}"
            return function(**arguments)

        return flat


cpu, ops, reference, triton = (
    FlatOperators(module) for module in (dq_kernels.cpu, dq_kernels.ops, dq_kernels.reference, dq_kernels.triton)
)
