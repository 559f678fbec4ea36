"""Rotary position embedding, rotate-half form (Su et al., arXiv:2104.09864).

Letters: B batch, T tokens, N heads, H head width, R rotated dimensions, A axes.
"""

from __future__ import annotations

import dataclasses

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from lmm_jax.depth import Place

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Positions divided by `factor` (position interpolation, arXiv:2306.15595)."""

    factor: float

    def __call__(self, frequency: np.ndarray) -> np.ndarray:
        return frequency / self.factor


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1: waves longer than the original context are stretched, short ones kept.

    Attributes:
        factor: of the stretch.
        low, high: the original context holds fewer than `low` periods of what is
            stretched, more than `high` of what is kept; between them it is a blend.
        context: tokens the model was first trained on.
    """

    factor: float
    low: float
    high: float
    context: int

    def __call__(self, frequency: np.ndarray) -> np.ndarray:
        periods = self.context * frequency / (2 * np.pi)
        kept = np.clip((periods - self.low) / (self.high - self.low), 0, 1)
        return frequency * (kept + (1 - kept) / self.factor)


@dataclasses.dataclass(frozen=True)
class Axial:
    """Coordinates (row, column): a whole series of frequencies for each (Qwen2-VL's vision
    tower, arXiv:2409.12191)."""

    count = 2

    def of(self, frequencies: int) -> np.ndarray:
        """The axis that each frequency reads, int [R/2]."""
        return np.repeat(np.arange(self.count), frequencies // self.count)


@dataclasses.dataclass(frozen=True)
class Interleaved:
    """Coordinates (time, row, column), which take turns along one series of frequencies;
    the slowest ones are left to time (Qwen3-VL, arXiv:2511.21631).

    Attributes:
        rows, columns: frequencies that each of the two reads.
    """

    rows: int
    columns: int
    count = 3

    def of(self, frequencies: int) -> np.ndarray:
        """The axis that each frequency reads, int [R/2]."""
        i = np.arange(frequencies)
        axis = np.zeros(frequencies, np.int64)
        axis[(i % 3 == 1) & (i < 3 * self.rows)] = 1
        axis[(i % 3 == 2) & (i < 3 * self.columns)] = 2
        return axis


@dataclasses.dataclass(frozen=True)
class RopeSpec:
    """Rotary settings.

    Attributes:
        base: of the geometric series of wavelengths.
        fraction: leading share of the head width that is rotated.
        scaling: of the frequencies, for contexts longer than the original one.
        axes: tokens have several coordinates, `Place.coords`; None where their position
            is the only one.
    """

    base: float = 10_000.0
    fraction: float = 1.0
    scaling: LinearScaling | Llama3Scaling | None = None
    axes: Axial | Interleaved | None = None

    def width(self, head_dim: int) -> int:
        """Rotated dimensions of a head."""
        return int(head_dim * self.fraction)

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Radians per position, [R/2]."""
        width = self.width(head_dim)
        series = width // self.axes.count if isinstance(self.axes, Axial) else width
        found = self.base ** (-np.arange(0, series, 2, dtype=np.float64) / series)
        found = np.tile(found, width // series)
        return found if self.scaling is None else self.scaling(found)


@struct.dataclass
class Rotation:
    """cos and sin, f32 [B, T, 1, R/2], of the R rotated dimensions; computed once for all
    layers of a run."""

    cos: Array
    sin: Array


def rotation(place: Place, spec: RopeSpec, head_dim: int) -> Rotation:
    """Angles in float32: bfloat16 cannot tell position 256 from 257."""
    frequencies = jnp.asarray(spec.frequencies(head_dim), jnp.float32)
    at = place.positions[..., None]
    if spec.axes is not None:
        at = place.coords[..., spec.axes.of(len(frequencies))]
    angle = at[..., None, :].astype(jnp.float32) * frequencies
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
