"""Training data: single samples of recorded calls, drawn by how much their timestep matters, in mixed batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_flatten_with_path, tree_unflatten

from dq_runtime.calibration.collect import CalibrationSet, RecordedCall
from dq_runtime.calibration.importance import timestep_importance

HELD_OUT = 8  # one sample in eight is not trained on
MAX_JUDGING = 8  # batches
LEAST = 4  # samples of a timestep


class Row(NamedTuple):
    """One sample of a recorded call."""

    call: RecordedCall
    number: int  # in its batch
    timestep: float


class MixedBatches:
    """Calls whose samples have a timestep each; one is put together when it is asked for.

    A timestep is drawn in proportion to the square root of its importance (see ``timestep_importance``), the least
    important a few times: errors divided by its share have unbiased means, which vary less than if all timesteps were
    drawn alike. Where a timestep has fewer samples than are drawn they come again.

    Args:
        samples: how many to draw for training, about; an eighth of that, of other samples, is to judge by.
        batch_size: samples of a batch. Only those whose arguments have the same shapes share one.

    Attributes:
        training: numbers of the batches to train on.
        judging: of those to judge by; the same ones where there are too few samples to hold some out.
        fewest: different samples that one timestep is trained on, at least.
    """

    def __init__(self, calibration_set: CalibrationSet, samples: int, batch_size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        timesteps = calibration_set.timesteps
        importance = timestep_importance(calibration_set.scheduler, timesteps)
        self._importance = dict(zip(timesteps, importance, strict=True))
        for_training, for_judging = _split(_rows_by_timestep(calibration_set), generator)

        counts = self._counts(samples)
        self.fewest = min(min(counts[timestep], len(rows)) for timestep, rows in for_training.items())
        self._batches = _draw(for_training, counts, batch_size, generator)
        self._training_share = self._judging_share = _shares(counts)
        self.training = self.judging = range(len(self._batches))
        if for_judging:
            counts = self._counts(min(-(-samples // HELD_OUT), MAX_JUDGING * batch_size))
            self._batches += _draw(for_judging, counts, batch_size, generator)
            self._judging_share = _shares(counts)
            self.judging = range(len(self.training), len(self._batches))

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, i: int) -> RecordedCall:
        return _joined(self._batches[i])

    def __iter__(self) -> Iterator[RecordedCall]:
        return map(_joined, self._batches)

    def importance(self, i: int) -> torch.Tensor:
        """That of each sample's timestep in a batch, [B] fp32."""
        return torch.tensor([self._importance[row.timestep] for row in self._batches[i]])

    def share(self, i: int) -> torch.Tensor:
        """That which each sample's timestep has in all that is drawn to train on, or to judge by, [B] fp32."""
        shares = self._training_share if i in self.training else self._judging_share
        return torch.tensor([shares[row.timestep] for row in self._batches[i]])

    def _counts(self, samples: int) -> dict[float, int]:
        """How many to draw of each timestep."""
        total = sum(importance**0.5 for importance in self._importance.values())
        least = max(1, min(LEAST, samples // len(self._importance)))
        return {t: max(least, round(samples * value**0.5 / total)) for t, value in self._importance.items()}


def _shares(counts: Mapping[float, int]) -> dict[float, float]:
    return {timestep: count / sum(counts.values()) for timestep, count in counts.items()}


def _draw(
    rows: Mapping[float, Sequence[Row]], counts: Mapping[float, int], batch_size: int, generator: torch.Generator
) -> list[list[Row]]:
    """Batches of so many rows of each timestep, in random order."""
    drawn: list[Row] = []
    for timestep, count in counts.items():
        drawn += islice(_again_and_again(rows[timestep], generator), count)
    by_shape: dict[str, list[Row]] = {}
    for row in _shuffled(drawn, generator):
        by_shape.setdefault(_shape(row), []).append(row)
    return [
        alike[start : start + batch_size] for alike in by_shape.values() for start in range(0, len(alike), batch_size)
    ]


def _rows_by_timestep(calibration_set: CalibrationSet) -> dict[float, list[Row]]:
    rows: dict[float, list[Row]] = {}
    for call in calibration_set.calls:
        for i, timestep in enumerate(call.timestep.expand(call.sample.shape[0]).tolist()):
            rows.setdefault(timestep, []).append(Row(call, i, timestep))
    return rows


def _split(
    rows: Mapping[float, Sequence[Row]], generator: torch.Generator
) -> tuple[dict[float, list[Row]], dict[float, list[Row]]]:
    """Rows to train on, and of each timestep an eighth to judge by; none where one timestep would have too few.

    With guidance a latent comes twice, with and without its prompt: it is either trained on or judged by.
    """
    shuffled = {timestep: _shuffled(of_timestep, generator) for timestep, of_timestep in rows.items()}
    held_out = {timestep: of_timestep[: len(of_timestep) // HELD_OUT] for timestep, of_timestep in shuffled.items()}
    if min(map(len, held_out.values())) < LEAST:
        return shuffled, {}
    judged = {timestep: {_latent(row) for row in some} for timestep, some in held_out.items()}
    for_training = {
        timestep: [row for row in of_timestep[len(held_out[timestep]) :] if _latent(row) not in judged[timestep]]
        for timestep, of_timestep in shuffled.items()
    }
    return (for_training, held_out) if all(for_training.values()) else (shuffled, {})


def _latent(row: Row) -> bytes:
    """Equal for rows that have the same ``sample``."""
    sample = row.call.sample[row.number].contiguous()
    return hashlib.sha256(sample.reshape(-1).view(torch.uint8).numpy().tobytes()).digest()


def _shuffled(rows: Sequence[Row], generator: torch.Generator) -> list[Row]:
    return [rows[i] for i in torch.randperm(len(rows), generator=generator)]


def _again_and_again(rows: Sequence[Row], generator: torch.Generator) -> Iterator[Row]:
    while True:
        yield from rows
        rows = _shuffled(rows, generator)


def _parts(row: Row) -> tuple[list[Any], Any]:
    """One sample's part of each argument, and how they are nested; what has no row for each sample is everyone's."""
    call, i, _ = row
    leaves, structure = tree_flatten_with_path(call.arguments)
    batch = call.sample.shape[0]

    def part(path: Any, leaf: Any) -> Any:
        has_rows = isinstance(leaf, torch.Tensor) and leaf.ndim > 0 and leaf.shape[0] == batch
        return leaf[i] if has_rows and path[0].key not in call.shared else (leaf,)

    return [part(path, leaf) for path, leaf in leaves], structure


def _shape(row: Row) -> str:
    """Samples for which it is the same can share a batch."""

    def signature(part: Any) -> Any:
        if isinstance(part, torch.Tensor):
            return part.shape, part.dtype
        (shared,) = part
        return shared.tolist() if isinstance(shared, torch.Tensor) else shared

    parts, structure = _parts(row)
    return repr((structure, row.call.sample.shape[1:], [signature(part) for part in parts]))


def _joined(rows: Sequence[Row]) -> RecordedCall:
    sample = torch.stack([row.call.sample[row.number] for row in rows])
    timestep = torch.tensor([row.timestep for row in rows])
    columns = zip(*(_parts(row)[0] for row in rows), strict=True)
    arguments = [torch.stack(column) if isinstance(column[0], torch.Tensor) else column[0][0] for column in columns]
    return RecordedCall(sample, timestep, tree_unflatten(arguments, _parts(rows[0])[1]), rows[0].call.shared)
