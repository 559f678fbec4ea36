"""Interpolated tables are read like stored ones. Values: test_vision."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from lmm_jax.hub.positions import Interpolated


@pytest.mark.parametrize("cls", [0, 1])
@given(st.data())
def test_a_part_is_that_part_of_the_whole(cls, data):
    table = np.random.default_rng(0).normal(size=(9 + cls, 6)).astype(np.float32)
    found = Interpolated(table, 3, 4)
    whole = found[:, :]
    assert whole.shape == found.shape == (16 + cls, 6)
    rows, columns = (
        slice(*sorted(data.draw(st.tuples(*[st.integers(0, size)] * 2))))
        for size in whole.shape
    )
    np.testing.assert_allclose(found[rows, columns], whole[rows, columns], atol=1e-6)
    np.testing.assert_array_equal(whole[:cls], table[:cls])
