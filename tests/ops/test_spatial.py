"""Token maps in the order of their cells."""

from __future__ import annotations

import numpy as np
import pytest

from lmm_jax.ops.spatial import cell_order


@pytest.mark.parametrize("side", [1, 2, 3])
def test_cells_follow_each_other_row_by_row(side):
    grid = 2 * side, 3 * side
    rows, columns = grid
    places = np.stack(np.divmod(np.arange(rows * columns), columns), axis=-1)
    found = np.asarray(cell_order(places, grid, side)).reshape(2, 3, side, side, 2)
    for index in np.ndindex(2, 3, side, side):
        row, column, inner_row, inner_column = index
        expected = row * side + inner_row, column * side + inner_column
        assert tuple(found[index]) == expected


def test_tokens_without_a_grid_are_in_this_order_already():
    tokens = np.arange(8.0).reshape(1, 4, 2)
    np.testing.assert_array_equal(cell_order(tokens, None), tokens)
