"""Quantization tables and packed weights: tensors that no cast of the model may change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class TableModule(nn.Module):
    """A module whose buffers and integer parameters follow the model from device to device, and nothing else.

    ``half()``, ``type(dtype)``, ``to(memory_format=...)`` and diffusers' layerwise casting reach a module through
    ``_apply``; they may cast its floating-point parameters, never its tables or packed weights.

    Attributes:
        after_move: called after each of these.
    """

    after_move: Callable[[], None] | None = None

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        fixed = {name: buffer.data for name, buffer in self._buffers.items() if buffer is not None}
        fixed |= {name: p.data for name, p in self._parameters.items() if p is not None and not p.is_floating_point()}
        super()._apply(fn, recurse)
        for name, tensor in fixed.items():
            moved = getattr(self, name)
            if moved.dtype != tensor.dtype or moved.stride() != tensor.stride():
                restored = tensor.to(moved.device)
                setattr(self, name, nn.Parameter(restored, False) if name in self._parameters else restored)
        if self.after_move is not None:
            self.after_move()
        return self
