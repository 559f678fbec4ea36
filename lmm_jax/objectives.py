"""What training minimises: a model's loss on a batch."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any, Protocol

import jax

from lmm_jax import losses
from lmm_jax.models import lmm

Array = jax.Array
Batch = Mapping[str, Array]
Scalars = dict[str, Array]


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
