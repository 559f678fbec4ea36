"""Weights of interpolation against `torch`."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import numpy as np
import torch

from lmm_jax.ops.resize import between_corners, cubic


@given(st.tuples(*[st.integers(1, 40)] * 4))
def test_cubic_equals_torch(sizes):
    rows, columns, new_rows, new_columns = sizes
    image = np.random.default_rng(0).normal(size=(rows, columns)).astype(np.float32)
    ours = cubic(rows, new_rows) @ image @ cubic(columns, new_columns).T
    theirs = torch.nn.functional.interpolate(
        torch.tensor(image)[None, None], (new_rows, new_columns), mode="bicubic"
    )
    np.testing.assert_allclose(ours, theirs[0, 0], rtol=0, atol=2e-5)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.tuples(*[st.integers(1, 12)] * 3))
def test_corner_on_corner_equals_torch(sizes):
    side, rows, columns = sizes
    table = np.random.default_rng(0).normal(size=(side, side, 3)).astype(np.float32)
    places = np.stack(np.indices((rows, columns)), -1).reshape(1, -1, 2)
    ours = jax.jit(between_corners)(table, places, np.array([[columns, rows]]))
    theirs = torch.nn.functional.interpolate(
        torch.tensor(table.transpose(2, 0, 1))[None],
        (rows, columns),
        mode="bilinear",
        align_corners=True,
    )
    ours = np.asarray(ours).reshape(rows, columns, 3).transpose(2, 0, 1)
    np.testing.assert_allclose(ours, theirs[0], rtol=0, atol=1e-5)
