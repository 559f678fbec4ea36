"""Exact match."""

from __future__ import annotations

import pytest

from lmm_jax.eval.scores import exact


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("Yes.", ["yes"], 1.0),
        (" red \n", ["blue", "Red"], 1.0),
        ("cat...", ["cat"], 1.0),
        ("3.5", ["35"], 0.0),
        ("a cat", ["cat"], 0.0),
        ("", ["yes"], 0.0),
        (".", [""], 1.0),
    ],
)
def test_exact(prediction, references, expected):
    assert exact.score(prediction, references) == expected


def test_no_reference_is_refused():
    with pytest.raises(ValueError, match="no reference"):
        exact.score("yes", [])
