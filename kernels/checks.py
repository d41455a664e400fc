"""What the operators ask of their arguments: each check names the operator, the argument and what it may be.

Symbols are those of ``ops``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_FLOATS = "float16, bfloat16 or float32"


def check_tensor(
    op: str,
    name: str,
    tensor: Tensor,
    dtypes: tuple[torch.dtype, ...],
    shape: Sequence[int | str],
    any_strides: bool = False,
) -> None:
    """Raises unless the tensor is contiguous and has one of the dtypes and the shape, where a letter is any size.

    The message is put together only when it is needed: formatting sizes makes torch.compile specialize on them.
    """
    fits = tensor.dtype in dtypes and tensor.ndim == len(shape) and (any_strides or tensor.is_contiguous())
    if fits:
        for actual, wanted in zip(tensor.shape, shape, strict=True):
            if not isinstance(wanted, str) and actual != wanted:
                fits = False
    if not fits:
        raise ValueError(
            f"{op}: {name} must be {'' if any_strides else 'contiguous '}{' or '.join(str(dtype) for dtype in dtypes)} "
            f"[{', '.join(str(size) for size in shape)}], "
            f"got {tensor.dtype} {list(tensor.shape)} with strides {list(tensor.stride())}"
        )


def check_tables(
    op: str, batch: int, act_scale: Tensor, act_zero_point: Tensor, timestep_index: Tensor, prefix: str = "act"
) -> None:
    check_tensor(op, f"{prefix}_scale", act_scale, (torch.float32,), ("T",))
    check_tensor(op, f"{prefix}_zero_point", act_zero_point, (torch.int32,), act_scale.shape)
    check_tensor(op, "timestep_index", timestep_index, (torch.int32,), (batch,))


def check_quantizer(
    op: str,
    batch: int,
    channels: int,
    weight_dilation: Tensor,
    act_scale: Tensor,
    act_zero_point: Tensor,
    timestep_index: Tensor,
    bits: int,
) -> None:
    check_tensor(op, "weight_dilation", weight_dilation, (torch.float32,), (channels,))
    check_tables(op, batch, act_scale, act_zero_point, timestep_index)
    check_bits(op, bits)


def check_floats(op: str, name: str, x: Tensor, shape: Sequence[int | str]) -> None:
    """x: any strides; the kernels count a sample's elements in int32."""
    if "..." not in shape:
        check_tensor(op, name, x, COMPUTE_DTYPES, shape, any_strides=True)
    elif x.dtype not in COMPUTE_DTYPES or x.ndim < 2:
        raise ValueError(f"{op}: {name} must be {_FLOATS} [B, ..., K], got {x.dtype} {list(x.shape)}")
    if x.shape[1:].numel() >= 2**31:
        raise ValueError(f"{op}: a sample of {name} {list(x.shape)} has 2^31 elements or more")


def check_bits(op: str, bits: int, name: str = "bits") -> None:
    if bits < 2 or bits > 8:
        raise ValueError(f"{op}: {name} must be 2 to 8, got {bits}")


def check_padding(op: str, x: Tensor, padding: tuple[int, int]) -> None:
    if min(padding) < 0 or (max(padding) > 0 and x.ndim != 4):
        raise ValueError(
            f"{op}: padding must not be negative, and only an image [B, H, W, K] takes any; "
            f"got {padding} for x {list(x.shape)}"
        )


def check_operands(
    op: str,
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor,
    bias: Tensor | None,
    x_shape: Sequence[int | str],
    weight_shape: Sequence[int | str],
    out_dtype: torch.dtype,
    source: str = "x",
) -> None:
    prefix = "" if source == "x" else f"{source}_"
    check_tensor(op, source, x, (torch.int8,), x_shape)
    check_tensor(op, f"{prefix}weight", weight, (torch.uint8,), weight_shape)
    if x.shape[-1] != 2 * weight.shape[-1]:
        raise ValueError(
            f"{op}: the packed {prefix}weight {list(weight.shape)} takes {2 * weight.shape[-1]} input channels, "
            f"{source} {list(x.shape)} has {x.shape[-1]}"
        )
    check_tensor(op, "weight_scale", weight_scale, (torch.float32,), weight.shape[:1])
    check_tensor(op, f"{prefix}weight_sum", weight_sum, (torch.int32,), weight.shape[:1])
    if bias is not None:
        check_tensor(op, "bias", bias, COMPUTE_DTYPES, weight.shape[:1])
    if out_dtype not in COMPUTE_DTYPES:
        raise ValueError(f"{op}: out_dtype must be {_FLOATS}, got {out_dtype}")


def check_parameters(op: str, channels: int, parameters: dict[str, Tensor | None]) -> None:
    for name, parameter in parameters.items():
        if parameter is not None:
            check_tensor(op, name, parameter, COMPUTE_DTYPES, (channels,))


def check_size(op: str, x: Tensor, rows: int, out_channels: int) -> None:
    """The kernels count elements in int32."""
    if x.numel() >= 2**31 or rows * out_channels >= 2**31:
        raise ValueError(
            f"{op}: x {list(x.shape)} or the result [{rows}, {out_channels}] has 2^31 elements or more; split the batch"
        )
