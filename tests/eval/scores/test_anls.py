"""ANLS around its threshold, and lengths from before the clean-up."""

from __future__ import annotations

import pytest

from lmm_jax.eval.scores import anls


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("Hello World", ["hello world"], 1.0),
        ("abcd", ["abxy"], 0.5),  # exactly one half is kept
        ("a" * 49 + "b" * 51, ["a" * 100], 0.0),  # 0.49
        ("a" * 51 + "b" * 49, ["a" * 100], 0.51),
        ("", [""], 1.0),
        ("", ["yes"], 0.0),
        ("yes", ["", "no"], 0.0),
        ("abcde", ["zzzzz", "abcdx", "abxxx"], 0.8),
        ("a  b", ["a x b"], 0.6),  # distance 2 of "a b", length 5
        ("a        b", ["a c"], 0.9),  # 1 / len(prediction) before the clean-up
    ],
)
def test_anls(prediction, references, expected):
    assert anls.score(prediction, references) == pytest.approx(expected)


def test_no_reference_is_refused():
    with pytest.raises(ValueError, match="no reference"):
        anls.score("yes", [])
