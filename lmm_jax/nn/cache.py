"""What decoding reads: keys of the prompt, ragged over depth, and of the tokens since.

Letters: B batch, L layers, l layers of one run, S keys, K key heads, H head width, M slots
of the tail.
"""

from __future__ import annotations

from flax import struct
import jax
import jax.numpy as jnp

from lmm_jax.depth import Keys, Place
from lmm_jax.nn.block import BlockSpec

Array = jax.Array


@struct.dataclass
class Run:
    """What a run of layers leaves for decoding: keys [l, B, S, K, H] and their place.

    Where parameters are `apart`, so are keys, as `packed` lays them out.
    """

    keys: Keys | tuple[Keys, ...]
    place: Place


@struct.dataclass
class Cache:
    """Keys of a prompt, ragged over depth, and of the tokens decoded since.

    The prompt part is written once, by prefill; a decode step writes the tail only.
    """

    runs: tuple[Run, ...]
    tail: Keys  # [L, B, M, K, H]
    start: Array  # int32 [B]; position of the first decoded token
    step: Array  # int32 []; decoded tokens so far
    shift: Array | None = None  # int32 [B]; coordinates minus position


def empty_tail(spec: BlockSpec, depth: int, batch: int, slots: int) -> Keys:
    """A tail for `slots` decoded tokens, zero-filled: [L, B, M, K, H]."""
    shape = (depth, batch, slots, spec.kv_heads, spec.head_dim)
    return Keys(jnp.zeros(shape, spec.dtype), jnp.zeros(shape, spec.dtype))
