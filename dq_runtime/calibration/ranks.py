"""Ranks: the processes of ``torchrun`` or ``accelerate launch``, which share the work of one calibration.

All ranks run the same code with the same arguments; each computes its part of the samples and gets the results of all.
Without a process group of torch.distributed there is one rank, and each function returns its argument.

Every function here that communicates starts with ``exchange``, which also carries failures: inside ``together`` a rank
that fails tells the others in their next exchange, and they raise ``RankFailed``. A rank that is killed closes its
connections. With Gloo the others then raise ``RankFailed`` at once; with NCCL they wait for the launcher, which ends
all ranks if one of them ends, or for the group's timeout.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from dq_runtime.rollback import uninterrupted

T = TypeVar("T")
BUCKET = 2**24  # elements; smaller tensors are added together, which takes less time than one by one

_is_together = False  # inside the outermost ``together``


class RankFailed(RuntimeError):
    """Another rank failed, or its connection broke."""


def number() -> int:
    """Of this rank, from 0."""
    return dist.get_rank() if _are_several() else 0


def count() -> int:
    """The number of ranks."""
    return dist.get_world_size() if _are_several() else 1


def is_first() -> bool:
    """True on the rank that writes files."""
    return number() == 0


def _are_several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def part(items: Sequence[T]) -> Sequence[T]:
    """This rank's items: every ``count``-th, so that costs which grow or shrink along the items are balanced."""
    return items[number() :: count()]


def joined(own: Sequence[T]) -> Sequence[T]:
    """One result for each item, in the items' order, from each rank's results for its ``part``.

    The tensors of several ranks are on the CPU.
    """
    if not _are_several():
        return own
    parts = exchange(own)
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]


def exchange(value: T) -> list[T]:
    """The values of all ranks, in their order. Tensors in trees of several ranks are moved to the CPU.

    Raises:
        RankFailed: if another rank failed.
    """
    return _exchange(value, None)


def from_first(value: T) -> T:
    """The first rank's value. Tensors of several ranks are moved to the CPU.

    Raises:
        RankFailed: if another rank failed.
    """
    if not _are_several():
        return value
    values = [_on_cpu(value) if is_first() else None]
    with _communication():
        exchange(None)
        dist.broadcast_object_list(values, src=0)
    return values[0]  # type: ignore[return-value]


def add(tensors: Iterable[torch.Tensor]) -> None:
    """Replaces each tensor by its sum over the ranks, which has the same bits on all of them.

    Args:
        tensors: of one dtype and on one device, with which the process group communicates.
    """
    if not _are_several():
        return
    with _communication():
        exchange(None)
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            dist.all_reduce(flat)
            for tensor, total in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(total.view_as(tensor))


def _buckets(tensors: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    bucket: list[torch.Tensor] = []
    for tensor in tensors:
        bucket.append(tensor)
        if sum(other.numel() for other in bucket) > BUCKET:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def check_equal(**arguments: Any) -> None:
    """Raises ValueError on all ranks if a rank's arguments differ from the first rank's."""
    first, *others = exchange(arguments)
    for other_number, other in enumerate(others, start=1):
        differing = [name for name in first if other[name] != first[name]]
        if differing:
            raise ValueError(
                f"Rank {other_number} has another {' and another '.join(differing)} than rank 0. All ranks calibrate "
                "one model together: give them equal arguments"
            )


@contextmanager
def together() -> Iterator[None]:
    """The ``with`` block fails on all ranks or on none. A nested one belongs to the outermost."""
    global _is_together
    if _is_together or not _are_several():
        yield
        return
    _is_together = True
    try:
        yield
        exchange(None)
    except RankFailed:
        raise
    except BaseException as error:
        with suppress(RankFailed):
            _exchange(None, f"{type(error).__name__}: {error}")
        raise
    finally:
        _is_together = False


def progress_bar(*arguments: Any, **options: Any) -> Any:
    """A bar of tqdm, shown by the first rank alone."""
    return tqdm(*arguments, **options) if is_first() else tqdm(*arguments, **options | {"disable": True})


def _exchange(value: Any, failure: str | None) -> list[Any]:
    """Sends a value, or why this rank fails, to all ranks."""
    if not _are_several():
        return [value]
    messages: list[Any] = [None] * count()
    with _communication():
        dist.all_gather_object(messages, (failure, _on_cpu(value)))
    failures = [f"rank {i} failed: {text}" for i, (text, _) in enumerate(messages) if text and i != number()]
    if failures:
        raise RankFailed("; ".join(failures))
    return [received for _, received in messages]


def _on_cpu(tree: Any) -> Any:
    return tree_map_only(torch.Tensor, torch.Tensor.cpu, tree)


@contextmanager
def _communication() -> Iterator[None]:
    """Delays Ctrl-C, so that all ranks call the same functions of torch.distributed in the same order."""
    with uninterrupted():
        try:
            yield
        except RankFailed:
            raise
        except RuntimeError as error:
            raise RankFailed(f"Another rank ended, or its connection broke ({error})") from error
