"""Random: keep visual tokens drawn without replacement. A baseline for every selection.

Drawn anew for every image and step while training, and from a fixed key, by place, when
no key is given (evaluation), so that answers do not depend on the batch.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from lmm_jax.depth import (
    CONNECTOR,
    Context,
    Geometry,
    Keep,
    Observation,
    Reduce,
    TokenState,
)
from lmm_jax.ops.select import top_k_keep


def edits(geometry: Geometry, *, keep: int = 144, seed: int = 0) -> tuple[Reduce, ...]:
    """Returns one cut at the connector.

    Args:
        keep: visual tokens that stay, per image.
        seed: of the fixed draw.
    """
    return (Reduce("random", CONNECTOR, keep, Drawn(keep, seed)),)


def lossless(geometry: Geometry, tokens: int) -> dict[str, int]:
    """Arguments at which the cut must do nothing."""
    return dict(keep=geometry.visual_tokens)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Keeps tokens with the highest of independent uniform scores."""

    keep: int
    seed: int

    def __call__(self, state: TokenState, seen: Observation, ctx: Context) -> Keep:
        shape = state.valid.shape
        if ctx.rng is None:
            one = jax.random.uniform(jax.random.key(self.seed), shape[1:])
            scores = jnp.broadcast_to(one, shape)
        else:
            key = jax.random.fold_in(ctx.rng, self.seed)
            scores = jax.random.uniform(key, shape)
        return top_k_keep(scores, state.valid, self.keep)
