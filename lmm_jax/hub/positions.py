"""Learned positions of a vision tower that runs at another image size than its own."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, Sequence
import dataclasses

import numpy as np

from lmm_jax.checkpoint.params import Tensor
from lmm_jax.models.specs import VisionSpec
from lmm_jax.nn.params import Param
from lmm_jax.ops.resize import cubic


@dataclasses.dataclass(frozen=True)
class Interpolated:
    """A table [1 + P, E] or [P, E] for another number of patches.

    Bicubic, in float32, as `interpolate_pos_encoding` of `transformers`; the row of [CLS]
    stays.

    Attributes:
        table: as it is stored.
        old, new: patches along a side.
    """

    table: Tensor
    old: int
    new: int

    @property
    def shape(self) -> tuple[int, ...]:
        rows, width = self.table.shape
        return rows - self.old**2 + self.new**2, width

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        rows, columns = index
        table = self.table[slice(None), columns]
        cls, grid = np.split(table, [len(table) - self.old**2])
        grid = grid.astype(np.float32).reshape(self.old, self.old, -1)
        weights = cubic(self.old, self.new)
        grid = np.einsum("yr,xc,rce->yxe", weights, weights, grid, optimize=True)
        flat = grid.reshape(self.new**2, -1).astype(table.dtype)
        return np.concatenate([cls, flat])[rows]


def at_size(
    tensors: Mapping[str, Tensor],
    rows: Sequence[Param],
    stored: VisionSpec,
    wanted: VisionSpec,
) -> Mapping[str, Tensor]:
    """The tensors of a tower `stored`, its positions made for the image size `wanted`."""
    if stored.grid == wanted.grid:
        return tensors
    keys = [row.key for row in rows if row.axes == "position embed"]
    (old, _), (new, _) = stored.grid, wanted.grid
    # Any other length is a mistake, which reading the table as it is will show.
    whole = stored.patches + stored.class_token
    tables = {
        key: Interpolated(tensors[key], old, new)
        for key in keys
        if key in tensors and tensors[key].shape[0] == whole
    }
    return ChainMap(tables, tensors)
