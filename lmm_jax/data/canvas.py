"""Images that keep their shape, on a canvas that all fit (ViLT, arXiv:2102.03334, with the
rounding of its processor)."""

from __future__ import annotations

import dataclasses

import numpy as np
from PIL import Image

from lmm_jax.data.sources import BadRecord

WH = tuple[int, int]
LONGEST = 1333 / 800  # of the long side, in short ones


@dataclasses.dataclass(frozen=True)
class CanvasSpec:
    """Sizes.

    Attributes:
        short: pixels of the short side, unless the long one would be beyond the canvas.
        patch: pixels a side of a patch; images are whole patches.
    """

    short: int
    patch: int

    @property
    def longest(self) -> int:
        """Pixels of the long side at most, before the cut to whole patches."""
        return int(LONGEST * self.short)

    @property
    def side(self) -> int:
        """Pixels a side of the canvas."""
        return self.longest // self.patch * self.patch

    def size(self, wh: WH) -> WH:
        """Width and height in pixels to which an image is resized.

        Raises:
            BadRecord: "too long", a strip narrower than a patch.
        """
        scale = self.short / min(wh)
        sides = [self.short if side == min(wh) else scale * side for side in wh]
        if max(sides) > self.longest:
            scale = self.longest / max(sides)
            sides = [scale * side for side in sides]
        width, height = (int(side + 0.5) // self.patch * self.patch for side in sides)
        if not width or not height:
            raise BadRecord(
                "too long",
                f"an image of {wh[0]} x {wh[1]} pixels becomes narrower than a patch of "
                f"{self.patch}",
            )
        return width, height


def on_canvas(
    image: Image.Image, spec: CanvasSpec, resample: Image.Resampling
) -> tuple[np.ndarray, WH]:
    """An RGB image in the upper left corner of its canvas.

    Returns:
        uint8 [side, side, 3], zeros beyond the image; and its columns and rows of patches.

    Raises:
        BadRecord: see `CanvasSpec.size`.
    """
    width, height = spec.size(image.size)
    out = np.zeros((spec.side, spec.side, 3), np.uint8)
    out[:height, :width] = np.asarray(image.resize((width, height), resample))
    return out, (width // spec.patch, height // spec.patch)
