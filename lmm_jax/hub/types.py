"""What says of which image a token is, for more images than a checkpoint has read."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, Sequence
import dataclasses

import numpy as np

from lmm_jax.checkpoint.params import Tensor
from lmm_jax.nn.params import Param


@dataclasses.dataclass(frozen=True)
class Continued:
    """A table [N, D] that goes on with copies of its last row, as ViLT's and METER's do
    when they begin to learn NLVR2.

    Attributes:
        table: as it is stored.
        count: rows of the longer one.
    """

    table: Tensor
    count: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.count, self.table.shape[1]

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        rows, columns = index
        table = self.table[slice(None), columns]
        return table[np.minimum(np.arange(self.count), len(table) - 1)][rows]


def of_images(
    tensors: Mapping[str, Tensor], rows: Sequence[Param], count: int
) -> Mapping[str, Tensor]:
    """The tensors of an encoder, its table of types with `count` rows or more."""
    keys = [row.key for row in rows if row.axes == "type embed" and row.key in tensors]
    short = [key for key in keys if tensors[key].shape[0] < count]
    return ChainMap({key: Continued(tensors[key], count) for key in short}, tensors)
