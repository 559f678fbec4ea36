"""What training minimises: a model's loss on a batch."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any, Protocol

from flax import linen as nn
import jax
import jax.numpy as jnp

from lmm_jax import losses
from lmm_jax.models import lmm
from lmm_jax.tasks import Task

Array = jax.Array
Batch = Mapping[str, Array]
Scalars = dict[str, Array]
TEACHER = "teacher"  # branch of the parameters that only the objective reads


class Objective(Protocol):
    """A loss, and how much a batch weighs where several are averaged.

    Attributes:
        unit: what is counted, "tokens" or "examples".
    """

    unit: str

    def weight(self, batch: Batch) -> Array:
        """Targets of a batch, float32 []."""

    def __call__(
        self, params: Any, batch: Batch, rng: Array | None
    ) -> tuple[Array, Scalars]:
        """The loss, a mean over targets, and what is reported beside it."""


@dataclasses.dataclass(frozen=True)
class NextToken:
    """Cross-entropy of the answers, and what the cuts add.

    Attributes:
        shards: see `losses.next_token`.
        weights: see `losses.total`.
    """

    model: lmm.LMM
    shards: int
    weights: Mapping[str, float]
    unit: str = "tokens"

    def weight(self, batch: Batch) -> Array:
        return batch["loss_mask"].sum()

    def __call__(
        self, params: Any, batch: Batch, rng: Array | None
    ) -> tuple[Array, Scalars]:
        logits, aux = self.model.apply({"params": params}, batch, rng, method="score")
        target, mask = batch["tokens"], batch["loss_mask"]
        loss, scalars = losses.next_token(logits, target, mask, shards=self.shards)
        loss = loss + losses.total(aux, self.weights)
        return loss, {**scalars, **aux, "loss": loss}


@dataclasses.dataclass(frozen=True)
class Headed:
    """A head's loss on its task, and the divergence from a teacher without cuts.

    Attributes:
        model: an encoder.
        scale: of the task's loss.
        teacher: the same encoder along a plan without cuts, or None; its parameters are
            the branch `TEACHER`.
        distill, temperature: weight of `losses.distillation`, and its temperature.
        weights: of what cuts add; see `losses.total`.
    """

    model: nn.Module
    task: Task
    scale: float
    teacher: nn.Module | None
    distill: float
    temperature: float
    weights: Mapping[str, float]
    unit: str = "examples"

    def weight(self, batch: Batch) -> Array:
        return jnp.float32(batch["tokens"].shape[0])

    def __call__(
        self, params: Any, batch: Batch, rng: Array | None
    ) -> tuple[Array, Scalars]:
        rows = self.task.flat(batch)
        own = {name: x for name, x in params.items() if name != TEACHER}
        outputs, aux = self.model.apply({"params": own}, rows, rng, method="score")
        loss, scalars = self.task.loss(outputs, batch)
        loss = self.scale * loss + losses.total(aux, self.weights)
        if self.teacher is not None:
            taught = {"params": params[TEACHER]}
            told, _ = self.teacher.apply(taught, rows, method="score")
            ours, theirs = (self.task.compared(x, batch) for x in (outputs, told))
            apart = losses.distillation(ours, theirs, temperature=self.temperature)
            loss = loss + self.distill * apart
            scalars = {**scalars, "distillation": apart}
        return loss, {**scalars, **aux, "loss": loss}
