"""Weights of interpolation against `torch`."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import torch

from lmm_jax.ops.resize import cubic


@given(st.tuples(*[st.integers(1, 40)] * 4))
def test_cubic_equals_torch(sizes):
    rows, columns, new_rows, new_columns = sizes
    image = np.random.default_rng(0).normal(size=(rows, columns)).astype(np.float32)
    ours = cubic(rows, new_rows) @ image @ cubic(columns, new_columns).T
    theirs = torch.nn.functional.interpolate(
        torch.tensor(image)[None, None], (new_rows, new_columns), mode="bicubic"
    )
    np.testing.assert_allclose(ours, theirs[0, 0], rtol=0, atol=2e-5)
