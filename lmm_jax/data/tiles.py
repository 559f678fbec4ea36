"""Tiled images: tiles that keep the aspect, and the order of their patches.

LLaVA-NeXT, with the rounding of `transformers`. All grids are (columns, rows).
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

WH = tuple[int, int]


def on_grid(
    image: Image.Image, grid: WH, size: int, resample: Image.Resampling
) -> Image.Image:
    """`image` as large as the grid allows, in the middle of black."""
    width, height = image.size
    columns, rows = size * grid[0], size * grid[1]
    across, down = columns / width, rows / height
    if across < down:
        fitted = columns, min(math.ceil(height * across), rows)
    else:
        fitted = min(math.ceil(width * down), columns), rows
    canvas = Image.new("RGB", (columns, rows))
    corner = (columns - fitted[0]) // 2, (rows - fitted[1]) // 2
    canvas.paste(image.resize(fitted, resample), corner)
    return canvas


def rows(grid: WH, side: int, views: int, border: WH = (0, 0)) -> np.ndarray:
    """The tokens of an image: the whole view, then the rows of the tiles' mosaic.

    Args:
        grid: its tiles.
        side: patches along a side of a view.
        views: C, the whole and the most tiles there can be.
        border: columns and rows of patches that are left out at either end; see `borders`.

    Returns:
        int32 [tokens]: patch p of view c as c * P + p with P = side**2, and C * P for the
        newline after each row.
    """
    (columns, lines), patches = grid, side**2
    x, y = np.arange(columns * side), np.arange(lines * side)[:, None]
    tile = 1 + y // side * columns + x // side
    mosaic = tile * patches + y % side * side + x % side
    left, top = border
    mosaic = mosaic[top : len(y) - top, left : len(x) - left]
    newline = np.full((len(mosaic), 1), views * patches)
    lines_ = np.concatenate([mosaic, newline], axis=1)
    return np.concatenate([np.arange(patches), lines_.reshape(-1)]).astype(np.int32)


def borders(wh: WH, mosaic: WH) -> WH:
    """Patches that hold nothing but border, at the left and at the top of a mosaic of
    patches, and as many at the other ends; `wh` is the image in pixels."""
    (width, height), (columns, lines) = wh, mosaic
    if width / height > columns / lines:
        # Rounded before it is cut off, as the reference does against 23.999999.
        return 0, (lines - int(round(height * (columns / width), 7))) // 2
    return (columns - int(round(width * (lines / height), 7))) // 2, 0
