"""The INT4 storage format: two signed 4-bit values a byte, half-split along the input channels.

Byte ``j`` of a row holds channel ``j`` in its low nibble and channel ``j + K/2`` in its high nibble. So a kernel that
loads one block of bytes needs two contiguous blocks of activations, without interleaving, for any block size. An odd K
is padded with one zero channel.
"""

from __future__ import annotations

import torch

INT4_MIN, INT4_MAX = -8, 7


def pack_int4(values: torch.Tensor) -> torch.Tensor:
    """Packs signed 4-bit values along the last dimension.

    Args:
        values: [..., K] int8 in [-8, 7].

    Returns:
        [..., ceil(K / 2)] uint8, contiguous.

    Raises:
        TypeError: if it is no tensor.
        ValueError: if the dtype is not int8, there is no dimension, or a value lies outside [-8, 7].
    """
    _check("pack_int4", "values", values, torch.int8)
    if values.numel() and (values.min() < INT4_MIN or values.max() > INT4_MAX):
        raise ValueError(f"pack_int4 takes values in [{INT4_MIN}, {INT4_MAX}], got {values.min()} to {values.max()}")
    if values.shape[-1] % 2:
        values = torch.nn.functional.pad(values, (0, 1))
    low, high = values.contiguous().view(torch.uint8).chunk(2, dim=-1)
    return (low & 0x0F) | (high << 4)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """Inverts ``pack_int4``: [..., K/2] uint8 -> [..., K] int8 in [-8, 7], K even.

    Raises:
        TypeError: if it is no tensor.
        ValueError: if the dtype is not uint8, or there is no dimension.
    """
    _check("unpack_int4", "packed", packed, torch.uint8)
    signed = packed.view(torch.int8)
    return torch.cat([(signed << 4) >> 4, signed >> 4], dim=-1)


def sum_int4(packed: torch.Tensor) -> torch.Tensor:
    """The sum of each output channel's 4-bit values, without unpacking them: [N, ..., K/2] uint8 -> [N] int32.

    It is exact for up to 2^19 bytes a channel.

    Raises:
        TypeError: if it is no tensor.
        ValueError: if the dtype is not uint8, or there is no dimension.
    """
    _check("sum_int4", "packed", packed, torch.uint8)
    rows = packed.flatten(1)
    pairs = ((rows & 0x0F) ^ 8) + ((rows >> 4) ^ 8)  # each value is 8 too large: 0 to 30 a byte
    # Float32 holds these sums exactly, and PyTorch adds floats many times as fast as bytes.
    return pairs.float().sum(1).int() - 16 * rows.shape[1]


def _check(op: str, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got a {type(tensor).__name__}")
    if tensor.dtype != dtype or not tensor.ndim:
        expected = str(dtype).removeprefix("torch.")
        raise ValueError(f"{op} takes {expected} {name}, got {tensor.dtype} of shape {list(tensor.shape)}")
