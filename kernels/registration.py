"""Registration of the operators with ``torch.library``, whose schemas know tensors and numbers but no records.

An operator's schema is derived from the signature of its oracle: a record becomes its fields, named
``<parameter>_<field>``; those of an optional record are optional. Each implementation takes records; it is wrapped such
that it gets them rebuilt.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_args, get_origin, get_type_hints

import torch

NAMESPACE = "dq_kernels"
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
_library = torch.library.Library(NAMESPACE, "DEF")


def register(
    oracle: Callable[..., Any],
    cpu: Callable[..., Any],
    cuda: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    mutates: Sequence[str] = (),
) -> Callable[..., Any]:
    """Defines the operator that is called as its oracle is.

    Args:
        oracle: the plain form of the operator; its annotations are the operator's signature.
        cpu, cuda: the implementations on CPUs, and on CUDA and HIP devices; same signature.
        fake: makes an empty result from the same arguments.
        mutates: the tensors that the operator changes in place, by their names in the schema.

    Returns:
        the operator, which takes its arguments by position. On CPUs it calls the implementation itself where nothing
        else would happen in PyTorch's dispatcher (see ``is_plain``).
    """
    name = oracle.__name__
    schema = torch.library.infer_schema(_flat_prototype(oracle), mutates_args=mutates)
    _library.define(name + schema, tags=TAGS)
    _library.impl(name, takes_fields(cpu, oracle), "CPU")
    _library.impl(name, takes_fields(on_the_device_of_x(cuda), oracle), "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{name}", takes_fields(fake, oracle), lib=_library)
    registered = getattr(getattr(torch.ops, NAMESPACE), name).default
    records = [record_of(annotation)[0] for _, annotation in _parameters(oracle)]
    absent = [() if record is None else (None,) * len(record._fields) for record in records]

    def operator(*arguments: Any) -> Any:
        if is_plain(arguments):
            return cpu(*arguments)
        fields: list[Any] = []
        for argument, record, nothing in zip(arguments, records, absent, strict=True):
            fields.extend([argument] if record is None else nothing if argument is None else argument)
        return registered(*fields)

    return operator


def is_plain(arguments: Sequence[Any]) -> bool:
    """True if all tensors are on a CPU and nothing intercepts operators: then the dispatcher would only take time.

    What intercepts: compilation, autograd, tensor subclasses, modes, functional transforms and the profiler.
    """
    if (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or type(arguments[0]) is not torch.Tensor
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._autograd._profiler_enabled()
        or torch._C._functorch.peek_interpreter_stack() is not None
    ):
        return False
    for argument in arguments:
        for value in argument if isinstance(argument, tuple) else (argument,):
            if isinstance(value, torch.Tensor) and not value.is_cpu:
                return False
    return True


def takes_fields(implementation: Callable[..., Any], oracle: Callable[..., Any]) -> Callable[..., Any]:
    """An implementation that takes the fields of records one by one, in the order of the oracle's parameters."""
    parts: list[tuple[Any, Any]] = []  # of each parameter: a function that makes its record, its place among the fields
    position = 0
    for _, annotation in _parameters(oracle):
        record, is_optional = record_of(annotation)
        if record is not None:
            make = _record_or_none(record) if is_optional else record
            parts.append((make, slice(position, position + len(record._fields))))
            position += len(record._fields)
        else:
            parts.append((None, position))
            position += 1

    def flat(*fields: Any) -> Any:
        return implementation(*[make(*fields[at]) if make else fields[at] for make, at in parts])

    return flat


def _record_or_none(record: Any) -> Callable[..., Any]:
    return lambda *fields: None if fields[0] is None else record(*fields)


def _flat_prototype(oracle: Callable[..., Any]) -> Callable[..., Any]:
    """A function with the signature from which torch infers the schema."""
    fields: list[tuple[str, Any]] = []
    for name, annotation in _parameters(oracle):
        record, is_optional = record_of(annotation)
        if record is not None:
            hints = get_type_hints(record)
            fields += [(f"{name}_{field}", hint | None if is_optional else hint) for field, hint in hints.items()]
        else:
            fields.append((name, Sequence[int] if get_origin(annotation) is tuple else annotation))

    def prototype(*arguments: Any) -> None: ...

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    prototype.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, kind, annotation=annotation) for name, annotation in fields],
        return_annotation=get_type_hints(oracle)["return"],
    )
    return prototype


def _parameters(oracle: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
    """Names and types of the parameters."""
    hints = get_type_hints(oracle)
    return ((name, hints[name]) for name in inspect.signature(oracle).parameters)


def record_of(annotation: Any) -> tuple[Any, bool]:
    """The record of a parameter, None if it is of another type; and whether the record may be None."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields"):
            return kind, kind is not annotation
    return None, False


def on_the_device_of_x(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, which need not be that of the first argument."""

    def guarded(x: torch.Tensor, *arguments: Any) -> Any:
        with torch.cuda.device_of(x):
            return implementation(x, *arguments)

    return guarded
