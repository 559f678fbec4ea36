"""DeepStack-L: hi-res visual tokens stacked into successive language layers.

Meng et al., "DeepStack: Deeply Stacking Visual Tokens is Surprisingly Simple and
Effective for LMMs", NeurIPS 2024, arXiv:2406.04334, section 3 and Algorithm 1.

The hi-res views of an image pass the same encoder and projector as the view of the whole
image. Their token maps form one mosaic, split into groups by dilated sampling. Group k is
added to the residual stream at the visual positions before layer `start + k * interval`.
Sequence length, positions and caches stay those of the baseline, and there are no new
parameters.

Letters: B batch, I images, P patches of a view, D width, G groups.
"""

from __future__ import annotations

import dataclasses

import jax

from lmm_jax.depth import Geometry, Inject, Project, VisionFeatures
from lmm_jax.ops.spatial import Order, dilated_groups

Array = jax.Array


def edits(
    geometry: Geometry,
    *,
    start: int = 1,
    interval: int = 1,
    groups: int | None = None,
    order: Order = "2d",
) -> tuple[Inject, ...]:
    """Returns the injections of DeepStack-L.

    Args:
        geometry: static sizes; its `crops` is the budget of hi-res views.
        start: language layer before which the first group is added.
        interval: layers from one group to the next.
        groups: how many groups are stacked, from the first; None means one per hi-res
            view. Groups that would fall behind the last layer are left out.
        order: how the mosaic is split; "2d" is the paper's, "1d" and "grid" its ablation.

    Raises:
        ValueError: no hi-res views to stack, or an impossible place.
    """
    depth, crops = geometry.language.depth, geometry.crops
    layers = places("deepstack", depth, crops, start, interval, groups)
    if not layers:
        return ()
    op = StackedViews(geometry.grid[1], len(layers), order)
    return (Inject("deepstack", layers, op, projects=crops * geometry.patches),)


def lossless(geometry: Geometry, tokens: int) -> dict[str, int]:
    """Arguments at which stacking must do nothing."""
    return dict(groups=0)


def places(
    name: str, depth: int, crops: int, start: int, interval: int, groups: int | None
) -> tuple[int, ...]:
    """The layers, fewer than `depth`, that get a group each.

    Raises:
        ValueError: no hi-res views to stack, or an impossible place.
    """
    if crops < 1:
        raise ValueError(
            f"{name} stacks hi-res views, but image.crops={crops}: set image.crops to the "
            "budget of views (4 in the paper)."
        )
    groups = crops if groups is None else groups
    if not 0 <= groups <= crops:
        raise ValueError(
            f"{name}.groups={groups}, but there are {crops} hi-res views: use 0 to {crops}."
        )
    return every(name, depth, start, interval)[:groups]


def every(name: str, depth: int, start: int, interval: int) -> tuple[int, ...]:
    """Every `interval`-th layer, fewer than `depth`, from `start` on.

    Raises:
        ValueError: an impossible place.
    """
    if start < 0 or interval < 1:
        raise ValueError(
            f"{name}.start={start}, interval={interval}: use start >= 0 and interval >= 1."
        )
    return tuple(range(start, depth, interval))


@dataclasses.dataclass(frozen=True)
class StackedViews:
    """Groups of hi-res tokens, each aligned with the tokens of the whole image."""

    side: int
    groups: int
    order: Order

    def __call__(self, vision: VisionFeatures, project: Project) -> Array:
        """[G, B, I * P, D]; zero (after the projector) where an image has fewer groups."""
        crops = project(vision.hidden[:, :, 1:])
        stack = dilated_groups(crops, vision.grid, self.side, order=self.order)
        return stack[: self.groups]
