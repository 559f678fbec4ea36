"""Relaxed accuracy: the tolerance, percents, zero and strings."""

from __future__ import annotations

import pytest

from lmm_jax.eval.scores import relaxed


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("105", "100", 1.0),  # 5 % exactly
        ("95", "100", 1.0),
        ("105.01", "100", 0.0),
        ("-105", "-100", 1.0),
        ("-100", "100", 0.0),
        ("5%", "0.05", 1.0),
        ("0.05", "5%", 1.0),
        ("5", "5%", 0.0),
        ("0", "0", 1.0),
        ("0.0", "0", 0.0),  # a zero reference asks for the same string
        ("0.0001", "0", 0.0),
        ("1,000", "1000", 0.0),
        ("1,000", "1,000", 1.0),
        ("Blue", "blue", 1.0),
        ("blue", "light blue", 0.0),
        ("12", "blue", 0.0),
        ("", "3", 0.0),
        ("%", "%", 1.0),
    ],
)
def test_relaxed(prediction, reference, expected):
    assert relaxed.score(prediction, [reference]) == expected


def test_any_reference_counts():
    assert relaxed.score("2", ["one", "2.01"]) == 1.0


def test_no_reference_is_refused():
    with pytest.raises(ValueError, match="no reference"):
        relaxed.score("yes", [])
