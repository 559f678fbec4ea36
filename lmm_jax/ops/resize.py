"""Resizing maps of numbers as `torch` does, which is not what Pillow and JAX do."""

from __future__ import annotations

import numpy as np

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
