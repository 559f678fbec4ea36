"""Resizing maps of numbers as `torch` does, which is not what Pillow and JAX do.

Letters: N images, P patches, S side of a table, E width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

_A = -0.75  # sharper than the -0.5 of Pillow and JAX


def cubic(old: int, new: int) -> np.ndarray:
    """Weights of bicubic interpolation along one axis, f32 [new, old].

    `torch.nn.functional.interpolate(mode="bicubic", align_corners=False)`: four taps also
    where it shrinks (no antialiasing), border values repeated.
    """
    # In float32, as there: 51 columns away, exact places differ in the fifth digit.
    at = (np.arange(new, dtype=np.float32) + 0.5) * np.float32(old / new) - 0.5
    left = np.floor(at)
    weights = np.zeros((new, old), np.float32)
    for tap in range(-1, 3):
        d = np.abs(at - left - tap)
        near = (_A + 2) * d**3 - (_A + 3) * d**2 + 1
        far = _A * (d**3 - 5 * d**2 + 8 * d - 4)
        index = np.clip(left + tap, 0, old - 1).astype(int)
        np.add.at(weights, (np.arange(new), index), np.where(d <= 1, near, far))
    return weights


def between_corners(table: Array, places: Array, grid: Array) -> Array:
    """The table read between its rows and columns, corner on corner: f32 [N, P, E].

    `torch.nn.functional.interpolate(mode="bilinear", align_corners=True)`, for images of
    different shape at once.

    Args:
        table: [S, S, E].
        places: int32 [N, P, 2], row and column of each patch.
        grid: int32 [N, 2], columns and rows of the image.
    """
    end = jnp.asarray(table.shape[:2]) - 1
    size = jnp.maximum(grid[:, None, ::-1] - 1, 1)
    at = jnp.minimum(places, size) * end / size  # empty slots stay inside the table
    flat = table.reshape(-1, table.shape[-1])
    low = jnp.floor(at).astype(jnp.int32)
    high, part = jnp.minimum(low + 1, end), at - low

    def corner(row: Array, column: Array, share: Array) -> Array:
        index = row[..., 0] * table.shape[1] + column[..., 1]
        return jnp.take(flat, index, axis=0, mode="clip") * share[..., None]

    down, right = part[..., 0], part[..., 1]
    return (
        corner(low, low, (1 - down) * (1 - right))
        + corner(low, high, (1 - down) * right)
        + corner(high, low, down * (1 - right))
        + corner(high, high, down * right)
    )
