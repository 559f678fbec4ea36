"""Selections with validity: static counts, surplus slots invalid.

Letters: B batch, V tokens of a span, M tokens after a cut.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lmm_jax.depth import Keep

Array = jax.Array


def top_k_keep(scores: Array, valid: Array, keep: int) -> Keep:
    """Keeps the `keep` valid tokens with the highest scores, in storage order.

    Scores are ranked in float32: at bfloat16 the attention of one query over some 600
    keys is full of ties. Ties go to the lower index.

    Args:
        scores: [B, V].
        valid: bool [B, V]; a row with fewer valid tokens returns invalid slots, last.
        keep: M.
    """
    scores = jax.lax.stop_gradient(scores.astype(jnp.float32))
    top, index = jax.lax.top_k(jnp.where(valid, scores, -jnp.inf), keep)
    chosen = top > -jnp.inf
    length = valid.shape[-1]
    order = jnp.argsort(jnp.where(chosen, index, index + length), axis=-1)
    index = jnp.take_along_axis(index, order, axis=-1).astype(jnp.int32)
    return Keep(index, jnp.take_along_axis(chosen, order, axis=-1))


def evenly_spaced(length: int, keep: int) -> tuple[int, ...]:
    """`keep` indices in 0..length-1, as even as integers allow, centred."""
    return tuple((2 * i + 1) * length // (2 * keep) for i in range(keep))
