"""Gradients through quantized layers: the rounding's is one (straight through), a clamped input's is zero.

So adapters can be trained on the packed weights, and sampling can be guided by gradients. No gradient reaches the
packed weights or the tables.
"""

from __future__ import annotations

from typing import Any

import torch


class _StraightThrough(torch.autograd.Function):
    """Returns y, the layer's result for x; x gets the gradient of the layer without rounding."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, x: torch.Tensor, q: torch.Tensor, layer: Any, padding: Any) -> torch.Tensor:
        ctx.layer, ctx.padding, ctx.shape = layer, padding, x.shape
        ctx.save_for_backward(q)
        ctx.mark_dirty(y)  # neither a copy nor a view of y: views may not be changed in place
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (q,) = ctx.saved_tensors
        return None, ctx.layer.input_gradient(gradients[0], q, ctx.shape, ctx.padding), None, None, None


def pass_gradient(
    y: torch.Tensor, x: torch.Tensor, q: torch.Tensor, layer: Any, padding: tuple[int, int] = (0, 0)
) -> torch.Tensor:
    """y, through which a gradient reaches x by ``layer.input_gradient``.

    Args:
        y: the layer's result for x.
        q: x in int8, padded.
    """
    return _StraightThrough.apply(y, x, q, layer, padding)


def wants_gradient(x: torch.Tensor) -> bool:
    """True if autograd may need a gradient through x."""
    return x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()
