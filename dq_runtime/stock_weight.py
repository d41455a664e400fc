"""The weight of a quantized layer as users of the stock layer expect it: floating point, of the stock shape."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch.utils._pytree import tree_map_only

SAME_VALUES = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


class StockWeight(torch.Tensor):
    """The rounded weight of a quantized layer, in the compute dtype and the stock layer's shape; read only.

    Its dtype, shape and device cost nothing. An operation that reads its values computes them from the packed weight,
    and gets them as an ordinary tensor. An operation that would change it raises, since the change would be lost.

    Args:
        layer: a ``QuantizedLayer``.
    """

    _layer: Any

    @staticmethod
    def __new__(cls, layer: Any) -> StockWeight:
        return torch.Tensor._make_wrapper_subclass(
            cls, layer.stock_shape, dtype=layer.compute_dtype, device=layer.packed_weight.device
        )

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in SAME_VALUES:
            return cls(args[0]._layer)
        for argument, given in zip(func._schema.arguments, args, strict=False):
            if isinstance(given, cls) and argument.alias_info is not None and argument.alias_info.is_write:
                given._refuse()
        args, kwargs = tree_map_only(cls, cls.values, (args, kwargs))
        return func(*args, **kwargs)

    def values(self) -> torch.Tensor:
        """The values, as an ordinary tensor."""
        return self._layer.stock_weight_values()

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
