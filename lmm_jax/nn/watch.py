"""What one layer does, reduced where it runs: functions for `LayerStack.run(watch=...)`.

Letters: B batch, T tokens, n tokens of a chunk, D width, N query heads, H head width.
"""

from __future__ import annotations

import dataclasses

from flax import struct
import jax
import jax.numpy as jnp

from lmm_jax.depth import Keys, TokenState
from lmm_jax.nn.attention import last_prompt_row, probabilities, sight, text_rows
from lmm_jax.nn.block import BlockSpec
from lmm_jax.nn.chunk import in_chunks

Array = jax.Array


@struct.dataclass
class Change:
    """How a layer changes the residual stream, over image and over text tokens.

    Attributes:
        cosine: f32 [B, 2], sums of the cosines between what enters and what leaves it.
        count: f32 [B, 2], how many tokens these are: no empty slot, no zero vector.
        entered, left: [B, D], the stream at the last prompt token.
    """

    cosine: Array
    count: Array
    entered: Array
    left: Array


def change(state: TokenState, after: Array, keys: Keys, queries: Array) -> Change:
    """Compares what enters a layer with what leaves it, [B, T, D], in float32."""
    before = state.hidden
    found = cosine(before, after)
    text = jnp.zeros(before.shape[1], bool).at[text_rows(state.layout)].set(True)
    real = state.valid & jnp.isfinite(found)
    which = real[:, None] & jnp.stack([~text, text])  # [B, 2, T]
    row = last_prompt_row(state)[:, None, None]
    entered, left = (jnp.take_along_axis(x, row, axis=1)[:, 0] for x in (before, after))
    total = jnp.where(which, found[:, None], 0.0).sum(axis=-1)
    return Change(total, which.sum(axis=-1).astype(jnp.float32), entered, left)


def cosine(x: Array, y: Array) -> Array:
    """f32 [...] of [..., D] and [..., D]; NaN where one of them is zero."""
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    size = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
    return (x * y).sum(axis=-1) / size


@dataclasses.dataclass(frozen=True)
class ImageAttention:
    """Of all that text attends to, the share of images: f32 [B], a mean over heads and
    over the tokens that see one; NaN where none does.

    Attributes:
        spec: of the block.
        chunk: queries at a time.
    """

    spec: BlockSpec
    chunk: int = 256

    def __call__(
        self, state: TokenState, after: Array, keys: Keys, queries: Array
    ) -> Array:
        visual = state.layout.slice("visual")

        def read(part):
            q, place = part  # [B, n, N, H]
            kinds = dict(causal=self.spec.causal, window=self.spec.window)
            seen = sight(place, state.place, **kinds)
            shares = probabilities(q, keys, seen)[..., visual].sum(axis=-1)
            return shares.mean(axis=(1, 2)), seen.visible[..., visual].any(axis=-1)

        shares, sees = in_chunks(read, (queries, state.place), self.chunk)
        text = text_rows(state.layout)
        asks = (sees & state.valid)[:, text]
        return jnp.where(asks, shares[:, text], 0.0).sum(axis=1) / asks.sum(axis=1)
