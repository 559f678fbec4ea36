"""Rotary position embedding, rotate-half form (Su et al., arXiv:2104.09864).

Letters: B batch, T tokens, N heads, H head width.
"""

from __future__ import annotations

import dataclasses

from flax import struct
import jax
import jax.numpy as jnp

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class RopeSpec:
    """Rotary settings.

    Attributes:
        base: of the geometric series of wavelengths.
        fraction: leading share of the head width that is rotated.
    """

    base: float = 10_000.0
    fraction: float = 1.0

    def width(self, head_dim: int) -> int:
        """Rotated dimensions of a head."""
        return int(head_dim * self.fraction)


@struct.dataclass
class Rotation:
    """cos and sin, f32 [B, T, 1, R/2], of the R rotated dimensions; computed once for all
    layers of a run."""

    cos: Array
    sin: Array


def rotation(positions: Array, spec: RopeSpec, head_dim: int) -> Rotation:
    """Angles in float32: bfloat16 cannot tell position 256 from 257."""
    width = spec.width(head_dim)
    wavelength = spec.base ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angle = positions[..., None, None].astype(jnp.float32) * wavelength
    return Rotation(jnp.cos(angle), jnp.sin(angle))


def rotate(x: Array, rotation: Rotation) -> Array:
    """Rotates [B, T, N, H]; dimensions beyond the rotated width pass through."""
    width = 2 * rotation.cos.shape[-1]
    a, b = jnp.split(x[..., :width].astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate(
        [
            a * rotation.cos - b * rotation.sin,
            b * rotation.cos + a * rotation.sin,
        ],
        axis=-1,
    ).astype(x.dtype)
    if width == x.shape[-1]:
        return turned
    return jnp.concatenate([turned, x[..., width:]], axis=-1)
