"""Checks of the operators' arguments: each error names the operator, the argument and the values that it may have.

Symbols are those of ``ops``.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, get_args, get_type_hints

import torch
from torch import Tensor

from dq_kernels.records import Norm, PackedWeight, Quantizer
from dq_kernels.shapes import MAX_REDUCTION, quantized_shape

COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_ELEMENTS = 2**31 - 1  # the kernels count elements in int32
MAX_SAMPLES = 2**16 - 1  # of a launch grid's third dimension
_FLOATS = "float16, bfloat16 or float32"
_FLOAT32, _INT32 = (torch.float32,), (torch.int32,)
_KINDS: dict[Any, tuple[str, Any]] = {  # annotation -> how a message calls it, and the classes that it admits
    Tensor: ("a tensor", Tensor),
    int: ("an integer", (int, torch.SymInt)),
    float: ("a number", (float, int)),
    bool: ("True or False", bool),
    torch.dtype: ("a torch.dtype", torch.dtype),
    type(None): ("None", type(None)),
}
Operator = TypeVar("Operator", bound=Callable[..., Any])


def names_wrong_types(operator: Operator) -> Operator:
    """An operator whose error is a TypeError with the parameter's name if an argument is of another class.

    Arguments are compared with their annotations once the operator has failed, so a call that succeeds costs one more
    call in Python.
    """

    @functools.wraps(operator)
    def named(*args: Any, **kwargs: Any) -> Any:
        try:
            return operator(*args, **kwargs)
        except Exception as error:
            for name, expected, value in _wrong_types(operator, args, kwargs):
                raise TypeError(
                    f"{operator.__name__}: {name} must be {expected}, got {_with_article(type(value).__name__)}"
                ) from error
            raise

    return named  # type: ignore[return-value]


def _wrong_types(operator: Callable[..., Any], args: Any, kwargs: Any) -> Iterator[tuple[str, str, Any]]:
    """The parameters of other classes than those annotated: name, what was expected, value."""
    try:
        arguments = inspect.signature(operator).bind(*args, **kwargs).arguments
    except TypeError:  # a parameter too few or too many, which Python itself names
        return
    hints = get_type_hints(operator)
    for name, value in arguments.items():
        yield from _wrong_type(name, value, hints[name])


def _wrong_type(name: str, value: Any, annotation: Any) -> Iterator[tuple[str, str, Any]]:
    record = next((kind for kind in (annotation, *get_args(annotation)) if hasattr(kind, "_fields")), None)
    if record is not None and isinstance(value, tuple) and len(value) == len(record._fields):
        for field, hint, part in zip(record._fields, get_type_hints(record).values(), value, strict=True):
            yield from _wrong_type(f"{name}.{field}", part, hint)
    elif annotation == tuple[int, int]:
        if not isinstance(value, tuple) or len(value) != 2 or not all(_is_a(size, int) for size in value):
            yield name, "two integers", value
    else:
        kinds = get_args(annotation) or (annotation,)
        if not any(_is_a(value, kind) for kind in kinds):
            yield name, " or ".join(_KINDS[k][0] if k in _KINDS else f"a {k.__name__}" for k in kinds), value


def _is_a(value: Any, kind: Any) -> bool:
    is_bool = isinstance(value, bool) and kind is not bool  # Python's bools are integers
    return kind in _KINDS and isinstance(value, _KINDS[kind][1]) and not is_bool


def _with_article(name: str) -> str:
    return name if name == "NoneType" else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def check_tensor(
    op: str,
    name: str,
    tensor: Tensor,
    dtypes: tuple[torch.dtype, ...],
    shape: Sequence[int | str],
    any_strides: bool = False,
) -> None:
    """Raises unless the tensor is contiguous and has one of the dtypes and the shape, where a letter is any size.

    The message is made only when it is needed: formatting sizes makes torch.compile specialize on them.
    """
    fits = tensor.dtype in dtypes and (any_strides or tensor.is_contiguous())
    if fits and tensor.shape != shape:  # one comparison, without a loop, for most tensors
        fits = tensor.ndim == len(shape)
        for actual, wanted in zip(tensor.shape, shape, strict=False):
            if not isinstance(wanted, str) and actual != wanted:
                fits = False
    if not fits:
        raise ValueError(
            f"{op}: {name} must be {'' if any_strides else 'contiguous '}{' or '.join(str(dtype) for dtype in dtypes)} "
            f"[{', '.join(str(size) for size in shape)}], "
            f"got {tensor.dtype} {list(tensor.shape)} with strides {list(tensor.stride())}"
        )


def check_quantizer(
    op: str, quantizer: Quantizer, batch: int, channels: int | None = None, name: str = "quantizer"
) -> None:
    """Its tables and, where the operator divides by it, its dilation of so many channels."""
    dilation, scale, zero_point, timestep_index, bits = quantizer
    if (
        scale.dtype == torch.float32
        and zero_point.dtype == timestep_index.dtype == torch.int32
        and scale.ndim == 1
        and scale.shape == zero_point.shape
        and timestep_index.shape == (batch,)
        and scale.is_contiguous()
        and zero_point.is_contiguous()
        and timestep_index.is_contiguous()
        and (
            channels is None
            or (dilation.dtype == torch.float32 and dilation.shape == (channels,) and dilation.is_contiguous())
        )
        and 2 <= bits <= 8
    ):
        return  # in one step: a forward pass has hundreds of quantizers
    if channels is not None:
        check_tensor(op, f"{name}.dilation", dilation, _FLOAT32, (channels,))
    check_tensor(op, f"{name}.scale", scale, _FLOAT32, ("T",))
    check_tensor(op, f"{name}.zero_point", zero_point, _INT32, scale.shape)
    check_tensor(op, f"{name}.timestep_index", timestep_index, _INT32, (batch,))
    if bits < 2 or bits > 8:
        raise ValueError(f"{op}: {name}.bits must be 2 to 8, got {bits}")


def check_another_quantizer(op: str, name: str, other: Quantizer, quantizer: Quantizer, channels: int) -> None:
    """A second quantizer of the same samples, for so many channels and the same number of timesteps."""
    check_quantizer(op, other, quantizer.timestep_index.shape[0], channels, name)
    if other.scale.shape != quantizer.scale.shape:
        raise ValueError(
            f"{op}: {name}.scale has {other.scale.numel()} timesteps, quantizer.scale {quantizer.scale.numel()}"
        )


def check_floats(op: str, name: str, x: Tensor, shape: Sequence[int | str]) -> None:
    """A float tensor with any strides, a sample of which the kernels can count."""
    if "..." not in shape:
        check_tensor(op, name, x, COMPUTE_DTYPES, shape, any_strides=True)
    elif x.dtype not in COMPUTE_DTYPES or x.ndim < 2:
        raise ValueError(f"{op}: {name} must be {_FLOATS} [B, ..., K], got {x.dtype} {list(x.shape)}")
    if x.shape[1:].numel() > MAX_ELEMENTS:
        raise ValueError(f"{op}: a sample of {name} {list(x.shape)} has 2^31 elements or more")


def check_samples(op: str, batch: int) -> None:
    """So many as one launch takes."""
    if batch > MAX_SAMPLES:
        raise ValueError(f"{op}: at most {MAX_SAMPLES} samples are launched at a time, got {batch}; split the batch")


def check_padding(op: str, x: Tensor, channels: int, padding: tuple[int, int]) -> None:
    """Borders of an image, whose result of so many channels the kernels can count."""
    if min(padding) < 0 or (max(padding) > 0 and x.ndim != 4):
        raise ValueError(
            f"{op}: padding must not be negative, and only an image [B, H, W, K] takes any; "
            f"got {padding} for x {list(x.shape)}"
        )
    size = quantized_shape((*x.shape[:-1], channels), padding)[1:]
    if math.prod(size) > MAX_ELEMENTS:
        raise ValueError(f"{op}: a sample of the result {size} has 2^31 elements or more; padding is {padding}")


def check_operands(
    op: str,
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    x_shape: Sequence[int | str],
    values_shape: Sequence[int | str],
) -> None:
    """The int8 activation and the packed weight of one product, and the bias."""
    values, scale, total = weight
    check_tensor(op, "x", x, (torch.int8,), x_shape)
    check_tensor(op, "weight.values", values, (torch.uint8,), values_shape)
    if x.shape[-1] != 2 * values.shape[-1]:
        raise ValueError(
            f"{op}: the packed weight {list(values.shape)} takes {2 * values.shape[-1]} input channels, "
            f"x {list(x.shape)} has {x.shape[-1]}"
        )
    check_tensor(op, "weight.scale", scale, _FLOAT32, values.shape[:1])
    check_tensor(op, "weight.sum", total, _INT32, values.shape[:1])
    if 2 * values.shape[1:].numel() > MAX_REDUCTION:
        raise ValueError(
            f"{op}: a sum of {2 * values.shape[1:].numel()} products may exceed int32; at most {MAX_REDUCTION} fit. "
            "Keep the layer in floating point with modules_to_not_convert"
        )
    if bias is not None:
        check_tensor(op, "bias", bias, COMPUTE_DTYPES, values.shape[:1])


def check_out_dtype(op: str, out_dtype: torch.dtype) -> None:
    if out_dtype not in COMPUTE_DTYPES:
        raise ValueError(f"{op}: out_dtype must be {_FLOATS}, got {out_dtype}")


def check_norm(op: str, norm: Norm, channels: int) -> None:
    for name, parameter in (("weight", norm.weight), ("bias", norm.bias)):
        if parameter is not None:
            check_tensor(op, f"norm.{name}", parameter, COMPUTE_DTYPES, (channels,))


def check_size(op: str, x: Tensor, rows: int, out_channels: int) -> None:
    """Elements of the operand and of the result, which the kernels can count."""
    if x.numel() > MAX_ELEMENTS or rows * out_channels > MAX_ELEMENTS:
        raise ValueError(
            f"{op}: x {list(x.shape)} or the result [{rows}, {out_channels}] has 2^31 elements or more; split the batch"
        )
