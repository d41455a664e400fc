"""Quantization tables and packed weights: tensors that a cast of the model must not change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class TableModule(nn.Module):
    """A module whose buffers and integer parameters can be moved to another device, but not cast.

    ``half()``, ``type(dtype)``, ``to(memory_format=...)`` and diffusers' layerwise casting reach a module through
    ``_apply``; they cast its floating-point parameters only, not its tables and packed weights.

    Attributes:
        after_move: called after each move or cast.
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
