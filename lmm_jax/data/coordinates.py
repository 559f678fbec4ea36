"""Rotary coordinates (time, row, column) of text and images in one sequence (Qwen2-VL,
arXiv:2409.12191, section on M-RoPE).

Text moves along all three together. The tokens of an image share their time and count
rows and columns from there; text goes on behind the longer side.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def coordinates(
    length: int, marks: np.ndarray, grids: Sequence[tuple[int, int]], slots: int
) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates of N text tokens and of K images with V slots each.

    Args:
        length: N.
        marks: int [K], for each image the number of text tokens before it.
        grids: columns and rows of each image's visual tokens.
        slots: V.

    Returns:
        int32 [N, 3], and int32 [K, V, 3] with zeros in empty slots.
    """
    sides = [max(grid) for grid in grids]
    ahead = np.concatenate([[0], np.cumsum(sides)]).astype(np.int32)
    order = np.arange(length, dtype=np.int32)
    text = order + ahead[np.searchsorted(marks, order, side="right")]
    visual = np.zeros((len(grids), slots, 3), np.int32)
    for i, (columns, rows) in enumerate(grids):
        row, column = np.divmod(np.arange(columns * rows, dtype=np.int32), columns)
        start = marks[i] + ahead[i]
        visual[i, : columns * rows] = start + np.stack([0 * row, row, column], axis=-1)
    return np.repeat(text[:, None], 3, axis=1), visual
