"""SliMM's DeepStack-E: a quarter of the visual tokens, the others stacked upon them.

From github.com/MengLcool/SliMM (December 2024). The context has one token per 4 x 4
patches, and the four tokens that 2 x 2 of them make, as an ordinary connector would, are
added to it before successive language layers, one each.

We stack the four tokens that lie where the context's token lies. The published code takes
four that follow each other in raster order. It does not say how wide the MLP of the 16
patches is; ours has the language model's width.
"""

from __future__ import annotations

from lmm_jax.depth import Connect, Edit, Geometry, Inject
from lmm_jax.strategies.deepstack import every
from lmm_jax.strategies.slimm_m import Merged, merger, tiled
from lmm_jax.strategies.slimm_v1 import Cells


def edits(geometry: Geometry, *, start: int = 1, interval: int = 1) -> tuple[Edit, ...]:
    """Returns the connector and the injection of DeepStack-E.

    Args:
        geometry: static sizes.
        start: language layer before which the first tokens are added.
        interval: layers from one to the next; what would fall behind the last is left out.

    Raises:
        ValueError: an impossible place, patches that 4 x 4 do not tile, or images with
            maps of their own.
    """
    grid, patches = tiled("slimm_e", geometry, 4), geometry.patches
    whole = merger(geometry, 16, geometry.language.width, joint_norm=True)
    op = Merged(whole, grid)
    connect = Connect("slimm_e_context", patches // 16, op, weights=whole.weights)
    layers = every("slimm_e", geometry.language.depth, start, interval)[:4]
    if not layers:
        return (connect,)
    part = merger(geometry, 4)
    stack = Cells(part, grid, 4, len(layers))
    return connect, Inject("slimm_e", layers, stack, patches // 4, part.weights)
