"""Bipartite soft matching: the most similar tokens of a span become one.

Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, arXiv:2210.09461, section 3;
as PuMer uses it (arXiv:2305.17530). Tokens at even places are matched with those at odd
ones, so their order is part of the method. The first token is never merged into another.

Letters: B batch, T tokens, M tokens that are left, H width of a key.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array

# Beside cosines, in -1..1, where some tokens are padding: padding goes first, best into
# other padding, and a real token last, when there is nothing else.
_BOTH, _SOURCE, _TARGET = 3.0, 2.0, -2.0
_TINY = 1e-6


def mergeable(tokens: int) -> int:
    """The most tokens that one matching can merge: half of them without the first."""
    return max((tokens - 1) // 2, 0)


def matched(keys: Array, count: int, valid: Array | None = None) -> Array:
    """The slot, of M = T - count, in which each token ends: int32 [B, T].

    Slots hold first what stays of the even tokens, then the odd ones, each in order.
    Cosines in float32; ties go to the lower index. Nothing here has a gradient.

    Args:
        keys: [B, T, H], what is compared.
        count: tokens to merge, at most `mergeable(T)`.
        valid: bool [B, T]; None takes all tokens as equals. Otherwise padding merges
            before real tokens do, and what it holds decides nothing.
    """
    cosine = _cosines(jax.lax.stop_gradient(keys))
    if valid is not None:
        source, target = valid[:, 0::2, None], valid[:, None, 1::2]
        padding = jnp.where(target, _SOURCE, _BOTH)
        likeness = jnp.where(target, cosine, _TARGET)
        cosine = jnp.where(source, likeness, padding)
    cosine = cosine.at[:, 0].set(-jnp.inf)
    batch, even, odd = cosine.shape
    _, sources = jax.lax.top_k(cosine.max(axis=-1), count)
    merged = jnp.zeros((batch, even), bool)
    merged = merged.at[jnp.arange(batch)[:, None], sources].set(True)
    left = even - count
    stays = jnp.cumsum(~merged, axis=1) - 1
    slots = jnp.zeros((batch, even + odd), jnp.int32)
    slots = slots.at[:, 0::2].set(
        jnp.where(merged, left + cosine.argmax(axis=-1), stays)
    )
    return slots.at[:, 1::2].set(left + jnp.arange(odd))


def averages(slots: Array, left: int, share: Array) -> Array:
    """Weights f32 [B, M, T] of the mean of each slot; zero where all its shares are.

    Args:
        slots: int32 [B, T]; a token beyond the last slot is in none.
        left: M.
        share: [B, T], what each token counts for in its slot.
    """
    inside = slots[:, None] == jnp.arange(left)[:, None]
    weights = jnp.where(inside, share[:, None].astype(jnp.float32), 0.0)
    return weights / jnp.maximum(weights.sum(axis=-1, keepdims=True), _TINY)


def _cosines(keys: Array) -> Array:
    """Of each even key with each odd one, f32."""
    keys = keys.astype(jnp.float32)
    length = jnp.linalg.norm(keys, axis=-1, keepdims=True)
    keys = keys / jnp.maximum(length, _TINY)
    return jnp.einsum(
        "bih,bjh->bij",
        keys[:, 0::2],
        keys[:, 1::2],
        precision=jax.lax.Precision.HIGHEST,
    )
