"""Tasks of encoders with a head: what is learned, how wrong it is, what is predicted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses

import einops
import jax
import jax.numpy as jnp

from lmm_jax import losses

Array = jax.Array
Batch = Mapping[str, Array]
Outputs = Mapping[str, Array]
MATCH = 0.5  # of the loss that says whether image and text belong together


@dataclasses.dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: of the head and of the published models.
        loss: (what the head says, batch) to the loss, a mean over examples, and scalars.
        target: batch size and classes to the shape and dtype of what is learned.
        ranks: texts compete for an image; candidates lie on axis 1 of `tokens`.
        labels: several classes may be right, and each more or less so.
        classes: their names, where the task has always the same.
        citation: arXiv identifier of the data set.
    """

    name: str
    loss: Callable[[Outputs, Batch], tuple[Array, dict[str, Array]]]
    target: Callable[[int, int], dict[str, jax.ShapeDtypeStruct]]
    ranks: bool = False
    labels: bool = False
    classes: tuple[str, ...] = ()
    citation: str = ""

    def arrays(
        self, read: Mapping[str, jax.ShapeDtypeStruct], classes: int, negatives: int
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of a training batch, from those that the model reads."""
        size = read["tokens"].shape[0]
        found = {**read, **self.target(size, classes)}
        if self.ranks:
            for name in ("tokens", "valid"):
                x = read[name]
                found[name] = x.update(shape=(size, 1 + negatives, *x.shape[1:]))
        return found

    def flat(self, batch: Batch) -> Batch:
        """The batch with each candidate as a row of its own, beside its image."""
        if not self.ranks:
            return batch
        count = batch["tokens"].shape[1]
        images = {
            k: jnp.repeat(batch[k], count, axis=0)
            for k in ("images", "grid")
            if k in batch
        }
        texts = {
            k: einops.rearrange(batch[k], "b p t -> (b p) t")
            for k in ("tokens", "valid")
        }
        return {**batch, **images, **texts}

    def compared(self, outputs: Outputs, batch: Batch) -> Array:
        """Logits that belong to one another on the last axis: [B, C], or [B, P]."""
        if not self.ranks:
            return outputs["logits"]
        return outputs["logits"].reshape(batch["tokens"].shape[:2])


def _classes(outputs, batch):
    return losses.classes(outputs["logits"], batch["label"])


def _labels(outputs, batch):
    return losses.labels(outputs["logits"], batch["labels"])


def _ranks(outputs, batch):
    scores = outputs["logits"].reshape(batch["tokens"].shape[:2])
    loss, scalars = losses.ranking(scores)
    if "match" not in outputs:  # as in retrieval heads of `transformers`
        return loss, scalars
    right = jnp.zeros(scores.shape, jnp.int32).at[:, 0].set(1).reshape(-1)
    match, _ = losses.classes(outputs["match"], right)
    return loss + MATCH * match, {**scalars, "match": match}


def _of(name: str, dtype, *, per_class: bool = False):
    def target(size: int, classes: int):
        shape = (size, classes) if per_class else (size,)
        return {name: jax.ShapeDtypeStruct(shape, dtype)}

    return target


TASKS = (
    Task(
        "vqav2",
        _labels,
        _of("labels", jnp.float32, per_class=True),
        labels=True,
        citation="1612.00837",
    ),
    Task(
        "nlvr2",
        _classes,
        _of("label", jnp.int32),
        classes=("False", "True"),
        citation="1811.00491",
    ),
    Task(
        "snli_ve",
        _classes,
        _of("label", jnp.int32),
        classes=("contradiction", "neutral", "entailment"),
        citation="1901.06706",
    ),
    Task(
        "flickr30k", _ranks, lambda size, classes: {}, ranks=True, citation="1412.2306"
    ),
)


def named(name: str) -> Task:
    """The row of `TASKS` with this name; ValueError lists the names."""
    found = [task for task in TASKS if task.name == name]
    if not found:
        known = ", ".join(task.name for task in TASKS)
        raise ValueError(f"task.name={name!r}: use one of {known}.")
    return found[0]
