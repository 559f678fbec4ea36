"""A long sequence in pieces, so that what is large for each token is never there for all.

Letters: B batch, T tokens, n tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import einops
import jax
import jax.numpy as jnp


def in_chunks(body: Callable[[Any], Any], tokens: Any, size: int) -> Any:
    """Runs `body` over a few tokens after the other, as one program.

    Args:
        body: a function from pieces [B, n, ...] of `tokens` to a tree of arrays
            [B, n, ...], each token for itself.
        tokens: a tree of arrays [B, T, ...].
        size: the largest n; 0 takes all T at once.

    Returns:
        What `body` returns, [B, T, ...].

    Raises:
        ValueError: a negative size.
    """
    if size < 0:
        raise ValueError(
            f"chunks of {size} tokens: use 1 or more, or 0 to read all tokens at once."
        )
    length = jax.tree.leaves(tokens)[0].shape[1]
    if size == 0 or size >= length:
        return body(tokens)
    count = -(-length // size)
    padding = (
        -length % count
    )  # chunks are of one length, so it is less than one a chunk

    def cut(x):
        widths = ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2))
        return einops.rearrange(jnp.pad(x, widths), "b (c n) ... -> c b n ...", c=count)

    def joined(x):
        return einops.rearrange(x, "c b n ... -> b (c n) ...")[:, :length]

    return jax.tree.map(joined, jax.lax.map(body, jax.tree.map(cut, tokens)))
