"""How much a text asks for each visual token.

Cao et al., "PuMer: Pruning and Merging Tokens for Efficient Vision Language Models",
ACL 2023, arXiv:2305.17530, section 3.1.

Letters: B batch, N heads, R text tokens, V visual tokens, H width of a head.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def attended(attention: Array, rows: Array, count: Array) -> Array:
    """Attention from the text, mean over heads: f32 [B, V].

    Args:
        attention: f32 [B, N, R, V], probabilities.
        rows: [B, R], weight of each text token.
        count: [B], what their sum is divided by, if it is 1 or more.
    """
    rows = rows.astype(jnp.float32)
    found = jnp.einsum("bnrv,br->bv", attention, rows) / attention.shape[1]
    return found / jnp.maximum(count, 1)[:, None]


def alike(text: Array, keys: Array, rows: Array, count: Array) -> Array:
    """Products of the text's queries, or keys, with visual keys: f32 [B, V].

    No softmax, hence next to free where no probabilities exist.

    Args:
        text: [B, R, H], mean over heads.
        keys: [B, V, H], mean over heads.
        rows, count: see `attended`.
    """
    asked = jnp.einsum("brh,br->bh", text, rows.astype(jnp.float32))
    found = jnp.einsum("bh,bvh->bv", asked, keys.astype(jnp.float32))
    return found / jnp.maximum(count, 1)[:, None]
