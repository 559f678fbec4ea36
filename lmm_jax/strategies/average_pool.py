"""Average pooling: the plainest connector, one token per window of patches.

A baseline that every comparison needs; used by Matryoshka Multimodal Models
(arXiv:2405.17430) among others. Features are pooled before the projector, which is
shared with the baseline and works on fewer tokens.

Letters: B batch, I images, P patches, E vision width, D language width.
"""

from __future__ import annotations

import dataclasses

import jax

from lmm_jax.depth import Connect, Geometry, Project, VisionFeatures
from lmm_jax.ops.spatial import pool

Array = jax.Array


def edits(geometry: Geometry, *, factor: int = 2) -> tuple[Connect, ...]:
    """Returns a connector with P / factor**2 tokens per image.

    Raises:
        ValueError: windows do not tile the map.
    """
    rows, columns = geometry.grid
    if factor < 1 or rows % factor or columns % factor:
        raise ValueError(
            f"average_pool.factor={factor} does not divide the {rows} x {columns} map; "
            f"use a divisor of {rows}."
        )
    op = PooledView(geometry.grid, factor)
    return (Connect("average_pool", rows * columns // factor**2, op),)


def lossless(geometry: Geometry, tokens: int) -> dict[str, int]:
    """Arguments at which pooling must do nothing."""
    return dict(factor=1)


@dataclasses.dataclass(frozen=True)
class PooledView:
    """Means over square windows of the view of the whole image."""

    grid: tuple[int, int]
    factor: int

    def __call__(self, vision: VisionFeatures, project: Project) -> Array:
        """[B, I, P / factor**2, D]."""
        return project(pool(vision.hidden[:, :, 0], self.grid, self.factor))
