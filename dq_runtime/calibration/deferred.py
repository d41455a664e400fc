"""Tensors whose elements are computed when they are needed.

A forward pass with such tensors costs the time of its Python code. What is read at its end needs only the operations
that it depends on. Shape, strides, dtype and device are known from the start, by running each operation on the meta
device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten


class _Result:
    """What an operation returns, computed at the first use.

    Attributes:
        sources: the names of the ``deferred`` trees that it depends on.
    """

    def __init__(self, compute: Callable[[], Any], sources: frozenset[str]) -> None:
        self._compute: Callable[[], Any] | None = compute
        self._leaves: list[Any] = []
        self.sources = sources

    def leaf(self, number: int) -> Any:
        if self._compute is not None:
            self._leaves, self._compute = tree_leaves(self._compute()), None
        return self._leaves[number]


class Deferred(torch.Tensor):
    """A leaf of an operation's result.

    Operations that change a tensor in place raise NotImplementedError. Those that return numbers compute at once.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    _meta: torch.Tensor
    _result: _Result
    _number: int

    @staticmethod
    def of(meta: torch.Tensor, device: torch.device, result: _Result, number: int) -> Deferred:
        """A leaf with the properties of a tensor on the meta device."""
        tensor: Any = torch.Tensor._make_wrapper_subclass(
            Deferred, meta.shape, strides=meta.stride(), dtype=meta.dtype, device=device
        )
        tensor._meta, tensor._result, tensor._number = meta, result, number
        return tensor

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func._schema.is_mutable:
            raise NotImplementedError(f"{func} changes a deferred tensor in place")
        leaves, structure = tree_flatten((args, kwargs or {}))

        def compute() -> Any:
            real_args, real_kwargs = tree_unflatten([_real(leaf) for leaf in leaves], structure)
            return func(*real_args, **real_kwargs)

        meta_args, meta_kwargs = tree_unflatten([_on_meta(leaf) for leaf in leaves], structure)
        if func is torch.ops.aten._local_scalar_dense.default:
            return compute()
        device = meta_kwargs.get("device") or next(leaf.device for leaf in leaves if isinstance(leaf, Deferred))
        if "device" in meta_kwargs:
            meta_kwargs["device"] = torch.device("meta")
        sources = frozenset().union(*(leaf._result.sources for leaf in leaves if isinstance(leaf, Deferred)))
        return _wrapped(func(*meta_args, **meta_kwargs), torch.device(device), _Result(compute, sources))

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Deferred({list(self.shape)}, {self.dtype}, {self.device})"


def _wrapped(metas: Any, device: torch.device, result: _Result) -> Any:
    leaves, structure = tree_flatten(metas)
    wrapped = [
        Deferred.of(leaf, device, result, number) if isinstance(leaf, torch.Tensor) else leaf
        for number, leaf in enumerate(leaves)
    ]
    return tree_unflatten(wrapped, structure)


def _real(leaf: Any) -> Any:
    return leaf._result.leaf(leaf._number) if isinstance(leaf, Deferred) else leaf


def _on_meta(leaf: Any) -> Any:
    if isinstance(leaf, Deferred):
        return leaf._meta
    return leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf


def on_meta(tree: Any) -> Any:
    """The tree with tensors of the same properties, strides included, on the meta device."""
    return tree_map_only(
        torch.Tensor, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta"), tree
    )


def deferred(name: str, metas: Any, device: torch.device, compute: Callable[[], Any]) -> Any:
    """A tree whose tensors are computed together when the first of them is needed.

    Args:
        name: of the tree, for ``sources``.
        metas: the tree with tensors on the meta device.
        compute: returns the same tree with tensors on ``device``.
    """
    return _wrapped(metas, device, _Result(compute, frozenset([name])))


def computed(tree: Any) -> Any:
    """The tree with the deferred tensors computed."""
    return tree_map_only(Deferred, _real, tree)


def sources(tree: Any) -> Iterator[str]:
    """The names of the ``deferred`` trees that a tree depends on; a name may come several times."""
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Deferred):
            yield from leaf._result.sources
