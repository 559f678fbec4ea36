"""DeepStack-V: hi-res patches stacked into successive layers of the vision transformer.

Meng et al., "DeepStack: Deeply Stacking Visual Tokens is Surprisingly Simple and
Effective for LMMs", NeurIPS 2024, arXiv:2406.04334, section 3 and Table 4.

All views pass the layers before `start`, each on its own. There the hi-res ones end, and
their patches, split into groups as in DeepStack-L, are added to the patches of the whole
image before layer `start + k * interval`. [CLS] receives nothing, the language model sees
the tokens of one view, and there are no new parameters; the encoder has to learn.

Features are read at the input of CLIP's last layer. With `start=20` of 24 the last group
is added there, and reaches the projector without another layer.
"""

from __future__ import annotations

from lmm_jax.depth import Geometry, Inject
from lmm_jax.ops.spatial import Order
from lmm_jax.strategies.deepstack import StackedViews, places


def edits(
    geometry: Geometry,
    *,
    start: int = 20,
    interval: int = 1,
    groups: int | None = None,
    order: Order = "2d",
) -> tuple[Inject, ...]:
    """Returns the injection of DeepStack-V.

    Args:
        geometry: static sizes; its `crops` is the budget of hi-res views.
        start: vision layer before which the first group is added; 20 is the paper's best
            for CLIP-L.
        interval: layers from one group to the next.
        groups: how many groups are stacked, from the first; None means all. Groups that
            would fall behind the features that are read are left out.
        order: see DeepStack-L.

    Raises:
        ValueError: no hi-res views to stack, or an impossible place.
    """
    side, crops = geometry.grid[1], geometry.crops
    depth = min(geometry.vision_layers + 1, geometry.vision.depth)
    layers = places("deepstack_v", depth, crops, start, interval, groups)
    if not layers:
        return ()
    op = StackedViews(side, len(layers), order)
    return (Inject("deepstack_v", layers, op, stack="vision"),)


def lossless(geometry: Geometry, tokens: int) -> dict[str, int]:
    """Arguments at which stacking must do nothing."""
    return dict(groups=0)
