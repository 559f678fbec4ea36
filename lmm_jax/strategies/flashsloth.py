"""FlashSloth: every window of patches becomes one token, weighted by what its patches show.

Zhang et al., "FlashSloth: Lightning Multimodal Large Language Models via Embedded Visual
Compression", arXiv:2412.04317, and the code of its authors.

Letters: B batch, I images, C views, P patches of a view, E vision width, V tokens of a
view, D language width.
"""

from __future__ import annotations

from typing import Literal

import einops
from flax import linen as nn
import jax
import jax.numpy as jnp

from lmm_jax.depth import Connect, Edit, Geometry, Project, VisionFeatures
from lmm_jax.nn.linear import Linear
from lmm_jax.nn.params import Param
from lmm_jax.ops.spatial import windows
from lmm_jax.strategies import average_pool

Array = jax.Array
Pool = Literal["attention", "average", "none"]


def edits(
    geometry: Geometry,
    *,
    window: int = 3,
    pool: Pool = "attention",
    queries: int = 9,
    layer: int = 7,
) -> tuple[Edit, ...]:
    """Returns the connector and the queries of FlashSloth.

    Every view is pooled on its own: the whole, then the crops.

    Args:
        geometry: static sizes.
        window: patches a side that become one token; fewer at the last edges of a map
            that it does not divide.
        pool: "attention" is the paper's, "average" the plain mean, "none" keeps all.
        queries: learned tokens after each question; 0 for none.
        layer: language layer before which they read question and image.

    Raises:
        ValueError: an impossible window, or an unknown way to pool.
    """
    return (_connect(geometry, window, pool), *_queries(geometry, queries, layer))


def _connect(geometry: Geometry, window: int, pool: Pool) -> Connect:
    ways = ("attention", "average", "none")
    if window < 1 or pool not in ways:
        raise ValueError(
            f"flashsloth.window={window}, pool={pool!r}: use a window of 1 or more, and "
            f"one of {', '.join(ways)}."
        )
    if pool != "attention":
        factor = window if pool == "average" else 1
        (connect,) = average_pool.edits(geometry, factor=factor, crops=True)
        return connect
    rows, columns = (-(-side // window) for side in geometry.grid)
    to = (1 + geometry.crops) * rows * columns
    return Connect("flashsloth_pool", to, AttentionPool(geometry.grid, window))


def _queries(geometry: Geometry, count: int, layer: int) -> tuple[Edit, ...]:
    return ()


class AttentionPool(nn.Module):
    """Spatial attention pooling: the mean of each window, weighted by a softmax of scores.

    What is averaged are the features themselves; only the scores are learned. The authors'
    dropout of 0.1 inside the scorer is left out: connectors draw nothing.

    Attributes:
        grid: rows and columns of patches in a view.
        window: patches a side of a window.
    """

    grid: tuple[int, int]
    window: int

    @nn.compact
    def __call__(self, vision: VisionFeatures, project: Project) -> Array:
        """[B, I, C * V, D], view after view, row after row."""
        x = vision.hidden
        width, dtype = x.shape[-1], x.dtype.name
        hidden = nn.relu(Linear((width,), (width,), True, dtype, name="first")(x))
        scores = Linear((width,), (1,), True, dtype, name="second")(hidden)
        scores, x = scores.astype(jnp.float32), x.astype(jnp.float32)
        inside = (-4, -2)  # rows and columns of a window
        scores = windows(scores, self.grid, self.window, fill=-jnp.inf)
        weights = jax.nn.softmax(scores, axis=inside)
        pooled = jnp.sum(weights * windows(x, self.grid, self.window), axis=inside)
        pooled = einops.rearrange(pooled, "b i c h w e -> b i (c h w) e")
        return project(pooled.astype(dtype))

    @staticmethod
    def params() -> tuple[Param, ...]:
        """Rows in the naming of the published checkpoints."""
        return (
            Param(
                "first/kernel", "vision_embed mlp", "mlp.0.weight", "mlp vision_embed"
            ),
            Param("first/bias", "norm", "mlp.0.bias", "norm"),
            Param("second/kernel", "mlp norm", "mlp.3.weight", "norm mlp"),
            Param("second/bias", "norm", "mlp.3.bias", "norm"),
        )
