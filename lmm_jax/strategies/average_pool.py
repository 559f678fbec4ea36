"""Average pooling: the plainest connector, one token per window of patches.

A baseline that every comparison needs; used by Matryoshka Multimodal Models
(arXiv:2405.17430) among others. Features are pooled before the projector, which is
shared with the baseline and works on fewer tokens.

Letters: B batch, I images, C views, P patches of a view, E vision width, D language width.
"""

from __future__ import annotations

import dataclasses

import einops
import jax

from lmm_jax.depth import Connect, Geometry, Project, VisionFeatures
from lmm_jax.ops.spatial import pool

Array = jax.Array


def edits(
    geometry: Geometry, *, factor: int = 2, crops: bool = False
) -> tuple[Connect, ...]:
    """Returns a connector with P / factor**2 tokens per view.

    Args:
        geometry: static sizes.
        factor: patches along a side of a window.
        crops: whether hi-res crops follow the whole image, each pooled on its own.

    Raises:
        ValueError: windows do not tile the map.
    """
    rows, columns = geometry.grid
    if factor < 1 or rows % factor or columns % factor:
        raise ValueError(
            f"average_pool.factor={factor} does not divide the {rows} x {columns} map; "
            f"use a divisor of {rows}."
        )
    views = 1 + geometry.crops if crops else 1
    op = PooledViews(geometry.grid, factor, views)
    return (Connect("average_pool", views * rows * columns // factor**2, op),)


def lossless(geometry: Geometry, tokens: int) -> dict[str, int]:
    """Arguments at which pooling must do nothing."""
    return dict(factor=1)


@dataclasses.dataclass(frozen=True)
class PooledViews:
    """Means over square windows of the first `views`, one after the other."""

    grid: tuple[int, int]
    factor: int
    views: int = 1

    def __call__(self, vision: VisionFeatures, project: Project) -> Array:
        """[B, I, views * P / factor**2, D]."""
        pooled = pool(vision.hidden[:, :, : self.views], self.grid, self.factor)
        return project(einops.rearrange(pooled, "b i c p e -> b i (c p) e"))
