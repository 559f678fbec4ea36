"""What the backward pass computes again instead of keeping it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

Remat = Literal["none", "full", "dots"]
# What costs nothing to repeat.
_MOVES = ("convert_element_type", "dynamic_slice", "reshape", "squeeze")


def rematted(
    body: Callable, remat: Remat, *, scanned: bool = False, times: int = 1
) -> Callable:
    """`body`, of which the backward pass recomputes what `remat` says.

    Args:
        scanned: it is that of a scan, which would keep a copy of all weights that it
            indexes or casts; these are read again instead.
        times: that the loop in the program runs; 1 where there is none, or none is left
            once it is unrolled.
    """
    if remat == "none" and not scanned:
        return body
    policies = jax.checkpoint_policies
    policy = {
        "none": lambda primitive, *_, **__: primitive.name not in _MOVES,
        "full": policies.nothing_saveable,
        "dots": policies.dots_with_no_batch_dims_saveable,
    }[remat]
    return jax.checkpoint(body, policy=policy, prevent_cse=_merges(remat, times))


def in_turn(x: Any, params: Any, remat: Remat, times: int) -> tuple[Any, Any]:
    """The same, to be read by layers: where no loop holds these, the gradients of their
    parameters are finished before layers below start, instead of all being held at once.

    Args:
        x: enters the layers.
        params: of the layers, or numbers of frozen ones.
        remat, times: as above.
    """
    if not _merges(remat, times):
        return x, params
    leaves, tree = jax.tree.flatten(params)
    floats = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]
    x, tied = _tied(x, [leaf for leaf, keep in zip(leaves, floats) if keep])
    tied = iter(tied)
    leaves = [next(tied) if keep else leaf for leaf, keep in zip(leaves, floats)]
    return x, jax.tree.unflatten(tree, leaves)


def _merges(remat: Remat, times: int) -> bool:
    """Whether XLA would merge what is computed again with what was computed first, and keep
    it all. Inside a loop it cannot, and a barrier would cost."""
    return times == 1 and remat != "none"


@jax.custom_vjp
def _tied(x, params):
    return x, params


_tied.defvjp(
    lambda *both: (both, None),
    lambda _, gradients: jax.lax.optimization_barrier(gradients),
)
