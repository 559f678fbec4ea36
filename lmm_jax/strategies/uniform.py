"""Uniform: keep visual tokens at even distances. A baseline for every selection."""

from __future__ import annotations

import dataclasses

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


@dataclasses.dataclass(frozen=True)
class EvenlySpaced:
    """Keeps the same places of every image."""

    grid: tuple[int, int]
    keep: int

    def __call__(self, state: TokenState, seen: Observation, ctx: Context) -> Keep:
        index = jnp.asarray(self._places(state.hidden.shape[1]), jnp.int32)
        index = jnp.broadcast_to(index, (state.hidden.shape[0], self.keep))
        return Keep(index, jnp.take_along_axis(state.valid, index, axis=1))

    def _places(self, tokens: int) -> np.ndarray:
        rows, columns = self.grid
        side = round(self.keep**0.5)
        # A connector that makes another number of tokens has no map to spread over.
        if side * side != self.keep or tokens != rows * columns:
            return np.asarray(evenly_spaced(tokens, self.keep))
        down = np.asarray(evenly_spaced(rows, side))
        across = np.asarray(evenly_spaced(columns, side))
        return (down[:, None] * columns + across).reshape(-1)
