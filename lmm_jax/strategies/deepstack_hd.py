"""DeepStack-HD: tiles of the image in the context, and finer views of each tile stacked
into successive language layers.

Meng et al., arXiv:2406.04334 ("DeepStack-L-HD"), and the order of their published code
(`is_anyres_deepstack`). The context is that of LLaVA-NeXT for tiles that fill their grid.
Every view, the whole image included, comes again as n x n fine views; their mosaic is split
by dilated sampling into n * n groups, each with the token map of one view, and each group
of all views takes the same order and the same newlines as the context. So a newline is
added once more in each stacked layer, as the published weights were trained.

Letters: B batch, I images, C views, N fine views of a view, P patches of a view, E vision
width, V tokens an image may have, D width, G groups.
"""

from __future__ import annotations

import einops
from flax import linen as nn
import jax
import jax.numpy as jnp

from lmm_jax.depth import Edit, Geometry, Inject, Project, VisionFeatures
from lmm_jax.ops.spatial import fine_groups
from lmm_jax.strategies import anyres
from lmm_jax.strategies.anyres import Tiles
from lmm_jax.strategies.deepstack import places

Array = jax.Array


def edits(
    geometry: Geometry,
    *,
    start: int = 1,
    interval: int = 1,
    groups: int | None = None,
) -> tuple[Edit, ...]:
    """Returns the connector of `anyres` and the injections of DeepStack-HD.

    Args:
        geometry: static sizes; its `pinpoints` are the grids of tiles, its `fine` is n.
        start, interval, groups: see `deepstack.edits`; there are n * n groups.

    Raises:
        ValueError: no tiles, no fine views to stack, or an impossible place.
    """
    if not geometry.fine:
        raise ValueError(
            "deepstack_hd stacks fine views of tiles, but image.fine=0: set "
            "image.mode='stretch', image.pinpoints to the grids and image.fine to 2."
        )
    (connect,) = anyres.edits(geometry)
    depth, count = geometry.language.depth, geometry.fine**2
    layers = places("deepstack_hd", depth, count, start, interval, groups)
    if not layers:
        return (connect,)
    # One instance in both, so they have one newline.
    op = FineTiles(connect.op, geometry.grid, geometry.fine, len(layers))
    projects = len(layers) * (1 + geometry.crops) * geometry.patches
    return connect, Inject("deepstack_hd", layers, op, projects)


class FineTiles(nn.Module):
    """Groups of fine tokens, each in the order of the context.

    Attributes:
        tiles: op of the connector.
        grid: rows and columns of patches in a view.
        side: n, fine views along a side of a view.
        groups: G, how many are made.
    """

    tiles: Tiles
    grid: tuple[int, int]
    side: int
    groups: int

    def __call__(self, vision: VisionFeatures, project: Project) -> Array:
        """[G, B, I * V, D]."""
        maps = fine_groups(vision.fine, self.grid, self.side)[: self.groups]
        strung = [self.tiles(vision.replace(hidden=group), project) for group in maps]
        return einops.rearrange(jnp.stack(strung), "g b i v d -> g b (i v) d")
