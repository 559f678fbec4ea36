"""Any resolution: tiles of the image in the context, row by row, after the whole image.

LLaVA-NeXT (January 2024; `spatial_unpad` of its code and of `transformers`). An image is
fitted into one of a few grids of tiles and keeps its aspect; the patches of its black
borders are dropped, and a learned newline closes each row of those that stay.

Letters: B batch, I images, C views, P patches of a view, V tokens an image may have,
D width.
"""

from __future__ import annotations

from flax import linen as nn
import jax
import jax.numpy as jnp

from lmm_jax.depth import Connect, Geometry, Project, VisionFeatures

Array = jax.Array


def edits(geometry: Geometry) -> tuple[Connect, ...]:
    """Returns a connector with as many tokens as the largest grid can give.

    Raises:
        ValueError: images have no tiles.
    """
    if not geometry.pinpoints:
        raise ValueError(
            "anyres strings the tiles of an image together, but there are none: set "
            "image.mode='anyres'."
        )
    op = Tiles(geometry.language.width)
    return (Connect("anyres", geometry.tiled_tokens, op, varies=True),)


class Tiles(nn.Module):
    """Projected patches and newlines in the order of `VisionFeatures.rows`."""

    width: int

    @nn.compact
    def __call__(self, vision: VisionFeatures, project: Project) -> Array:
        """[B, I, V, D]."""
        scale = nn.initializers.normal(self.width**-0.5)
        newline = self.param("newline", scale, (self.width,))
        views = project(vision.hidden)
        b, i, c, p, d = views.shape
        rows = vision.rows[..., None]
        patches = views.reshape(b, i, c * p, d)
        found = jnp.take_along_axis(patches, jnp.clip(rows, 0, c * p - 1), axis=2)
        return jnp.where(rows == c * p, newline.astype(found.dtype), found)
