"""Uniform: keep visual tokens at even distances. A baseline for every selection."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lmm_jax.depth import (
    CONNECTOR,
    Context,
    Geometry,
    Keep,
    Observation,
    Reduce,
    TokenState,
)
from lmm_jax.ops.select import evenly_spaced


def edits(geometry: Geometry, *, keep: int = 144) -> tuple[Reduce, ...]:
    """Returns one cut at the connector.

    Args:
        keep: visual tokens that stay, per image; spread evenly over rows and columns
            when it is a square, over the raster order otherwise.
    """
    return (Reduce("uniform", CONNECTOR, keep, EvenlySpaced(geometry.grid, keep)),)


def lossless(geometry: Geometry, tokens: int) -> dict[str, int]:
    """Arguments at which the cut must do nothing."""
    return dict(keep=geometry.visual_tokens)


Array = jax.Array


@dataclasses.dataclass(frozen=True)
class EvenlySpaced:
    """Keeps the same places of every image."""

    grid: tuple[int, int]
    keep: int

    def __call__(self, state: TokenState, seen: Observation, ctx: Context) -> Keep:
        rows, columns = self.grid
        side = round(self.keep**0.5)
        # A connector that makes another number of tokens has no map to spread over.
        if side * side != self.keep or state.valid.shape[1] != rows * columns:
            return self._along_the_sequence(state.valid)
        down = np.asarray(evenly_spaced(rows, side))
        across = np.asarray(evenly_spaced(columns, side))
        index = jnp.asarray((down[:, None] * columns + across).reshape(-1), jnp.int32)
        index = jnp.broadcast_to(index, (len(state.valid), self.keep))
        return Keep(index, jnp.take_along_axis(state.valid, index, axis=1))

    def _along_the_sequence(self, valid: Array) -> Keep:
        """Of valid bool [B, V], the valid ones first; images may have fewer than others."""
        count = valid.sum(axis=1, keepdims=True)
        kept, i = jnp.minimum(count, self.keep), jnp.arange(self.keep)
        index = (2 * i + 1) * count // (2 * jnp.maximum(kept, 1))
        index = jnp.minimum(index, valid.shape[1] - 1)
        return Keep(index.astype(jnp.int32), i < kept)
