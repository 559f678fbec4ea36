"""SliMM's DeepStack-M: inner layers of the vision transformer stacked into language layers.

The follow-up of DeepStack by its first author (github.com/MengLcool/SliMM, December 2024)
and the ancestor of Qwen3-VL's. Four inner vision layers are merged 2 x 2 by a merger each
and added to the residual stream at the visual positions before successive language layers.
The context has the merged tokens of the last layer. Where the model's connector does not
merge patches, a merger of the strategy takes its place.

Letters: B batch, I images, P patches, V visual tokens, E vision width, D language width.
"""

from __future__ import annotations

from flax import linen as nn
import jax

from lmm_jax.depth import Connect, Edit, Geometry, Inject, Project, VisionFeatures
from lmm_jax.nn.merger import MERGER, Merger, MergerSpec, TappedLayers
from lmm_jax.nn.params import Param
from lmm_jax.ops.spatial import cell_order
from lmm_jax.strategies.deepstack import every

Array = jax.Array


def edits(
    geometry: Geometry,
    *,
    start: int = 1,
    interval: int = 1,
    taps: tuple[int, ...] = (7, 15, 23, 29),
) -> tuple[Edit, ...]:
    """Returns the injection of DeepStack-M, and the merger if the model has none.

    Args:
        geometry: static sizes.
        start: language layer before which the first of them is added.
        interval: layers from one to the next; what would fall behind the last is left out.
        taps: vision layers after which features are read; the published ones are those
            before blocks 8, 16, 24 and 30 of 32.

    Raises:
        ValueError: an impossible place, or patches that 2 x 2 do not tile.
    """
    connect, taps = context(geometry), tuple(taps)
    layers = every("slimm_m", geometry.language.depth, start, interval)[: len(taps)]
    if not layers:
        return connect
    spec = merger(geometry, together(geometry))
    op = TappedLayers(spec, taps, len(layers), unordered(geometry))
    projects = len(layers) * geometry.patches // spec.patches
    return *connect, Inject("slimm_m", layers, op, projects, spec.weights, taps)


def context(geometry: Geometry) -> tuple[Connect, ...]:
    """The merger of 2 x 2 patches, unless the model's connector merges them.

    Raises:
        ValueError: they do not tile the map.
    """
    if geometry.merge > 1:
        return ()
    spec = merger(geometry, together(geometry))
    op = Merged(spec, tiled("slimm", geometry, spec.side))
    tokens = geometry.patches // spec.patches
    return (Connect("slimm_merger", tokens, op, weights=spec.weights),)


def together(geometry: Geometry) -> int:
    """Patches of one token in the context."""
    return geometry.merge**2 if geometry.merge > 1 else 4


def unordered(geometry: Geometry) -> tuple[int, int] | None:
    """The map of patches, unless those of a token follow each other already."""
    return None if geometry.merge > 1 else geometry.grid


def tiled(name: str, geometry: Geometry, side: int) -> tuple[int, int]:
    """Rows and columns of the map.

    Raises:
        ValueError: cells of `side` do not tile it, or images have maps of their own.
    """
    rows, columns = geometry.grid
    if rows % side or columns % side:
        raise ValueError(
            f"{name} merges {side} x {side} patches, which do not tile the {rows} x "
            f"{columns} map: set model.image_size to a multiple of {side} patches."
        )
    return rows, columns


def merger(
    geometry: Geometry, patches: int, hidden: int = 0, *, joint_norm: bool = False
) -> MergerSpec:
    """Sizes of a merger of this model; its hidden width is the joint one if not given."""
    return MergerSpec(
        patches=patches,
        width=geometry.vision.width,
        hidden=hidden or patches * geometry.vision.width,
        outputs=geometry.language.width,
        joint_norm=joint_norm,
        dtype=geometry.dtype,
        param_dtype=geometry.param_dtype,
    )


class Merged(nn.Module):
    """Cells of the whole image's patches, each merged into one token.

    Attributes:
        spec: of the merger.
        grid: rows and columns of patches.
    """

    spec: MergerSpec
    grid: tuple[int, int]

    def setup(self):
        self.merger = Merger(self.spec)

    def __call__(self, vision: VisionFeatures, project: Project) -> Array:
        """[B, I, V, D]."""
        return self.merger(
            cell_order(vision.hidden[:, :, 0], self.grid, self.spec.side)
        )

    @staticmethod
    def params() -> tuple[Param, ...]:
        """Rows of the merger."""
        return tuple(row.under("merger/", "") for row in MERGER)
