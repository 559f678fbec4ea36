"""Token states on their way into the language stack and out of it.

Letters: B batch, I images, V visual tokens per image, T text tokens, D language width.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from lmm_jax.depth import Context, Layout, Role, TokenState

Array = jax.Array


def predecessors(state: TokenState, positions: Array, segment: Array) -> Array:
    """Storage row int32 [B, T] of the live token just before each text token.

    Found by position, so it holds whatever the cuts removed.
    """
    earlier = (
        state.valid[:, None]
        & (state.segment[:, None] == segment[:, :, None])
        & (state.positions[:, None] < positions[:, :, None])
    )
    return jnp.argmax(jnp.where(earlier, state.positions[:, None], -1), axis=-1)


def per_image(visual: Array, present: Array) -> TokenState:
    """Each image as a row of its own, [B * I, V, D]; `present` is bool [B, I, V or 1]."""
    b, i, v, d = visual.shape
    zero = jnp.zeros((b * i, v), jnp.int32)
    return TokenState(
        hidden=visual.reshape(b * i, v, d),
        positions=jnp.broadcast_to(jnp.arange(v), zero.shape),
        valid=jnp.broadcast_to(present.reshape(b * i, -1), zero.shape),
        segment=zero,
        role=jnp.full((b * i, v), Role.VISUAL, jnp.int8),
        turn=zero,
        size=jnp.ones((b * i, v), jnp.float32),
        layout=Layout.of({"visual": v}),
    )


def padded_visual(state: TokenState, ctx: Context, entrance: Layout):
    """Fills the visual span up to the storage of a plan that masks instead of dropping."""
    where = state.layout.slice("visual")
    extra = entrance.count("visual") - (where.stop - where.start)

    def pad(x: Array) -> Array:
        hole = jnp.zeros((x.shape[0], extra, *x.shape[2:]), x.dtype)
        return jnp.concatenate([x[:, : where.stop], hole, x[:, where.stop :]], axis=1)

    arrays = {name: None if x is None else pad(x) for name, x in state.arrays().items()}
    aligned = {
        name: jnp.pad(x, ((0, 0), (0, 0), (0, extra), (0, 0)))
        for name, x in ctx.aligned.items()
    }
    state = state.replace(**arrays, layout=entrance)
    return state, ctx.replace(aligned=aligned)


def check_aligned(aligned: Mapping[str, Array], visual: Array) -> None:
    """Raises ValueError unless injected rows match the visual tokens, [B, I, V, D]."""
    rows = visual.shape[1] * visual.shape[2]
    for name, buffer in aligned.items():
        if buffer.shape[2] != rows:
            raise ValueError(
                f"{name} injects {buffer.shape[2]} rows, the connector gives {rows} "
                "visual tokens; they must match row by row: use a reduction at the "
                "connector, which both follow, instead of another connector."
            )
