"""Losses in f32: next token, and the weighted sum of named terms."""

from __future__ import annotations

from collections.abc import Mapping

import jax
from jax import Array
import jax.numpy as jnp
import optax


def next_token(
    logits: Array, targets: Array, mask: Array, *, shards: int = 1
) -> tuple[Array, dict[str, Array]]:
    """Cross-entropy of logits that already stand where they predict: no shift here.

    With one shard the mean runs over all supervised tokens of the global batch. With n
    it is the mean over n contiguous parts of the batch of their own token means, parts
    without supervised tokens aside: with n = devices × accumulation steps this is how
    the torch recipes of LLaVA normalise, where a token counts less in a part with many.

    Args:
      logits: float [B, T, W]; row t predicts `targets[:, t]`.
      targets: int32 [B, T]; any value, -100 too, where the mask is 0.
      mask: float32 [B, T], weight of each target, 0 for unsupervised.
      shards: parts of the batch that are averaged on their own; divides B.

    Returns:
      The loss in nats, float32 [], 0 without supervised tokens; and float32 scalars
      `loss`, `tokens` (sum of the mask) and `accuracy` (weighted share of arg max hits,
      over the global batch).

    Raises:
      ValueError: shapes disagree, or `shards` does not divide B.
    """
    if not logits.shape[:-1] == targets.shape == mask.shape:
        raise ValueError(
            f"logits {logits.shape}, targets {targets.shape} and mask {mask.shape} "
            "must share [B, T]; slice the logits to the rows that predict"
        )
    if shards < 1 or targets.shape[0] % shards:
        raise ValueError(
            f"shards={shards} must divide the batch of {targets.shape[0]}; use 1 for a "
            "mean over all tokens"
        )
    with jax.named_scope("next_token"):
        mask = mask.astype(jnp.float32)
        supervised = mask > 0
        targets = jnp.where(supervised, targets, 0)
        nll = optax.softmax_cross_entropy_with_integer_labels(
            logits.astype(jnp.float32), targets
        )
        nll = jnp.where(supervised, nll, 0.0) * mask
        means, tokens = _means(nll.reshape(shards, -1), mask.reshape(shards, -1))
        loss = _ratio(means.sum(), (tokens > 0).sum())
        hits = (logits.argmax(-1) == targets) * mask
    accuracy = _ratio(hits.sum(), mask.sum())
    return loss, {"loss": loss, "tokens": mask.sum(), "accuracy": accuracy}


def total(terms: Mapping[str, Array], weights: Mapping[str, float]) -> Array:
    """Sum of named loss terms, each times its weight; float32 [].

    A weight of 0 leaves its term out, so that a NaN in it does no harm.

    Raises:
      ValueError: a term without weight, or a weight without term.
    """
    if terms.keys() != weights.keys():
        raise ValueError(
            f"losses without weight: {sorted(terms.keys() - weights.keys())}; weights "
            f"without loss: {sorted(weights.keys() - terms.keys())}. Give every loss "
            "the model returns one weight by name (0 turns it off)"
        )
    parts = [terms[name] * weight for name, weight in weights.items() if weight]
    return sum(parts, jnp.zeros((), jnp.float32))


def _means(values: Array, weights: Array) -> tuple[Array, Array]:
    tokens = weights.sum(axis=1)
    return _ratio(values.sum(axis=1), tokens), tokens


def _ratio(value: Array, count: Array) -> Array:
    return value / jnp.where(count > 0, count, 1)
