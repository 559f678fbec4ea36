"""Images that keep their own size and shape, as patches in a fixed number of slots
(Qwen2-VL, arXiv:2409.12191, with the rounding of its processor)."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from PIL import Image

from lmm_jax.data.sources import BadRecord

WH = tuple[int, int]
LONGEST = 200  # times the short side, at most


@dataclasses.dataclass(frozen=True)
class NativeSpec:
    """Sizes of patches and limits of area.

    Attributes:
        patch: pixels a side.
        merge: patches a side that become one token; they follow each other.
        min_pixels, max_pixels: area to which smaller and larger images are scaled.
    """

    patch: int
    merge: int
    min_pixels: int
    max_pixels: int

    @property
    def slots(self) -> int:
        """P, patches that an image may have."""
        return self.max_pixels // self.patch**2

    def size(self, wh: WH) -> WH:
        """Width and height in pixels to which an image is resized.

        Raises:
            BadRecord: "too long", a strip that no whole patches cover well.
        """
        width, height = wh
        if max(wh) > LONGEST * min(wh):
            raise BadRecord(
                "too long",
                f"an image of {width} x {height} pixels; one side may be {LONGEST} times "
                "the other at most",
            )
        unit, area = self.patch * self.merge, width * height
        sides = [round(side / unit) * unit for side in wh]
        if math.prod(sides) > self.max_pixels:
            shrink = math.sqrt(area / self.max_pixels)
            sides = [max(unit, math.floor(s / shrink / unit) * unit) for s in wh]
        elif math.prod(sides) < self.min_pixels:
            grow = math.sqrt(self.min_pixels / area)
            sides = [math.ceil(s * grow / unit) * unit for s in wh]
        return sides[0], sides[1]

    def tokens(self, wh: WH) -> WH:
        """Columns and rows of an image's visual tokens."""
        width, height = self.size(wh)
        unit = self.patch * self.merge
        return width // unit, height // unit


def patches(
    image: Image.Image, spec: NativeSpec, resample: Image.Resampling
) -> tuple[np.ndarray, WH]:
    """The patches of an RGB image.

    Returns:
        uint8 [P, 1, patch, patch, 3], blocks of `merge` x `merge` in raster order, then
        zeros; and the columns and rows of patches.

    Raises:
        BadRecord: "too long" or "too large".
    """
    size, p, m = spec.size(image.size), spec.patch, spec.merge
    columns, rows = size[0] // p, size[1] // p
    if columns * rows > spec.slots:
        raise BadRecord(
            "too large",
            f"an image of {image.size} pixels needs {columns * rows} patches of "
            f"{spec.slots}; raise image.max_pixels",
        )
    pixels = np.asarray(image if image.size == size else image.resize(size, resample))
    blocks = pixels.reshape(rows // m, m, p, columns // m, m, p, 3)
    cut = blocks.transpose(0, 3, 1, 4, 2, 5, 6).reshape(-1, 1, p, p, 3)
    out = np.zeros((spec.slots, 1, p, p, 3), np.uint8)
    out[: len(cut)] = cut
    return out, (columns, rows)
