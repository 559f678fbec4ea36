"""Weights in eight bits for decoding, which reads all of them for every token."""

from __future__ import annotations

from typing import Any

import einops
from flax import traverse_util
import jax
import jax.numpy as jnp

from lmm_jax.models import lmm
from lmm_jax.models.specs import LMMSpec
from lmm_jax.nn.linear import Int8


def int8(params: dict[str, Any], spec: LMMSpec) -> dict[str, Any]:
    """The same parameters, matrices of the language model as `Int8`.

    One scale per output, symmetric, the largest weight at 127. Biases, norms, the vision
    tower and the projector, which are read once per prompt, stay as they are; so does an
    embedding that is not the head too.
    """
    flat = dict(traverse_util.flatten_dict(params, sep="/"))
    for row in lmm.params(spec):
        tied = spec.language.tied and row.path == "language/embed/table"
        if row.path.startswith("language/") and (row.path.endswith("kernel") or tied):
            # The published layout is [out, in].
            layers = "layers " if row.axes.startswith("layers ") else ""
            flat[row.path] = _rounded(
                flat[row.path], f"{row.axes} -> {layers}{row.layout}"
            )
    return traverse_util.unflatten_dict(flat, sep="/")


def size(params: Any) -> int:
    """Bytes of all parameters."""
    return sum(x.nbytes for x in jax.tree.leaves(params))


def _rounded(kernel: jax.Array, layout: str) -> Int8:
    matrix = einops.rearrange(kernel.astype(jnp.float32), layout)
    scale = jnp.abs(matrix).max(axis=-1) / 127
    steps = matrix / jnp.where(scale > 0, scale, 1)[..., None]
    return Int8(jnp.round(steps).astype(jnp.int8), scale)
