"""FlashSloth: few visual tokens, and learned tokens that fetch what the question needs.

Every window of patches becomes one token, weighted by what its patches show (spatial
attention pooling). Behind every question stand learned tokens, which before one language
layer read the question and all patches as they were before pooling (embedded queries).

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

from lmm_jax.depth import (
    Connect,
    Edit,
    Geometry,
    Project,
    Query,
    VisionFeatures,
    before,
)
from lmm_jax.nn.linear import Linear
from lmm_jax.nn.params import Param
from lmm_jax.nn.query import EmbeddedQuery, QuerySpec
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
    heads: int = 0,
    bottleneck: int = 0,
    anchor: int = -1,
) -> tuple[Edit, ...]:
    """Returns the connector and the queries of FlashSloth, or one of the two.

    Every view is pooled on its own: the whole, then the crops.

    Args:
        geometry: static sizes.
        window: patches a side that become one token; fewer at the last edges of a map
            that it does not divide.
        pool: "attention" is the paper's, "average" the plain mean; "none" leaves the
            connector to others, for queries alone.
        queries: learned tokens after each question; 0 for none.
        layer: language layer before which they read question and image.
        heads: of their attentions; 0 for as many as the language model has.
        bottleneck: width of their queries and keys; 0 for half of the vision width.
        anchor: token whose embedding is added to all of them; -1 for none. Published
            weights have " ." of Phi-2, 764.

    Raises:
        ValueError: an impossible window or place, an unknown way to pool, or widths that
            do not divide over the heads.
    """
    connect = _connect(geometry, window, pool)
    if not queries:
        return connect
    spec = _spec(geometry, queries, heads, bottleneck, anchor)
    read = Query("flashsloth_query", before(layer), queries, EmbeddedQuery(spec))
    return *connect, read


def _connect(geometry: Geometry, window: int, pool: Pool) -> tuple[Connect, ...]:
    ways = ("attention", "average", "none")
    if window < 1 or pool not in ways:
        raise ValueError(
            f"flashsloth.window={window}, pool={pool!r}: use a window of 1 or more, and "
            f"one of {', '.join(ways)}."
        )
    if pool == "none":
        return ()
    if pool == "average":
        return average_pool.edits(geometry, factor=window, crops=True)
    rows, columns = (-(-side // window) for side in geometry.grid)
    to = (1 + geometry.crops) * rows * columns
    op = AttentionPool(geometry.grid, window, geometry.param_dtype)
    scorer = geometry.vision.width * (geometry.vision.width + 1)
    weights = geometry.connector + window**2 * scorer
    return (Connect("flashsloth_pool", to, op, weights=weights),)


def _spec(
    geometry: Geometry, count: int, heads: int, bottleneck: int, anchor: int
) -> QuerySpec:
    heads = heads or geometry.language.heads
    bottleneck = bottleneck or geometry.vision.width // 2
    for name, width in (("bottleneck", bottleneck), ("width", geometry.vision.width)):
        if width % heads:
            raise ValueError(
                f"flashsloth.heads={heads} do not divide the {name} {width} of the "
                "queries' attention: set flashsloth.heads to a number that does."
            )
    return QuerySpec(
        count=count,
        # A turn has a header for each speaker and an end mark, whatever is said.
        most=max(1, (geometry.prefix + geometry.suffix) // (count + 3)),
        width=geometry.language.width,
        vision=geometry.vision.width,
        patches=geometry.images * (1 + geometry.crops) * geometry.patches,
        bottleneck=bottleneck,
        heads=heads,
        anchor=anchor,
        dtype=geometry.dtype,
        param_dtype=geometry.param_dtype,
    )


class AttentionPool(nn.Module):
    """Spatial attention pooling: the mean of each window, weighted by a softmax of scores.

    What is averaged are the features themselves; only the scores are learned. The authors'
    dropout of 0.1 inside the scorer is left out: connectors draw nothing.

    Attributes:
        grid: rows and columns of patches in a view.
        window: patches a side of a window.
        param_dtype: of parameters.
    """

    grid: tuple[int, int]
    window: int
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, vision: VisionFeatures, project: Project) -> Array:
        """[B, I, C * V, D], view after view, row after row."""
        x = vision.hidden
        width, dtype = x.shape[-1], x.dtype
        kinds = (True, dtype.name, self.param_dtype)
        hidden = nn.relu(Linear((width,), (width,), *kinds, name="first")(x))
        scores = Linear((width,), (1,), *kinds, name="second")(hidden)
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
