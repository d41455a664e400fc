"""Quantization tables: module buffers whose dtype no cast of the model may change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class TableModule(nn.Module):
    """A module whose buffers follow the model from device to device, but keep their dtype and values.

    ``half()``, ``to(dtype)`` and diffusers' layerwise casting reach a module through ``_apply``; they may cast its
    parameters, never its tables.
    """

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        tables = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, table in tables.items():
            moved = self._buffers[name]
            if table is not None and moved is not None and moved.dtype != table.dtype:
                self._buffers[name] = table.to(moved.device)
        return self
