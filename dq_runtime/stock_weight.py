"""The weight of a quantized layer as users of the stock layer expect it: floating point, of the stock shape."""

from __future__ import annotations

from functools import partial
from typing import Any, NoReturn

import torch
from torch.utils._pytree import tree_map_only

SAME_VALUES = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


class StockWeight(torch.Tensor):
    """The rounded weight of a quantized layer, in the compute dtype and the stock layer's shape; read only.

    Its dtype, shape and device cost nothing. An operation that reads its values computes them from the packed weight,
    and gets them as an ordinary tensor. An operation that would change it, or a view of it, raises, since the change
    would be lost.

    Args:
        layer: a ``QuantizedLayer``.
        view: the values of this tensor, if it is a view of the weight.
    """

    _layer: Any
    _view: torch.Tensor | None

    @staticmethod
    def __new__(cls, layer: Any, view: torch.Tensor | None = None) -> StockWeight:
        shape = layer.stock_shape if view is None else view.shape
        return torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=layer.compute_dtype, device=layer.packed_weight.device
        )

    def __init__(self, layer: Any, view: torch.Tensor | None = None) -> None:
        self._layer, self._view = layer, view

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in SAME_VALUES:
            return cls(args[0]._layer, args[0]._view)
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = args[i] if i < len(args) else kwargs.get(argument.name)
                for tensor in given if isinstance(given, (list, tuple)) else [given]:
                    if isinstance(tensor, cls):
                        tensor._refuse()
        viewed = args[0] if func.is_view and isinstance(args[0], cls) else None
        args, kwargs = tree_map_only(cls, cls.values, (args, kwargs))
        result = func(*args, **kwargs)
        return result if viewed is None else tree_map_only(torch.Tensor, partial(cls, viewed._layer), result)

    def values(self) -> torch.Tensor:
        """The values, as an ordinary tensor."""
        return self._layer.stock_weight_values() if self._view is None else self._view

    def numpy(self, *, force: bool = False) -> Any:
        """The values, as an array."""
        return self.values().numpy(force=force)

    def tolist(self) -> Any:
        """The values, as lists."""
        return self.values().tolist()

    @property
    def data(self) -> StockWeight:
        """This weight: there is no other tensor behind it."""
        return self

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise ValueError(
            f"{self._layer.name}.weight is packed in INT4 and cannot be changed. Change the floating-point model "
            "before calibration, or call dequantize() first"
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"StockWeight(shape={list(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return self.values()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.values().__reduce_ex__(protocol)
