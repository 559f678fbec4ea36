"""Attention over several caches at once, and what it can show of itself.

Letters: B batch, T tokens (queries), S keys, N query heads, K key heads, G = N / K,
H head width.
"""

from __future__ import annotations

from collections.abc import Callable

import einops
from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from lmm_jax.depth import Keys, Layout, Observation, Place, Role, TokenState
from lmm_jax.nn.rope import Rotation, rotate

Array = jax.Array

HIDDEN = -1e30  # finite: a row that may see nothing must not become NaN
TINY = 1e-30  # smaller than any sum of shares but that of such a row
SPREAD = 1e-6  # given to all keys alike where masks are soft


@struct.dataclass
class Fused:
    """Attention in one kernel: `run(q, keys, *arrays)` is [B, T, N, H]."""

    run: Callable[..., Array] = struct.field(pytree_node=False)
    arrays: tuple[Array | None, ...]

    def __call__(self, q: Array, keys: Keys) -> Array:
        return self.run(q, keys, *self.arrays)


@struct.dataclass
class Sight:
    """What queries may see of one part of the keys.

    Computed once for all layers of a run, since places change only at cuts.

    Attributes:
        visible: bool [B, T, S]; None if every query sees every key.
        gate: f32 [B, S], log of the keys' share in the softmax; None if all are one.
        share: f32 [B, T, S], these shares where masks are soft, in place of the others.
        fused: what computes attention where these keys are the only part; None: XLA.
    """

    visible: Array | None
    gate: Array | None = None
    share: Array | None = None
    fused: Fused | None = None

    def of(self, rows: np.ndarray) -> Sight:
        """That of some queries."""
        visible, share = (
            None if x is None else x[:, rows] for x in (self.visible, self.share)
        )
        return Sight(visible, self.gate, share)


def sight(
    queries: Place,
    keys: Place,
    *,
    causal: bool,
    window: int | None = None,
    soft: bool = False,
) -> Sight:
    """Who sees whom: valid keys of the same segment, none later if `causal`, none
    `window` positions or more ago.

    Positions decide, never storage order; but where masks are `soft`
    (`BlockSpec.soft_mask`), query i sees key i of the storage whatever it is.
    """
    visible = keys.valid[:, None, :] & (
        queries.segment[:, :, None] == keys.segment[:, None, :]
    )
    ago = queries.positions[:, :, None] - keys.positions[:, None, :]
    if causal:
        visible &= ago >= 0
    if window is not None:
        visible &= ago < window
    if soft:
        share = visible * keys.share[:, None]
        return Sight(None, share=share + (1 - share) * jnp.eye(*share.shape[1:]))
    gate = None if keys.gate is None else jnp.log(keys.gate)
    return Sight(visible, gate)


def attention(q: Array, parts: tuple[tuple[Keys, Sight], ...]) -> Array:
    """Softmax attention over all parts together; a row that sees nothing returns zeros,
    or anything where it is computed by a kernel.

    Logits are joined, never the caches: joining keys would copy the whole cache in every
    layer of every decode step. Softmax in float32.

    Args:
        q: [B, T, N, H].
        parts: keys [B, S_i, K, H] and who sees them; one part where masks are soft.

    Returns:
        [B, T, N, H].
    """
    if len(parts) == 1 and parts[0][1].fused is not None:
        return parts[0][1].fused(q, parts[0][0])
    shares, total = _shares(*_logits(q, parts), parts[-1][1].share)
    merge = "b k g t s -> b k (g t) s"
    shares, total = (einops.rearrange(x, merge) for x in (shares, total))
    shares = shares.astype(q.dtype)
    ends = np.cumsum([keys.k.shape[1] for keys, _ in parts])[:-1]
    out = sum(
        jnp.einsum("bkqs,bksh->bkqh", p, _by_head(keys.v))
        for p, (keys, _) in zip(jnp.split(shares, ends, axis=-1), parts)
    )
    # Divided here and not before the product: far fewer numbers, and a row that sees
    # nothing is zero.
    out = out / jnp.maximum(total, TINY).astype(q.dtype)
    return einops.rearrange(out, "b k (g t) h -> b t (k g) h", t=q.shape[1])


