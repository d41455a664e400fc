"""Training batches of single samples from recorded calls, drawn by the importance of their timesteps."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_flatten_with_path, tree_unflatten

from dq_runtime.calibration.collect import CalibrationSet, RecordedCall
from dq_runtime.calibration.importance import timestep_importance

HELD_OUT = 8  # one sample in eight is held out of training
MAX_VALIDATION_BATCHES = 8
LEAST = 4  # samples per timestep


class Row(NamedTuple):
    """One sample of a recorded call."""

    call: RecordedCall
    number: int  # index in the call's batch
    timestep: float


class MixedBatches:
    """Batches of samples with mixed timesteps. A batch is assembled when it is accessed.

    The number of samples of a timestep is proportional to the square root of its importance (``timestep_importance``),
    with a minimum of a few. A loss divided by each timestep's share has an unbiased mean. Its variance is lower than
    with equal numbers for all timesteps. If a timestep has fewer samples than are drawn, they are repeated.

    Args:
        samples: approximate number of training samples. An eighth of that, of other samples, is drawn for validation.
        batch_size: samples per batch. Samples share a batch only if their arguments have equal shapes.
        at_once: samples per batch instead, if memory has no room for ``batch_size``. The samples are the same.

    Attributes:
        training: numbers of the training batches.
        validation: numbers of the validation batches; equal to ``training`` if there are too few samples for both.
        fewest: the least number of different training samples of any timestep.
    """

    def __init__(
        self, calibration_set: CalibrationSet, samples: int, batch_size: int, seed: int, at_once: int | None = None
    ) -> None:
        self.at_once = at_once or batch_size
        generator = torch.Generator().manual_seed(seed)
        timesteps = calibration_set.timesteps
        importance = timestep_importance(calibration_set.scheduler, timesteps)
        self._importance = dict(zip(timesteps, importance, strict=True))
        for_training, for_validation = _split(_rows_by_timestep(calibration_set), generator)

        counts = self._counts(samples)
        self.fewest = min(min(counts[timestep], len(rows)) for timestep, rows in for_training.items())
        self._batches = _draw(for_training, counts, self.at_once, generator)
        self._training_share = self._validation_share = _shares(counts)
        self.training = self.validation = range(len(self._batches))
        if for_validation:
            counts = self._counts(min(-(-samples // HELD_OUT), MAX_VALIDATION_BATCHES * batch_size))
            self._batches += _draw(for_validation, counts, self.at_once, generator)
            self._validation_share = _shares(counts)
            self.validation = range(len(self.training), len(self._batches))

    def __len__(self) -> int:
        return len(self._batches)

    def part(self, number: int, count: int) -> MixedBatches:
        """The same batches with part ``number`` of ``count`` parts of their samples alone; see ``is_empty``."""
        batches = copy.copy(self)
        batches._batches = [rows[(number - i) % count :: count] for i, rows in enumerate(self._batches)]
        return batches

    def is_empty(self, i: int) -> bool:
        """True if a part of batch ``i`` has no samples: it has fewer than there are parts."""
        return not self._batches[i]

    def __getitem__(self, i: int) -> RecordedCall:
        return _joined(self._batches[i])

    def __iter__(self) -> Iterator[RecordedCall]:
        return map(_joined, self._batches)

    def importance(self, i: int) -> torch.Tensor:
        """The importance of each sample's timestep in batch ``i``, [B] fp32."""
        return torch.tensor([self._importance[row.timestep] for row in self._batches[i]], dtype=torch.float32)

    def share(self, i: int) -> torch.Tensor:
        """The share of each sample's timestep among all training, or all validation, samples, [B] fp32."""
        shares = self._training_share if i in self.training else self._validation_share
        return torch.tensor([shares[row.timestep] for row in self._batches[i]], dtype=torch.float32)

    def _counts(self, samples: int) -> dict[float, int]:
        """The number of samples to draw of each timestep."""
        total = sum(importance**0.5 for importance in self._importance.values())
        least = max(1, min(LEAST, samples // len(self._importance)))
        return {t: max(least, round(samples * value**0.5 / total)) for t, value in self._importance.items()}


def _shares(counts: Mapping[float, int]) -> dict[float, float]:
    return {timestep: count / sum(counts.values()) for timestep, count in counts.items()}


def _draw(
    rows: Mapping[float, Sequence[Row]], counts: Mapping[float, int], batch_size: int, generator: torch.Generator
) -> list[list[Row]]:
    """Batches with the given number of rows of each timestep, in random order."""
    drawn: list[Row] = []
    for timestep, count in counts.items():
        drawn += islice(_repeated(rows[timestep], generator), count)
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
    """Training rows, and an eighth of each timestep's rows for validation; none if any timestep had too few.

    With guidance a latent occurs twice, with and without its prompt. It is used for training or validation, never both.
    """
    shuffled = {timestep: _shuffled(of_timestep, generator) for timestep, of_timestep in rows.items()}
    held_out = {timestep: of_timestep[: len(of_timestep) // HELD_OUT] for timestep, of_timestep in shuffled.items()}
    if min(map(len, held_out.values())) < LEAST:
        return shuffled, {}
    latents = {timestep: {_latent(row) for row in some} for timestep, some in held_out.items()}
    for_training = {
        timestep: [row for row in of_timestep[len(held_out[timestep]) :] if _latent(row) not in latents[timestep]]
        for timestep, of_timestep in shuffled.items()
    }
    return (for_training, held_out) if all(for_training.values()) else (shuffled, {})


def _latent(row: Row) -> bytes:
    """A digest of a row's ``sample``, equal for equal samples."""
    sample = row.call.sample[row.number].contiguous()
    return hashlib.sha256(sample.reshape(-1).view(torch.uint8).numpy().tobytes()).digest()


def _shuffled(rows: Sequence[Row], generator: torch.Generator) -> list[Row]:
    return [rows[i] for i in torch.randperm(len(rows), generator=generator)]


def _repeated(rows: Sequence[Row], generator: torch.Generator) -> Iterator[Row]:
    while True:
        yield from rows
        rows = _shuffled(rows, generator)


def _parts(row: Row) -> tuple[list[Any], Any]:
    """One sample's part of each argument, and their tree structure. Arguments without a row per sample are shared."""
    call, i, _ = row
    leaves, structure = tree_flatten_with_path(call.arguments)
    batch = call.sample.shape[0]

    def part(path: Any, leaf: Any) -> Any:
        has_rows = isinstance(leaf, torch.Tensor) and leaf.ndim > 0 and leaf.shape[0] == batch
        return leaf[i] if has_rows and path[0].key not in call.shared else (leaf,)

    return [part(path, leaf) for path, leaf in leaves], structure


def _shape(row: Row) -> str:
    """A key that is equal for samples that can share a batch."""

    def signature(part: Any) -> Any:
        if isinstance(part, torch.Tensor):
            return part.shape, part.dtype
        (shared,) = part
        return shared.tolist() if isinstance(shared, torch.Tensor) else shared

    parts, structure = _parts(row)
    return repr((structure, row.call.sample.shape[1:], [signature(part) for part in parts]))


def _joined(rows: Sequence[Row]) -> RecordedCall:
    sample = torch.stack([row.call.sample[row.number] for row in rows])
    timestep = torch.tensor([row.timestep for row in rows], dtype=torch.float32)
    columns = zip(*(_parts(row)[0] for row in rows), strict=True)
    arguments = [torch.stack(column) if isinstance(column[0], torch.Tensor) else column[0][0] for column in columns]
    return RecordedCall(sample, timestep, tree_unflatten(arguments, _parts(rows[0])[1]), rows[0].call.shared)
