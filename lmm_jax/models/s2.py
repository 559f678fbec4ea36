"""S2: one tower reads an image at several scales, and their features join in width.

Shi et al., "When Do We Not Need Larger Vision Models?", ECCV 2024, arXiv:2403.13043; as in
Bunny's code. A view is resized to each scale and cut into tiles of the tower's size; the
tiles' feature maps are put together again and pooled to the map of the first scale.

Letters: N views, H W pixels, T tiles of all scales, P patches of a tile, E vision width,
S scales.
"""

from __future__ import annotations

import einops
import jax
import jax.numpy as jnp

from lmm_jax.models.specs import VisionSpec
from lmm_jax.ops.resize import cubic
from lmm_jax.ops.spatial import pool

Array = jax.Array


def tiles(images: Array, spec: VisionSpec) -> Array:
    """[N, H, W, 3], normalised, to the tiles of all scales [N * T, image, image, 3]."""
    found = [
        einops.rearrange(
            _resized(images, side),
            "n (r h) (c w) rgb -> n (r c) h w rgb",
            h=spec.image,
            w=spec.image,
        )
        for side in spec.scales
    ]
    return einops.rearrange(jnp.concatenate(found, axis=1), "n t ... -> (n t) ...")


def joined(features: Array, spec: VisionSpec) -> Array:
    """Features of the tiles [N * T, P, E] to those of the views [N, P, S * E]."""
    (rows, columns), found, start = spec.grid, [], 0
    every = einops.rearrange(features, "(n t) p e -> n t p e", t=spec.passes)
    for side in spec.scales:
        factor = side // spec.image
        maps = every[:, start : start + factor**2]
        mosaic = einops.rearrange(
            maps, "n (r c) (h w) e -> n (r h c w) e", r=factor, h=rows
        )
        found.append(pool(mosaic, (factor * rows, factor * columns), factor))
        start += factor**2
    return jnp.concatenate(found, axis=-1)


def _resized(images: Array, side: int) -> Array:
    """Bicubic as in `torch`, of numbers and not of grey levels."""
    if images.shape[1:3] == (side, side):
        return images
    down, across = (cubic(size, side) for size in images.shape[1:3])
    exact = jax.lax.Precision.HIGHEST
    return jnp.einsum("yr,xc,nrcz->nyxz", down, across, images, precision=exact)
