"""PuMer: drop the visual tokens that the text ignores, merge those that are alike.

Cao et al., "PuMer: Pruning and Merging Tokens for Efficient Vision Language Models",
ACL 2023, arXiv:2305.17530, section 3. Between attention and MLP of a few layers, visual
tokens are ranked by the attention of the text, the last ones dropped, and of the others
the most alike merged; text tokens are merged among themselves.

Letters: B batch, T tokens, V visual tokens before the cut, R text tokens, H head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from lmm_jax.depth import (
    Context,
    Geometry,
    Keep,
    Mix,
    Observation,
    Reduce,
    Role,
    TokenState,
    inside,
)
from lmm_jax.ops.merge import averages, matched, mergeable
from lmm_jax.ops.saliency import alike, attended

Array = jax.Array

# What the authors released; METER's layers are those of its co-attention.
RELEASED = {
    "vilt_vqav2": dict(layers=(2, 5, 8), prune=0.1, merge=0.3, text=0.2),
    "vilt_nlvr2": dict(layers=(2, 5, 8), prune=0.1, merge=0.3, text=0.2),
    "vilt_snli_ve": dict(layers=(2, 4, 6, 8), prune=0.1, merge=0.3, text=0.2),
    "meter_vqav2": dict(layers=(0, 1, 2, 3), prune=0.2, merge=0.2, text=0.2),
    "meter_snli_ve": dict(layers=(0, 1, 2, 3), prune=0.3, merge=0.5, text=0.2),
    "meter_nlvr2": dict(layers=(1, 2, 3), prune=0.3, merge=0.5, text=0.2),
}


def edits(
    geometry: Geometry,
    *,
    layers: Sequence[int] = (2, 5, 8),
    prune: float = 0.1,
    merge: float = 0.3,
    text: float = 0.0,
    score: Literal["attention", "first_head", "queries", "keys"] = "attention",
    preset: Literal["safe", "reference"] = "safe",
) -> tuple[Reduce, ...]:
    """Returns the cuts of PuMer, up to two in each layer.

    Each of the three parts works without the others.

    Args:
        geometry: static sizes.
        layers: language layers between whose attention and MLP tokens are reduced.
        prune: share of the visual tokens that are dropped at each.
        merge: share of the visual tokens, those to be dropped included, that merge into
            others.
        text: share of the text slots before the visual span that merge into others; in
            encoders only, where no token predicts the next.
        score: what ranks visual tokens: attention of the text (mean over heads, or the
            first head's), or products of its queries, or keys, with their keys.
        preset: "safe": padding asks for nothing and merges with nothing, and the image's
            [CLS] token stays. "reference": as the authors' code, where padding is a token
            like others, masks are averaged like tokens, and nothing protects [CLS].

    Raises:
        ValueError: layers that do not ascend or do not exist, a share outside [0, 1) or
            one that leaves nothing, text to merge in a causal model, or an unknown name.
    """
    _check(geometry, layers, dict(prune=prune, merge=merge, text=text))
    if score not in SCORES:
        raise ValueError(f"pumer.score={score!r}: use one of {', '.join(SCORES)}.")
    if preset not in ("safe", "reference"):
        raise ValueError(f"pumer.preset={preset!r}: use 'safe' or 'reference'.")
    visual, words = geometry.images * geometry.visual_tokens, geometry.prefix
    safe, cuts = preset == "safe", []
    for layer in layers:
        count = counts(visual, words, prune, merge, text)
        if round(prune * visual) >= visual > 0:
            raise ValueError(
                f"pumer.prune={prune} drops all of the {visual} visual tokens that reach "
                f"layer {layer}: use less, or fewer layers."
            )
        if count.visual < visual:
            leads = safe and geometry.image_class
            op = Visual(count.kept, count.visual, score, safe, leads)
            at, name = inside(layer), f"pumer_{layer}"
            cuts.append(Reduce(name, at, count.visual, op, SCORES[score].reads))
        if count.text < words:
            op, name = Text(words, count.text, safe), f"pumer_{layer}_text"
            cuts.append(
                Reduce(name, inside(layer), count.text, op, ("keys",), "prefix")
            )
        visual, words = count.visual, count.text
    return tuple(cuts)


def lossless(geometry: Geometry, tokens: int) -> dict[str, float]:
    """Arguments at which PuMer must do nothing."""
    return dict(layers=(1,), prune=0.0, merge=0.0)


class Counts(NamedTuple):
    """Tokens after one layer: visual ones that are kept, and those after merging."""

    kept: int
    visual: int
    text: int


def counts(visual: int, words: int, prune: float, merge: float, text: float) -> Counts:
    """Tokens that a layer leaves of so many.

    Halves round to the even number, and merging counts from before pruning, as in the
    authors' code.
    """
    kept = max(visual - round(prune * visual), min(visual, 1))
    merged = min(round(merge * visual), mergeable(kept))
    joined = min(round(text * words), mergeable(words))
    return Counts(kept, kept - merged, words - joined)


class Score(NamedTuple):
    """What ranks visual tokens.

    Attributes:
        reads: fields of `Observation`, with the keys that matching compares.
        of: (seen, visual span, weight of each text token [B, R], their number [B]) to
            f32 [B, V].
    """

    reads: tuple[str, ...]
    of: Callable[[Observation, slice, Array, Array], Array]


def _attention(heads: slice):
    def score(seen, visual, rows, count):
        return attended(seen.text_attention[:, heads], rows, count)

    return Score(("text_attention", "keys"), score)


def _products(name: str):
    def score(seen, visual, rows, count):
        asked = _text(getattr(seen, name), visual)
        return alike(asked, seen.keys[:, visual], rows, count)

    return Score(tuple(sorted({name, "keys"})), score)


SCORES = {
    "attention": _attention(slice(None)),
    "first_head": _attention(slice(1)),
    "queries": _products("queries"),
    "keys": _products("keys"),
}


@dataclasses.dataclass(frozen=True)
class Visual:
    """Ranks visual tokens, keeps the first, and merges those of them that are alike.

    What is left is stored by rank, which is what matching splits by.

    Attributes:
        keep: tokens that are not dropped.
        to: tokens after merging.
        score: name of what ranks them.
        safe: see `edits`.
        leads: the first token, the image's [CLS], stays the first.
    """

    keep: int
    to: int
    score: str
    safe: bool
    leads: bool

    def __call__(
        self, state: TokenState, seen: Observation, ctx: Context
    ) -> Keep | Mix:
        visual = state.layout.slice("visual")
        valid = state.valid[:, visual]
        if not self.safe:
            valid = jnp.ones_like(valid)
        index = self._ranked(self.scores(state, seen), valid)
        there = jnp.take_along_axis(valid, index, axis=1)
        if self.to == self.keep:
            return Keep(index, there)
        keys = jnp.take_along_axis(seen.keys[:, visual], index[..., None], axis=1)
        slots = matched(keys, self.keep - self.to, there if self.safe else None)
        rows = jnp.arange(len(index))[:, None]
        slots = jnp.full(valid.shape, self.to).at[rows, index].set(slots)
        return _mixed(slots, self.to, valid)

    def scores(self, state: TokenState, seen: Observation) -> Array:
        """How much the text asks for each visual token, f32 [B, V]."""
        visual = state.layout.slice("visual")
        asks = _text(state.role, visual) != Role.ASSISTANT
        share = _text(state.place.share, visual) * asks
        rows = share if self.safe else asks
        return SCORES[self.score].of(seen, visual, rows, share.sum(axis=1))

    def _ranked(self, scores: Array, valid: Array) -> Array:
        """int32 [B, keep], the highest first; ties go to the lower index."""
        scores = jnp.where(valid, jax.lax.stop_gradient(scores), -jnp.inf)
        if self.leads:
            scores = scores.at[:, 0].set(jnp.inf)
        return jax.lax.top_k(scores, self.keep)[1]


@dataclasses.dataclass(frozen=True)
class Text:
    """Merges the text tokens before the visual span that are alike.

    Attributes:
        of: tokens before merging, those of padding too. Slots behind them are what earlier
            merges hide, where a plan only hides; they are no tokens.
        to: tokens after merging.
        safe: see `edits`.
    """

    of: int
    to: int
    safe: bool

    def __call__(self, state: TokenState, seen: Observation, ctx: Context) -> Mix:
        where = state.layout.slice("prefix")
        keys, valid = seen.keys[:, where][:, : self.of], state.valid[:, where]
        there = valid[:, : self.of] if self.safe else None
        slots = matched(keys, self.of - self.to, there)
        behind = valid.shape[1] - self.of
        slots = jnp.pad(slots, ((0, 0), (0, behind)), constant_values=self.to)
        if self.safe:
            return _mixed(slots, self.to, valid)
        mix = _mixed(slots, self.to, jnp.ones_like(valid))
        share = state.place.share[:, where, None]
        gate = jnp.matmul(mix.weights, share, precision="highest")[..., 0]
        return Mix(mix.weights, gate > 0, gate=jnp.where(gate > 0, gate, 1.0))


def _mixed(slots: Array, to: int, valid: Array) -> Mix:
    """Means over the valid tokens of each slot."""
    weights = averages(slots, to, valid)
    return Mix(weights, weights.any(axis=-1))


def _text(x: Array, visual: slice) -> Array:
    """What lies around the visual span: [B, R, ...] of [B, T, ...]."""
    return jnp.concatenate([x[:, : visual.start], x[:, visual.stop :]], axis=1)


def _check(geometry: Geometry, layers: Sequence[int], shares: dict[str, float]) -> None:
    depth = geometry.language.depth
    outside = [layer for layer in layers if layer not in range(depth)]
    if outside or list(layers) != sorted(set(layers)) or not layers:
        raise ValueError(
            f"pumer.layers={list(layers)}: use one or more layers in 0..{depth - 1}, "
            "ascending, each once."
        )
    for name, share in shares.items():
        if not 0 <= share < 1:
            raise ValueError(f"pumer.{name}={share}: use a share in [0, 1).")
    if shares["text"] and geometry.language.causal:
        raise ValueError(
            f"pumer.text={shares['text']}: this language model is causal, where every "
            "text token has a place and predicts the next: use text=0."
        )
