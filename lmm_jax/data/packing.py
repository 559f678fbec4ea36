"""Rows of several short conversations, so that few slots of a batch are empty.

Storage is not order, so a row is its samples one after the other, over prefix and suffix,
each a segment of its own: a token sees only those, and positions start anew. Samples stay
whole, each comes once an epoch, and others meet in each. Their loss and gradients are those
of rows of their own (but with `train.loss_shards`, which averages rows).

Samples are chosen by their lengths, so every record is read and tokenised once at the
start, after a resume too: about a millisecond each, divided over `data.workers`. In each of
them an epoch then takes some 20 microseconds a record.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
import dataclasses
import functools
import threading
from typing import Any

import numpy as np

from lmm_jax.data.conversation import Encoded
from lmm_jax.data.placement import SampleSpec, arranged
from lmm_jax.data.sources import BadRecord, Mixture

OPEN = 64  # rows that may still take samples
NOTHING = Encoded(*(np.zeros(0, kind) for kind in ("i4", "i1", "i4", "f4", "i4")))
_LOCK = threading.Lock()  # of all `Rows`: one thread packs an epoch, the others wait


@dataclasses.dataclass(frozen=True)
class Measure:
    """Index -> int [2], the text and image slots of a record; zeros if it is bad."""

    source: Mixture
    spec: SampleSpec

    def __call__(self, index: int) -> np.ndarray:
        try:
            record = self.source[index]
            encoded = self.spec.encode(record.turns)
        except BadRecord:
            return np.zeros(2, int)
        slots, images = self.spec.slots, len(record.images)
        text = len(encoded.tokens)
        text = min(text, slots.text) if self.spec.truncate else text
        fits = text <= slots.text and images <= slots.images
        good = fits and images == len(encoded.marks)
        return np.array([text, images]) * good


def pack(
    sizes: np.ndarray, room: tuple[int, int], most: int, rng: np.random.Generator
) -> list[list[int]]:
    """All records, shuffled, in rows: each in the first of the open rows with room for it.

    Args:
        sizes: int [N, 2], text and image slots of each record, `room` at most.
        room: those of a row.
        most: records of a row.
    """
    needed = np.concatenate([sizes, np.ones((len(sizes), 1), int)], axis=1)
    rows: list[list[int]] = []
    free = np.full((OPEN, 3), -1)  # in the last rows, the oldest first
    for index in rng.permutation(len(sizes)).tolist():
        fits = (free >= needed[index]).all(axis=1)
        at = int(fits.argmax())
        if not fits[at]:
            rows.append([])
            free[:-1], at = free[1:], OPEN - 1
            free[at] = *room, most
        rows[at - OPEN].append(index)
        free[at] -= needed[index]
    return rows


class Rows:
    """Position in the endless stream -> records of a row, a pure function of it and seed.

    Epochs differ in their number of rows; those before a position are packed to find it.
    """

    def __init__(self, sizes: np.ndarray, room: tuple[int, int], most: int, seed: int):
        """See `pack`."""
        self._sizes, self._room, self._most, self._seed = sizes, room, most, seed
        self._starts = [0]  # of the epochs, as far as they are known

    def __call__(self, position: int) -> list[int]:
        with _LOCK:
            while self._starts[-1] <= position:
                rows = self._epoch(len(self._starts) - 1)
                self._starts.append(self._starts[-1] + len(rows))
            epoch = bisect.bisect(self._starts, position) - 1
            return self._epoch(epoch)[position - self._starts[epoch]]

    @functools.lru_cache(maxsize=2)  # noqa: B019 (lives as long as the stream)
    def _epoch(self, epoch: int) -> list[list[int]]:
        rng = np.random.default_rng((self._seed, epoch))
        return pack(self._sizes, self._room, self._most, rng)


@dataclasses.dataclass(frozen=True)
class Packer:
    """Position in the stream -> row of a batch; a bad record leaves its slots empty."""

    source: Mixture
    rows: Rows
    spec: SampleSpec
    most: int

    def __call__(self, position: int, _: int) -> dict[str, Any]:
        samples, skipped = [], []
        for index in self.rows(position):
            try:
                record = self.source[index]
                samples.append(self.spec.sample(record, index=index, snug=True))
            except BadRecord:
                skipped.append(index)
        ids = [found["id"] for found in samples]
        numbers = {"id": self._numbers(ids), "skipped": self._numbers(skipped)}
        return {**joined(samples, self.spec), **numbers}

    def _numbers(self, found: list[int]) -> np.ndarray:
        return np.array(found + [-1] * (self.most - len(found)), np.int64)


def joined(
    samples: Sequence[dict[str, np.ndarray]], spec: SampleSpec
) -> dict[str, np.ndarray]:
    """One row of snug samples, segment by segment, then the slots that stay empty."""
    text = sum(len(found["tokens"]) for found in samples)
    images = sum(len(found["grid"]) for found in samples)
    room = spec.slots.text - text, spec.slots.images - images
    empty = arranged(NOTHING, (), spec, spec.slots.filled(*room))
    parts = [*samples, empty]
    row = {name: np.concatenate([part[name] for part in parts]) for name in empty}
    for name in ("segment", "visual_segment"):
        lengths = [len(part[name]) for part in parts]
        row[name] = np.repeat(np.arange(len(parts), dtype=np.int32), lengths)
    return row
