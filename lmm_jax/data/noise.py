"""Noise that fills every slot of a plan: batches for timings, of no tokenizer and no files.

Slots are filled as those of real data are, so that tiles, crops, grids and coordinates
belong together.
"""

from __future__ import annotations

from collections.abc import Mapping
import math

import jax
import numpy as np
from PIL import Image

from lmm_jax.data import placement
from lmm_jax.data.conversation import Encoded
from lmm_jax.data.images import ImageSpec, candidates
from lmm_jax.data.placement import Slots
from lmm_jax.depth import Role


def batch(
    spec: ImageSpec, slots: Slots, vocab: int, size: int, *, answered: bool
) -> dict[str, np.ndarray]:
    """Random words around as many and as large images as there is room for.

    Args:
        vocab: W, words to draw from.
        size: B.
        answered: whether the second half of the text is an answer that is learned from;
            else all of it asks.

    Returns:
        The arrays of `lmm.abstract_batch`.
    """
    rng = np.random.default_rng(0)
    rows = [_sample(spec, slots, vocab, answered, rng) for _ in range(size)]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def like(
    abstract: Mapping[str, jax.ShapeDtypeStruct], below: Mapping[str, int]
) -> dict[str, np.ndarray]:
    """Random arrays of given shapes: pixels, shares in 0..1, and all slots are valid.

    Args:
        below: of arrays of other integers, the first that is too large.
    """
    rng = np.random.default_rng(0)

    def draw(name: str, x: jax.ShapeDtypeStruct) -> np.ndarray:
        if x.dtype == bool:
            return np.ones(x.shape, bool)
        if np.issubdtype(x.dtype, np.floating):
            return rng.random(x.shape, x.dtype)
        top = 256 if x.dtype == np.uint8 else below[name]
        return rng.integers(0, top, x.shape, x.dtype)

    return {name: draw(name, x) for name, x in abstract.items()}


def largest(spec: ImageSpec) -> tuple[int, int]:
    """Width and height in pixels of an image that fills all views and tokens."""
    if spec.native:
        unit = spec.native.patch * spec.native.merge
        tokens = spec.native.slots // spec.native.merge**2
        rows = math.isqrt(tokens)
        return tokens // rows * unit, rows * unit
    chosen = candidates(spec.crops) if spec.grid == "aspect" else ()
    grids = spec.pinpoints or chosen or ((1, 1),)
    # Of as many tiles, more rows have more newlines.
    columns, rows = max(grids, key=lambda grid: (math.prod(grid), grid[1]))
    return columns * spec.size, rows * spec.size


def _sample(spec, slots, vocab, answered, rng) -> dict[str, np.ndarray]:
    width, height = largest(spec)
    pixels = rng.integers(0, 256, (slots.images, height, width, 3), np.uint8)
    opened = [Image.fromarray(image) for image in pixels]
    placed = placement.place(
        _words(slots, vocab, answered, rng),
        slots,
        slots.images,
        pad_id=0,
        counts=placement.counts(opened, spec, slots),
        grids=placement.grids(opened, spec),
    )
    return {**placement.look(opened, spec, slots), **placed}


def _words(slots: Slots, vocab: int, answered: bool, rng) -> Encoded:
    asked = slots.text // 2 if answered else slots.text
    tokens = rng.integers(0, vocab, slots.text, np.int32)
    role = np.full(slots.text, Role.QUESTION, np.int8)
    role[asked:] = Role.ASSISTANT
    learned = role == Role.ASSISTANT
    behind = slice(asked - slots.queries, asked)
    tokens[behind], role[behind] = np.arange(slots.queries), Role.QUERY
    return Encoded(
        tokens=tokens,
        role=role,
        turn=np.zeros(slots.text, np.int32),
        loss_mask=learned.astype(np.float32),
        marks=np.full(slots.images, slots.prefix, np.int32),
    )