def observe(
    q: Array,
    keys: Keys,
    seen: Sight,
    state: TokenState,
    names: tuple[str, ...],
    rotation: Rotation | None = None,
) -> Observation:
    """Computes only what was asked for, beside the attention itself.

    Args:
        q: [B, T, N, H] rotated queries of the observed layer.
        keys: [B, T, K, H], its keys.
        seen: who sees whom.
        state: the tokens that enter the layer.
        names: fields of `Observation`.
        rotation: what queries and keys were rotated by; None if by nothing.
    """
    shown = {}
    if "mean_attention" in names:
        probs = probabilities(q, keys, seen).mean((1, 2))  # [B, T, T]
        asks = state.valid / jnp.maximum(state.valid.sum(1, keepdims=True), 1)
        shown["mean_attention"] = jnp.einsum("bt,bts->bs", asks, probs)
    if "last_attention" in names:
        row = last_prompt_row(state)[:, None]
        query = jnp.take_along_axis(q, row[..., None, None], axis=1)  # [B, 1, N, H]
        visible = jnp.take_along_axis(seen.visible, row[..., None], axis=1)
        probs = probabilities(query, keys, Sight(visible, seen.gate))
        shown["last_attention"] = probs.mean((1, 2))[:, 0]
    if "text_attention" in names:
        text = text_rows(state.layout)
        probs = probabilities(q[:, text], keys, seen.of(text))
        probs = einops.rearrange(probs, "b k g r s -> b (k g) r s")
        shown["text_attention"] = probs[..., state.layout.slice("visual")]
    for name, heads in (("keys", keys.k), ("queries", q)):
        if name in names:
            shown[name] = mean_head(heads, rotation)
    return Observation(**shown)


def text_rows(layout: Layout) -> np.ndarray:
    """Storage rows of everything but the visual span."""
    visual = layout.slice("visual")
    return np.delete(np.arange(layout.length), visual)


def mean_head(heads: Array, rotation: Rotation | None = None) -> Array:
    """f32 [B, T, H] of [B, T, N, H], turned back: alike where the content is."""
    mean = heads.astype(jnp.float32).mean(axis=2, keepdims=True)
    if rotation is not None:
        mean = rotate(mean, Rotation(rotation.cos, -rotation.sin))
    return mean[:, :, 0]


def last_prompt_row(state: TokenState) -> Array:
    """Storage row int32 [B] of the last valid token that is not an answer."""
    asks = state.valid & (state.role != Role.ASSISTANT)
    return jnp.argmax(jnp.where(asks, state.positions, -1), axis=1)


def _logits(q, parts):
    """f32 logits [B, K, G, T, S] over all parts, and bool visibility of the same shape
    (broadcast over heads; None if everything is visible)."""
    t, heads = q.shape[1], parts[0][0].k.shape[2]
    # Heads lead and all queries of a key head are one matrix: the products then need no
    # transposed copy of the logits, by far the largest array here.
    q = einops.rearrange(q, "b t (k g) h -> b k (g t) h", k=heads)
    logits, visible = [], []
    for keys, seen in parts:
        part = jnp.einsum(
            "bkqh,bksh->bkqs", q, _by_head(keys.k), preferred_element_type=jnp.float32
        )
        part = einops.rearrange(part, "b k (g t) s -> b k g t s", t=t)
        part = part * q.shape[-1] ** -0.5
        if seen.gate is not None:
            part = part + seen.gate[:, None, None, None, :]
        logits.append(part)
        visible.append(seen.visible)
    if all(v is None for v in visible):
        return _joined(logits), None
    return _joined(logits), _joined(visible)[:, None, None]


def _by_head(x: Array) -> Array:
    return einops.rearrange(x, "b s k h -> b k s h")


def _joined(parts: list[Array]) -> Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)


def probabilities(q: Array, keys: Keys, seen: Sight) -> Array:
    """What each query gives to each key, f32 [B, K, G, T, S]."""
    shares, total = _shares(*_logits(q, ((keys, seen),)), seen.share)
    return shares / jnp.maximum(total, TINY)


def _shares(
    logits: Array, visible: Array | None, share: Array | None
) -> tuple[Array, Array]:
    """Exponentials f32 [..., S] of logits, zero where nothing is seen, and their sums;
    or times `share` [B, T, S], and SPREAD added in all."""
    if visible is not None:
        logits = jnp.where(visible, logits, HIDDEN)
    largest = logits.max(axis=-1, keepdims=True)
    if share is None:  # else SPREAD makes a difference to what is subtracted
        largest = jax.lax.stop_gradient(largest)
    shares = jnp.exp(logits - largest)
    if visible is not None:
        shares = jnp.where(visible, shares, 0.0)
    if share is None:
        return shares, shares.sum(axis=-1, keepdims=True)
    shares = shares * share[:, None, None]
    total = shares.sum(axis=-1, keepdims=True) + SPREAD
    return shares + SPREAD / shares.shape[-1], total
