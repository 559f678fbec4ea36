"""What the backward pass computes again instead of keeping it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax

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
    # Outside a loop XLA would merge what is computed again with what was computed first,
    # and keep it all; inside one it cannot, and a barrier would cost.
    merges = times == 1 and remat != "none"
    return jax.checkpoint(body, policy=policy, prevent_cse=merges)
