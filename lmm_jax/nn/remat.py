"""What the backward pass computes again instead of keeping it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax

Remat = Literal["none", "full", "dots"]
# What costs nothing to repeat.
_MOVES = ("convert_element_type", "dynamic_slice", "reshape", "squeeze")


def rematted(body: Callable, remat: Remat, *, looped: bool = False) -> Callable:
    """`body`, of which the backward pass recomputes what `remat` says.

    Args:
        looped: it is that of a scan, which would keep a copy of all weights that it
            indexes or casts; these are read again instead.
    """
    if remat == "none" and not looped:
        return body
    policies = jax.checkpoint_policies
    policy = {
        "none": lambda primitive, *_, **__: primitive.name not in _MOVES,
        "full": policies.nothing_saveable,
        "dots": policies.dots_with_no_batch_dims_saveable,
    }[remat]
    # Inside a scan nothing can be merged across iterations, so no barrier is needed.
    return jax.checkpoint(body, policy=policy, prevent_cse=False)
