"""Low-rank adaptation (LoRA, arXiv:2106.09685): beside a frozen projection, a small one
that learns.

The two products are computed side by side. A merged kernel would be a dense copy in every
step, its gradient a dense product (and on a mesh a dense reduction) that is then thrown
away, and dropout, which acts on the input, would be impossible.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from lmm_jax.nn.halves import Halves
from lmm_jax.nn.linear import Linear

Array = jax.Array

LEAVES = ("lora_a", "lora_b")
NOISE = "lora"  # Linen's name for the stream of dropout keys


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adaptation of some projections of a block.

    Attributes:
        rank: columns of A and rows of B.
        alpha: the low-rank product is multiplied by alpha / rank.
        dropout: share of the inputs of A that training zeroes.
        names: adapted submodules of the block.
        layers: of the stack that have adapters, whose parameters have as many rows; None:
            all.
    """

    rank: int
    alpha: float
    dropout: float
    names: tuple[str, ...]
    layers: tuple[int, ...] | None = None

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class LoraLinear(Linear):
    """x -> Linear(x) + alpha / rank * B A dropout(x); B starts at zero.

    A and B are float32 whatever the dtype of the frozen kernel: they learn. Dropout is on
    where a key is given (`NOISE`).
    """

    lora: Lora | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = super().__call__(x)
        if self.lora.layers and self._plain:
            return y
        rank, fan_in = self.lora.rank, math.prod(self.inputs)

        def uniform(key, shape):  # Kaiming's with slope sqrt(5), as in PEFT
            bound = fan_in**-0.5
            return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

        a = self.param("lora_a", uniform, (*self.inputs, rank)).astype(self.dtype)
        shape = (rank, *self.outputs)
        b = self.param("lora_b", nn.initializers.zeros, shape).astype(self.dtype)
        x = self._dropped(x.astype(self.dtype)).reshape(-1, fan_in)
        small = (x @ a.reshape(fan_in, rank)) * self.lora.scale
        return y + (small @ b.reshape(rank, -1)).reshape(y.shape)

    @property
    def _plain(self) -> bool:
        """Whether this layer is one without an adapter."""
        stored = self.get_variable("params", "lora_a")
        return stored is None and not self.is_initializing()

    def _dropped(self, x: Array) -> Array:
        rate = self.lora.dropout
        if not rate or not self.has_rng(NOISE):
            return x
        kept = jax.random.bernoulli(self.make_rng(NOISE), 1 - rate, x.shape)
        return jnp.where(kept, x / (1 - rate), 0)


def thinned(layers: Mapping[str, Any], lora: Lora | None) -> Mapping[str, Any]:
    """Stacked parameters of blocks, with adapters of those layers only that have one."""
    if not (lora and lora.layers):
        return layers
    few = jnp.asarray(lora.layers)
    return _changed(layers, lora, lambda x: x[few])


def adapted(layers: Mapping[str, Any], lora: Lora | None) -> Mapping[str, Any]:
    """The same as the executor reads them: adapters say whose they are."""
    if not (lora and lora.layers):
        return layers
    return _changed(layers, lora, lambda x: Halves.of(x, None, lora.layers))


def _changed(layers, lora: Lora, change):
    new = {
        name: {**layers[name], **{leaf: change(layers[name][leaf]) for leaf in LEAVES}}
        for name in lora.names
    }
    return {**layers, **new}
