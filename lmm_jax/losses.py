"""Losses in f32: next token, what encoders predict, and the weighted sum of named terms."""

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


def labels(
    logits: Array, targets: Array, *, scale: float = 1.0
) -> tuple[Array, dict[str, Array]]:
    """Binary cross-entropy of each of many labels (VQAv2), mean over labels and examples.

    ViLT and METER sum over the 3129 labels (`scale=3129`), PuMer's code does not (1), which
    matters beside other terms.

    Args:
      logits: float [B, L].
      targets: float [B, L] in 0..1, how right each label is.
      scale: factor on the mean.

    Returns:
      The loss in nats, float32 []; and float32 scalars `loss` and `accuracy` (mean over
      examples of the target at the highest logit).
    """
    with jax.named_scope("labels"):
        logits = logits.astype(jnp.float32)
        loss = scale * optax.sigmoid_binary_cross_entropy(logits, targets).mean()
        best = logits.argmax(-1)[:, None]
        accuracy = jnp.take_along_axis(targets, best, axis=1).mean()
    return loss, {"loss": loss, "accuracy": accuracy}


def classes(logits: Array, targets: Array) -> tuple[Array, dict[str, Array]]:
    """Cross-entropy of one class (NLVR2, SNLI-VE), mean over examples.

    Args:
      logits: float [B, C].
      targets: int32 [B].

    Returns:
      The loss in nats, float32 []; and float32 scalars `loss` and `accuracy`.
    """
    with jax.named_scope("classes"):
        nll = optax.softmax_cross_entropy_with_integer_labels(
            logits.astype(jnp.float32), targets
        )
        loss, accuracy = nll.mean(), (logits.argmax(-1) == targets).mean()
    return loss, {"loss": loss, "accuracy": accuracy}


def ranking(scores: Array) -> tuple[Array, dict[str, Array]]:
    """Cross-entropy of the right caption, which comes first, among others (retrieval).

    Args:
      scores: float [B, P], of an image with each of P captions.

    Returns:
      As `classes`.
    """
    return classes(scores, jnp.zeros(len(scores), jnp.int32))


def distillation(student: Array, teacher: Array, *, temperature: float = 1.0) -> Array:
    """KL(teacher || student), mean over examples, in nats: float32 [].

    Many-label logits (VQAv2) are taken as those of one softmax, as PuMer does. Retrieval
    scores are [B, P], so that captions compete; of single scores it would be 0.

    Args:
      student, teacher: float [B, C]; the teacher gets no gradient.
      temperature: both are divided by it, and the loss multiplied by its square, which
        keeps gradients of one size (Hinton et al., arXiv:1503.02531, section 2).

    Raises:
      ValueError: shapes differ, or a single class.
    """
    if student.shape != teacher.shape or student.shape[-1] < 2:
        raise ValueError(
            f"student {student.shape} and teacher {teacher.shape} must share [B, C] with "
            "C of 2 or more; lay scores of candidates side by side"
        )
    with jax.named_scope("distillation"):
        teacher = jax.lax.stop_gradient(teacher)
        ours, theirs = (
            jax.nn.log_softmax(x.astype(jnp.float32) / temperature)
            for x in (student, teacher)
        )
        kl = optax.losses.kl_divergence_with_log_targets(ours, theirs)
        return temperature**2 * kl.mean()


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
