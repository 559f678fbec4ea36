"""Carries out a cut: applies an assignment to the tokens and to all aligned with them.

Letters: B batch, V tokens of the span, M tokens after the cut, D width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lmm_jax.depth.planner import Mode
from lmm_jax.depth.state import Array, Context, Keep, Mix, TokenState


def reduce_span(
    state: TokenState,
    ctx: Context,
    span: str,
    assignment: Keep | Mix,
    *,
    mode: Mode = "drop",
) -> tuple[TokenState, Context]:
    """Returns the state after a cut of `span`, and the context that follows it.

    Every cut passes here, so selection, merging and pooling cannot disagree on
    positions, sizes or aligned buffers. "mask" keeps the storage and hides what "drop"
    removes; both give the same logits.
    """
    where = state.layout.slice(span)
    rows = {
        name: None if x is None else x[:, where] for name, x in state.arrays().items()
    }
    aligned = dict(ctx.aligned) if span == "visual" else {}
    if isinstance(assignment, Keep) and mode == "mask":
        rows = _hidden_rows(rows, assignment)
    else:
        apply = _selected if isinstance(assignment, Keep) else _mixed
        rows, aligned = apply(rows, aligned, assignment)
        if mode == "mask":
            rows, aligned = _padded(rows, aligned, where.stop - where.start)
    if rows["gate"] is None and state.gate is not None:
        rows["gate"] = jnp.ones_like(rows["size"])
    return _replaced(state, span, rows), ctx.replace(aligned={**ctx.aligned, **aligned})


def _selected(rows, aligned, keep: Keep):
    index = keep.index
    rows = {name: None if x is None else _take(x, index) for name, x in rows.items()}
    rows["valid"] = rows["valid"] & keep.valid
    if keep.gate is not None:
        rows["gate"] = keep.gate
    return rows, {name: _take_aligned(x, index) for name, x in aligned.items()}


def _hidden_rows(rows, keep: Keep):
    """The same rows, those that are not kept made invisible."""
    batch = jnp.arange(keep.index.shape[0])[:, None]
    valid = jnp.zeros_like(rows["valid"]).at[batch, keep.index].max(keep.valid)
    rows = {**rows, "valid": rows["valid"] & valid}
    if keep.gate is not None:
        gate = jnp.ones_like(rows["size"]).at[batch, keep.index].set(keep.gate)
        rows["gate"] = gate
    return rows


def _mixed(rows, aligned, mix: Mix):
    heaviest = jnp.argmax(mix.weights, axis=-1)  # [B, M]
    mixed, _ = _selected(rows, {}, Keep(heaviest, mix.valid, mix.gate))
    weights = mix.weights.astype(jnp.float32)
    hidden = _product("bmv,bvd->bmd", weights, rows["hidden"])
    mixed["hidden"] = hidden.astype(rows["hidden"].dtype)
    mixed["valid"] = mix.valid
    members = (weights > 0).astype(jnp.float32)
    mixed["size"] = _product("bmv,bv->bm", members, rows["size"])
    aligned = {
        name: _product("bmv,...bvd->...bmd", weights, x).astype(x.dtype)
        for name, x in aligned.items()
    }
    return mixed, aligned


def _product(pattern: str, weights: Array, x: Array) -> Array:
    """In all bits of f32, on TPU too: a token that merges with none is not to change."""
    highest = jax.lax.Precision.HIGHEST
    return jnp.einsum(pattern, weights, x.astype(jnp.float32), precision=highest)


def _padded(rows, aligned, length: int):
    """Fills a span back to its old capacity with tokens that nobody sees."""
    extra = length - rows["valid"].shape[1]

    def pad(x: Array, axis: int) -> Array:
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, extra)
        return jnp.pad(x, widths)

    rows = {name: None if x is None else pad(x, 1) for name, x in rows.items()}
    if rows["gate"] is not None:
        rows["gate"] = jnp.where(rows["valid"], rows["gate"], 1.0)
    return rows, {name: pad(x, -2) for name, x in aligned.items()}


def _replaced(
    state: TokenState, span: str, rows: dict[str, Array | None]
) -> TokenState:
    """Puts the rows of one span back between its neighbours."""
    where = state.layout.slice(span)

    def put(old: Array, new: Array) -> Array:
        return jnp.concatenate([old[:, : where.start], new, old[:, where.stop :]], 1)

    old = state.arrays()
    if state.gate is None:
        old["gate"] = jnp.ones_like(state.size)
    new = {name: None if x is None else put(old[name], x) for name, x in rows.items()}
    return state.replace(
        **new, layout=state.layout.resized(span, rows["valid"].shape[1])
    )


def _take(x: Array, index: Array) -> Array:
    if x.ndim == 3:
        index = index[..., None]
    return jnp.take_along_axis(x, index, axis=1)


def _take_aligned(x: Array, index: Array) -> Array:
    """Gathers rows of [..., B, V, D] by [B, M]."""
    index = index.reshape((1,) * (x.ndim - 3) + (*index.shape, 1))
    return jnp.take_along_axis(x, index, axis=-2)
