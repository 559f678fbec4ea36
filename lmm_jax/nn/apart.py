"""Layers apart: how one CPU reads them fastest, to run and to decode.

XLA on CPU copies a layer out of its stack before it multiplies by it, three times the
traffic that decoding needs. The price is a program that grows with the layers.

Letters: B batch, L layers, S keys, K key heads, H head width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lmm_jax.depth import Keys


def apart(layers: Mapping[str, Any]) -> tuple[Any, ...]:
    """Stacked parameters as L trees; on one CPU they are views of the same memory."""
    flat, tree = jax.tree.flatten(jax.tree.map(np.asarray, layers))
    rows = zip(*flat)
    return tuple(
        jax.device_put(jax.tree.unflatten(tree, row), may_alias=True) for row in rows
    )


def packed(keys: Keys) -> Keys:
    """[B, S, K, H] in the orders that products read, k [B, K, S, H] and v [B, K, H, S]:
    XLA on CPU would transpose the prompt in every layer of every decode step."""
    return Keys(keys.k.transpose(0, 2, 1, 3), keys.v.transpose(0, 2, 3, 1))


def unpacked(keys: Keys) -> Keys:
    """Back; the compiler sees that nothing is to be done."""
    return Keys(keys.k.transpose(0, 2, 1, 3), keys.v.transpose(0, 3, 1, 2))
