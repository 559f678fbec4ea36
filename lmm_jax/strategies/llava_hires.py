"""All hi-res tokens in the context, after those of the whole image.

The expensive reference for DeepStack (arXiv:2406.04334, Table 7, "Global + Hi-Res
String"): the same views, encoder and projector, but every token occupies a position.
Without the whole image it is the table's "Hi-Res String".

Letters: B batch, I images, G hi-res views, P patches of a view, D width.
"""

from __future__ import annotations

import dataclasses

import einops
import jax
import jax.numpy as jnp

from lmm_jax.depth import Connect, Geometry, Project, VisionFeatures
from lmm_jax.ops.spatial import dilated_groups

Array = jax.Array


def edits(geometry: Geometry, *, whole: bool = True) -> tuple[Connect, ...]:
    """Returns a connector with (1 + crops) * P tokens per image.

    Args:
        geometry: static sizes; its `crops` is the budget of hi-res views.
        whole: whether the tokens of the whole image come first; crops * P tokens if not.

    Raises:
        ValueError: there are no hi-res views.
    """
    if geometry.crops < 1:
        raise ValueError(
            f"llava_hires needs hi-res views, but image.crops={geometry.crops}: set "
            "image.crops to the budget of views."
        )
    op = WholeThenViews(geometry.grid[1], whole)
    to = (geometry.crops + whole) * geometry.patches
    return (Connect("llava_hires", to, op),)


@dataclasses.dataclass(frozen=True)
class WholeThenViews:
    """Tokens of the whole image, then those of the hi-res views, group by group.

    The groups are DeepStack's, so both methods see the same tokens in the same order;
    here they are strung along the sequence. Groups that an image lacks are zero tokens.
    """

    side: int
    whole: bool = True

    def __call__(self, vision: VisionFeatures, project: Project) -> Array:
        """[B, I, (1 + G) * P, D], or [B, I, G * P, D] without the whole image."""
        views = project(vision.hidden)
        whole, crops = views[:, :, 0], views[:, :, 1:]
        groups = dilated_groups(crops, vision.grid, self.side)
        strung = einops.rearrange(
            groups, "g b (i p) d -> b i (g p) d", p=whole.shape[2]
        )
        return jnp.concatenate([whole, strung], axis=2) if self.whole else strung
