"""The Temporal Parallel Quantizer's tables: one activation scale and zero point per layer and timestep.

They are initialised by a search for the least squared error on the timestep's samples (DilateQuant, arXiv 2409.14307).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

from dq_runtime.calibration import ranks
from dq_runtime.calibration.collect import CalibrationSet
from dq_runtime.timesteps import TimestepGrid
from dq_runtime.weights import VALUES_AT_ONCE

VALUES_PER_TIMESTEP = 8192  # of each layer's input, used by the search
LEAST_ROWS = 4  # per timestep, even of wide inputs
CANDIDATES = 24
ROUNDS = 2

Samples = dict[str, list[torch.Tensor]]


def sample_inputs(unet: nn.Module, layers: Mapping[str, nn.Module], calibration_set: CalibrationSet) -> Samples:
    """Replays the calibration set and keeps random rows of each layer's input. Ranks share the calls.

    Returns:
        for each layer that was reached, a list with one tensor [rows, K] fp32 on the CPU for each of the calibration
        set's timesteps. Layers that share their input get equal samples.

    Raises:
        ValueError: if an input is not finite, its batch size differs from the UNet's, or a timestep never reached the
            layer. The error names the layer.
    """
    grid = TimestepGrid(calibration_set.timesteps)
    indices = [grid.nearest(c.timestep, c.sample.shape[0], c.timestep.device) for c in calibration_set.calls]
    meets = torch.stack([torch.bincount(i, minlength=grid.num_timesteps) > 0 for i in indices])  # [calls, T]
    timesteps_of_call = [met.nonzero()[:, 0].tolist() for met in meets]
    earlier_calls = (meets.cumsum(0) - 1).tolist()
    calls_at = meets.sum(0).tolist()
    position = 0  # of the running call
    kept: dict[str, list[tuple[int, torch.Tensor]]] = {}  # of the running call: a timestep's index, and rows

    def keep(name: str, x: torch.Tensor) -> None:
        x = x.detach()
        if x.numel() and not bool(torch.stack(x.aminmax()).isfinite().all()):  # allocates no mask of x's size
            raise ValueError(
                f"{name}: its input holds NaN or infinity during calibration. Check that the floating-point UNet "
                "generates valid images in this dtype (some models overflow in float16: try bfloat16 or float32)"
            )
        index = indices[position]
        if x.shape[0] != index.shape[0]:
            raise ValueError(
                f"{name}: expected a batch of {index.shape[0]} samples, like the UNet's `sample`, got {x.shape[0]}. "
                "The timesteps of its rows are unknown: add it to modules_to_not_convert"
            )
        x = x.movedim(1, -1) if isinstance(layers[name], nn.Conv2d) else x  # [B, ..., K]
        rows_of_layer = kept.setdefault(name, [])
        wanted = max(LEAST_ROWS, -(-VALUES_PER_TIMESTEP // x.shape[-1]))
        for t in timesteps_of_call[position]:
            if earlier_calls[position][t] % -(-calls_at[t] // wanted):
                continue  # one row of each call would be too many
            place = places(position, t, x.shape[1:-1], -(-wanted // calls_at[t]))
            rows_of_layer.append((t, x[tuple(numbers.to(x.device) for numbers in place)].float().cpu()))

    # A call's layers have few sizes. Layers that share their input get the same rows.
    @lru_cache(maxsize=64)
    def places(position: int, t: int, inner: tuple[int, ...], count: int) -> tuple[torch.Tensor, ...]:
        """Random rows of the samples [B, *inner, K] that have the timestep: their indices in each dimension."""
        members = (indices[position] == t).nonzero()[:, 0]
        rows = len(members), *inner
        chosen = torch.randperm(math.prod(rows), generator=torch.Generator().manual_seed(position))
        member, *pixel = torch.unravel_index(chosen[:count], rows)
        return members[member], *pixel

    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: keep(name, args[0]))
        for name, layer in layers.items()
    ]
    training = {module: module.training for module in unet.modules()}
    unet.eval()  # no dropout
    try:
        of_calls = []
        for position in ranks.progress_bar(ranks.part(range(len(indices))), desc="Observing activations"):
            kept = {}
            calibration_set.calls[position].run(unet)
            of_calls.append(kept)
    finally:
        for module, mode in training.items():
            module.training = mode
        for handle in handles:
            handle.remove()
    samples: dict[str, list[list[torch.Tensor]]] = {}
    for kept in ranks.joined(of_calls):
        for name, rows_of_layer in kept.items():
            parts = samples.setdefault(name, [[] for _ in range(grid.num_timesteps)])
            for t, rows in rows_of_layer:
                parts[t].append(rows)
    for name, parts in samples.items():
        if not all(parts):
            raise ValueError(
                f"{name}: calibration reached it at some timesteps only. Record calls that take the same path at every "
                "timestep, or add it to modules_to_not_convert"
            )
    return {name: [torch.cat(rows) for rows in samples.pop(name)] for name in list(samples)}


def layers_by_input(samples: Samples) -> list[list[str]]:
    """Groups layers that share their input (the q, k, v of a self-attention, ...): all their samples are equal."""
    groups: dict[bytes, list[str]] = {}
    for name, per_timestep in samples.items():
        digest = hashlib.sha256()
        for rows in per_timestep:
            digest.update(str(tuple(rows.shape)).encode())
            digest.update(rows.cpu().numpy().tobytes())
        groups.setdefault(digest.digest(), []).append(name)
    return list(groups.values())


def by_group(per_timestep: Sequence[torch.Tensor], groups: Sequence[int]) -> list[torch.Tensor]:
    """Concatenates the samples of timesteps that share a row of the activation tables.

    Args:
        groups: the row that each timestep uses; every row is used by some timestep.
    """
    members: list[list[torch.Tensor]] = [[] for _ in range(max(groups) + 1)]
    for rows, group in zip(per_timestep, groups, strict=True):
        members[group].append(rows)
    return [torch.cat(rows) for rows in members]


def temporal_quantizer(
    per_timestep: list[torch.Tensor], weight_dilation: torch.Tensor, bits: int, candidates: int = CANDIDATES
) -> tuple[torch.Tensor, torch.Tensor]:
    """Searches the asymmetric quantizer of least squared error for each timestep.

    The search starts from the values' range, extended to contain zero, and shrinks its upper and lower ends in turn.

    Args:
        per_timestep: T tensors [rows, K], a layer's inputs; see ``by_group`` for timesteps that share a scale.
        weight_dilation: [K], divides the inputs.
        bits: of the quantized values.
        candidates: for each end of a range; with one, the range is that of the values.

    Returns:
        act_scale [T] fp32 and act_zero_point [T] int32.
    """
    most = max(len(rows) for rows in per_timestep)
    # Shorter timesteps are padded with zeros, which are exact in every quantizer.
    padded = [F.pad(rows / weight_dilation, (0, 0, 0, most - len(rows))).flatten() for rows in per_timestep]
    return search_range(torch.stack(padded), bits, candidates)


def search_range(values: torch.Tensor, bits: int, candidates: int = CANDIDATES) -> tuple[torch.Tensor, torch.Tensor]:
    """The asymmetric quantizers of least squared error for the rows of ``values`` [T, n] fp32.

    Returns:
        scale [T] fp32 and zero point [T] int32.
    """
    low, high = values.amin(1).clamp(max=0), values.amax(1).clamp(min=0)
    lowest, highest = low, high
    fractions = torch.linspace(1.0, 1.0 / candidates, candidates, dtype=torch.float32)[:, None].to(values.device)
    for _ in range(ROUNDS):
        high = _best_end(values, bits, low.expand(candidates, -1), highest * fractions)[1]
        low = _best_end(values, bits, lowest * fractions, high.expand(candidates, -1))[0]
    return _scale_and_zero_point(low, high, bits)


def rounded(values: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, bits: int) -> torch.Tensor:
    """``values``, quantized and dequantized; scale and zero point are broadcast."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return (values / scale).add_(0.5).floor_().add_(zero_point).clamp_(low, high).sub_(zero_point).mul_(scale)


def _best_end(
    values: torch.Tensor, bits: int, lows: torch.Tensor, highs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each row of ``values`` [T, n] the range of least error, among several [C, T] that contain zero."""
    at_once = max(1, VALUES_AT_ONCE // max(1, values.numel()))
    tables = (table[..., None].split(at_once) for table in _scale_and_zero_point(lows, highs, bits))
    errors = [
        rounded(values, scale, zero_point, bits).sub_(values).square_().sum(-1)
        for scale, zero_point in zip(*tables, strict=True)
    ]
    best = torch.cat(errors).argmin(0, keepdim=True)
    return lows.gather(0, best)[0], highs.gather(0, best)[0]


def _scale_and_zero_point(low: torch.Tensor, high: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps [low, high], which contains zero, to 2^bits integers. Zero is exact; an all-zero row gets scale 1."""
    scale = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(torch.float32).tiny)  # its inverse stays finite
    zero_point = torch.floor(-(2 ** (bits - 1)) - low / scale + 0.5).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    empty = low == high
    return scale.masked_fill(empty, 1.0), zero_point.masked_fill(empty, 0.0).to(torch.int32)
