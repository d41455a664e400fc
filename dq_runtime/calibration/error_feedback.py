"""Rounds weights with error feedback: weights that are rounded later compensate for the errors of earlier ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dq_runtime.calibration.simulated import SimulatedLayer
from dq_runtime.weights import round_to_int4

DAMPING = (0.01, 0.1, 1.0, 10.0)  # times the diagonal's mean, added to the diagonal; the first that succeeds
BLOCK = 64  # columns between two updates of all remaining columns
MAX_COLUMNS = 576  # per part; errors stay within a part, which bounds memory and time in wide layers
PATCH_ELEMENTS = 2**20  # of a convolution's unfolded input, in memory at a time


class SecondMoments:
    """The sum of x x^T over the inputs x of a layer's weights, in parts of at most ``MAX_COLUMNS`` columns."""

    def __init__(self, layer: SimulatedLayer) -> None:
        self.layer = layer
        taps = layer.weight[0, 0].numel()
        channels = max(1, MAX_COLUMNS // taps)
        self.parts = [slice(start, start + channels) for start in range(0, layer.weight.shape[1], channels)]
        widths = [layer.weight[0, part].numel() for part in self.parts]
        self.sums = [torch.zeros(k, k, dtype=torch.float32, device=layer.weight.device) for k in widths]

    def add(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """A forward pre-hook that adds the layer's input."""
        x = self.layer.quantized_input(args[0])
        for i, part in enumerate(self.parts):
            for columns in self._columns(x, part):
                self.sums[i] += columns.T @ columns

    def _columns(self, x: torch.Tensor, part: slice) -> Iterator[torch.Tensor]:
        """[rows, K'] of these input channels; a convolution has a column for each channel and tap."""
        conv = self.layer.layer
        if isinstance(conv, nn.Linear):
            yield x[..., part].flatten(0, -2)
            return
        taps = self.layer.weight[0, 0].numel()
        at_once = max(1, PATCH_ELEMENTS // (x[0, part].numel() * taps))
        for images in x[:, part].split(at_once):
            padding: Any = conv.padding
            if conv.padding_mode != "zeros":
                images = F.pad(images, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
                padding = 0
            patches = F.unfold(images, conv.kernel_size, conv.dilation, padding, conv.stride)
            yield patches.transpose(1, 2).flatten(0, 1)

    def rounded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's weights after error feedback, where training starts (see ``SimulatedLayer.unfreeze``).

        Each output channel's scale is then the one of least squared error for the rounded weights.

        Returns:
            weights in steps of the present scale, and the ratio of the new scale to it, shaped like ``weight_scale``.
        """
        steps = self.layer.dilated_weight() / self.layer.weight_scale
        moved = steps.clone()
        products, squares = (torch.zeros(len(steps), dtype=torch.float32, device=steps.device) for _ in range(2))
        for part, total in zip(self.parts, self.sums, strict=True):
            if bool(total.any()):  # else no drawn sample reached the layer
                exact = steps[:, part].flatten(1)
                moved[:, part] = round_with_feedback(exact, total).view_as(steps[:, part])
                values = round_to_int4(moved[:, part].flatten(1))
                seen = values @ total
                products += (seen * exact).sum(1)
                squares += (seen * values).sum(1)
        usable = (products > 0) & (squares > 0)
        ratio = torch.where(usable, products / squares, 1.0).view_as(self.layer.weight_scale)
        return moved * ratio, ratio


@torch.no_grad()
def round_with_feedback(steps: torch.Tensor, second_moment: torch.Tensor) -> torch.Tensor:
    """Moves weights so that those rounded later compensate for the rounding errors of those rounded earlier.

    This minimizes the squared error of the layer's output greedily, column by column, starting with the column of the
    largest inputs: Optimal Brain Quantization in the order of GPTQ (arXiv 2210.17323).

    Args:
        steps: [N, K] fp32, weights in steps of their scale.
        second_moment: [K, K] fp32, the sum of x x^T over the layer's inputs x (dilated and quantized).

    Returns:
        [N, K] fp32: each weight just before it was rounded; rounding them to nearest gives the result.

    Raises:
        ValueError: if the second moments are not finite.
    """
    if not bool(second_moment.isfinite().all()):
        raise ValueError("the inputs' second moments hold NaN or infinity")
    order = second_moment.diagonal().argsort(descending=True)
    left = steps[:, order].clone()
    moved = torch.empty_like(left)
    factor = _inverse_factor(second_moment[order[:, None], order])
    for start in range(0, left.shape[1], BLOCK):
        block = slice(start, start + BLOCK)
        triangle, columns, errors = factor[block, block], left[:, block], torch.empty_like(left[:, block])
        for j in range(columns.shape[1]):
            moved[:, start + j] = columns[:, j]
            errors[:, j] = (columns[:, j] - round_to_int4(columns[:, j])) / triangle[j, j]
            columns[:, j:] -= torch.outer(errors[:, j], triangle[j, j:])
        left[:, start + BLOCK :] -= errors @ factor[block, start + BLOCK :]
    return moved[:, order.argsort()]


def _inverse_factor(second_moment: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the damped matrix's inverse: row j distributes the error of column j."""
    matrix = second_moment.double()
    diagonal = matrix.diagonal().clone()
    mean = diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny)
    for damping in DAMPING:
        matrix.diagonal().copy_(diagonal + damping * mean)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:
            # Only two matrices are allocated, since they are large in wide layers.
            torch.cholesky_inverse(factor, out=matrix)
            return torch.linalg.cholesky(matrix, upper=True, out=factor).float()
    raise ValueError("the inputs' second moments are not positive definite")
