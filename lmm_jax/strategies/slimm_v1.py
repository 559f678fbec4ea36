"""SliMM's DeepStack-v1: the patches of each visual token stacked into language layers.

From github.com/MengLcool/SliMM (December 2024). The context has one token per 2 x 2
patches; the four patches themselves, through a LayerNorm and an MLP that they share, are
added to it before successive language layers, one each. So the details that merging loses
come from the same features, and the encoder reads no other view.

Letters: B batch, I images, P patches, T tokens, N tokens of a cell, V visual tokens,
E vision width, D language width, G groups.
"""

from __future__ import annotations

import einops
from flax import linen as nn
import jax

from lmm_jax.depth import Edit, Geometry, Inject, Project, VisionFeatures
from lmm_jax.nn.merger import MERGER, Merger, MergerSpec
from lmm_jax.nn.params import Param
from lmm_jax.ops.spatial import cell_order
from lmm_jax.strategies.deepstack import every
from lmm_jax.strategies.slimm_m import context, merger, together, unordered

Array = jax.Array


def edits(geometry: Geometry, *, start: int = 1, interval: int = 1) -> tuple[Edit, ...]:
    """Returns the injection of DeepStack-v1, and the merger if the model has none.

    Args:
        geometry: static sizes.
        start: language layer before which the first patch of each token is added.
        interval: layers from one to the next; what would fall behind the last is left out.

    Raises:
        ValueError: an impossible place, or patches that 2 x 2 do not tile.
    """
    connect, cell = context(geometry), together(geometry)
    layers = every("slimm_v1", geometry.language.depth, start, interval)[:cell]
    if not layers:
        return connect
    spec = merger(geometry, 1)
    op = Cells(spec, unordered(geometry), cell, len(layers))
    stack = Inject("slimm_v1", layers, op, geometry.patches, spec.weights)
    return *connect, stack


class Cells(nn.Module):
    """Groups of tokens: row k has the k-th of each cell.

    Attributes:
        spec: of the merger that makes the tokens.
        grid: rows and columns of patches; None where those of a cell follow each other.
        cell: N.
        groups: G, how many are made.
    """

    spec: MergerSpec
    grid: tuple[int, int] | None
    cell: int
    groups: int

    def setup(self):
        self.merger = Merger(self.spec)

    def __call__(self, vision: VisionFeatures, project: Project) -> Array:
        """[G, B, I * V, D]."""
        side, coarse = self.spec.side, None
        if self.grid is not None:
            coarse = self.grid[0] // side, self.grid[1] // side
        patches = cell_order(vision.hidden[:, :, 0], self.grid, side)
        tokens = cell_order(self.merger(patches), coarse)
        groups = einops.rearrange(tokens, "b i (v n) d -> n b (i v) d", n=self.cell)
        return groups[: self.groups]

    @staticmethod
    def params() -> tuple[Param, ...]:
        """Rows of the merger."""
        return tuple(row.under("merger/", "") for row in MERGER)
