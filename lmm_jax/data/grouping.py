"""Batches of one modality, as LLaVA is fine-tuned (`group_by_modality_length`).

A batch has images in all its samples or in none, so no step spends its time on images that
half of the batch lacks. Within a batch, long and short samples are dealt evenly to its
parts. Which records meet in a batch is drawn anew each epoch.
"""

from __future__ import annotations

import dataclasses
import functools

import grain
import numpy as np

from lmm_jax.data.sources import BadRecord, Mixture, Record


def order(source: Mixture, batch_size: int, parts: int, seed: int) -> grain.MapDataset:
    """The endless stream of global indices; element k is a pure function of (seed, k).

    An epoch is whole batches: records that fill none, fewer than a batch, are left out,
    others in each epoch. Reads every record once, to measure it.

    Args:
        parts: equal parts of a batch, contiguous, that get the same length in all.

    Raises:
        ValueError: the batch does not divide into parts or is larger than the source, or
            the source has weights.
    """
    if source.weights:
        raise ValueError("data.group with weights of sources: leave one of them out")
    if batch_size % parts or batch_size > len(source):
        raise ValueError(
            f"data.group: a batch of {batch_size} needs as many records, and there are "
            f"{len(source)}, and a whole number in each of data.parts={parts}"
        )
    lengths = np.array([_signed_length(source, i) for i in range(len(source))])
    epochs = _Epochs(lengths, batch_size, parts, seed)
    whole = len(source) // batch_size * batch_size
    return (
        grain.MapDataset.range(whole).repeat().map_with_index(_Indices(epochs, whole))
    )


def epoch_order(
    lengths: np.ndarray, batch_size: int, parts: int, rng: np.random.Generator
) -> np.ndarray:
    """Indices of one epoch, batch after batch; mixed are only the last ones.

    Args:
        lengths: int [N], positive with images, otherwise not.
    """
    batches, rest = [], []
    for group in (np.flatnonzero(lengths > 0), np.flatnonzero(lengths <= 0)):
        shuffled = rng.permutation(group)
        full = len(group) // batch_size * batch_size
        batches += list(shuffled[:full].reshape(-1, batch_size))
        rest.append(shuffled[full:])
    rng.shuffle(batches)
    left = rng.permutation(np.concatenate(rest))
    full = len(left) // batch_size * batch_size
    batches += list(left[:full].reshape(-1, batch_size))
    return np.concatenate([_dealt(batch, lengths, parts) for batch in batches])


def _dealt(batch: np.ndarray, lengths: np.ndarray, parts: int) -> np.ndarray:
    """The longest first, each to the part that is shortest and has room."""
    hands, totals = [[] for _ in range(parts)], np.zeros(parts)
    sizes = np.abs(lengths[batch])
    for i in np.argsort(-sizes, kind="stable"):
        to = int(totals.argmin())
        hands[to].append(batch[i])
        full = len(hands[to]) == len(batch) // parts
        totals[to] = np.inf if full else totals[to] + sizes[i]
    return np.concatenate(hands)


def _signed_length(source: Mixture, index: int) -> int:
    """Words of a record, negative without images; a bad record has none."""
    try:
        record: Record = source[index]
    except BadRecord:
        return 0
    words = sum(len(turn["value"].split()) for turn in record.turns)
    return words if record.images else -words


@dataclasses.dataclass(frozen=True, eq=False)
class _Epochs:
    """Epoch -> its order; the last ones are remembered, in every worker for itself."""

    lengths: np.ndarray
    batch_size: int
    parts: int
    seed: int

    @functools.lru_cache(maxsize=2)  # noqa: B019 (lives as long as the stream)
    def __call__(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, epoch))
        return epoch_order(self.lengths, self.batch_size, self.parts, rng)


@dataclasses.dataclass(frozen=True)
class _Indices:
    epochs: _Epochs
    length: int

    def __call__(self, position: int, _: int) -> int:
        epoch, at = divmod(position, self.length)
        return int(self.epochs(epoch)[at])
