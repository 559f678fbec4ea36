"""Stacked parameters of which only some layers learn, as a training step reads them.

XLA has no views: a loop over some rows of a stack scans a copy of them. Of frozen rows,
which are most, that would be a second copy of the model, so loops index those where they
lie. Rows that learn they scan, or the backward pass would add a cotangent of the whole
stack in every layer.
"""

from __future__ import annotations

from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

Array = jax.Array


@struct.dataclass
class Halves:
    """A parameter of a stack of layers.

    Attributes:
        learning: [n, ...] for each run of n neighbouring layers that learn.
        frozen: [m, ...], the other layers in order; None if they lack the parameter.
        layers: those that learn, ascending.
    """

    learning: tuple[Array, ...]
    frozen: Array | None
    layers: tuple[int, ...] = struct.field(pytree_node=False)

    @classmethod
    def of(
        cls, learning: Array, frozen: Array | None, layers: tuple[int, ...]
    ) -> Halves:
        """From rows that learn, [k, ...], and those that do not."""
        first = [i for i, layer in enumerate(layers) if layer - 1 not in layers]
        sizes = [stop - start for start, stop in zip(first, (*first[1:], len(layers)))]
        # One split and not a slice each: its gradient is one concatenation.
        return cls(tuple(jax.lax.split(learning, sizes)), frozen, layers)

    def rows(self, run: range) -> Array | None:
        """What a loop over some layers scans: their rows if they learn, int32 numbers of
        frozen rows, or None where there is nothing."""
        if not self._learns(run):
            places = [layer - self._before(layer) for layer in run]
            return None if self.frozen is None else jnp.asarray(places, jnp.int32)
        start = 0
        for part in self.learning:
            own = self.layers[start : start + len(part)]
            if run[0] in own and run[-1] in own:
                first, last = run[0] - own[0], run[-1] - own[0]
                return part[first : last + 1 : run.step]
            start += len(part)
        return jnp.stack([self._one(layer) for layer in run])

    def row(self, run: range, one: Array | None) -> Array | None:
        """The parameter of a layer of the run, inside the loop, from its row."""
        if self._learns(run) or one is None:
            return one
        return jax.lax.dynamic_index_in_dim(self.frozen, one, keepdims=False)

    def _learns(self, run: range) -> bool:
        """Whether any of these layers does. A plan whose scans mix both is computed as
        well, but saves nothing."""
        return not set(run).isdisjoint(self.layers)

    def _one(self, layer: int) -> Array:
        """A layer's parameter; zeros where it has none, as an adapter that does nothing."""
        before = self._before(layer)
        if layer in self.layers:
            return jnp.concatenate(self.learning)[before]
        if self.frozen is None:
            return jnp.zeros_like(self.learning[0][0])
        return self.frozen[layer - before]

    def _before(self, layer: int) -> int:
        """How many layers below it learn."""
        return sum(other < layer for other in self.layers)


def rows(layers: Any, run: range) -> Any:
    """Of a tree of `Halves` and whole stacks [L, ...], what a loop over a run scans."""
    where = slice(run.start, run.stop, run.step)

    def of(leaf: Any) -> Any:
        return leaf.rows(run) if isinstance(leaf, Halves) else leaf[where]

    return jax.tree.map(of, layers, is_leaf=_halved)


def row(layers: Any, run: range, one: Any) -> Any:
    """The parameters of a layer, inside the loop, from its row."""

    def of(leaf: Any, one: Any) -> Any:
        return leaf.row(run, one) if isinstance(leaf, Halves) else one

    return jax.tree.map(of, layers, one, is_leaf=_halved)


def _halved(leaf: Any) -> bool:
    return isinstance(leaf, Halves)
