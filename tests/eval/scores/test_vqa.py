"""VQA accuracy: agreement counts and the guard of the official script."""

from __future__ import annotations

import pytest

from lmm_jax.eval.scores import vqa


@pytest.mark.parametrize(
    ("agree", "expected"),
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (5, 1.0), (10, 1.0)],
)
def test_agreement_of_ten(agree, expected):
    references = ["cat"] * agree + [f"dog{i}" for i in range(10 - agree)]
    assert vqa.agreement("cat", references) == pytest.approx(expected)


def test_the_guard_compares_raw_if_all_humans_agree():
    assert vqa.official("yes", ["Yes"] * 10) == 0.0
    assert vqa.official("Yes\n", ["Yes"] * 10) == 1.0
    assert vqa.unguarded("yes.", ["Yes"] * 10) == 1.0
    assert vqa.evalai("yes.", ["Yes"] * 10) == 1.0


def test_the_guard_opens_when_one_human_differs():
    assert vqa.official("YES.", ["Yes"] * 9 + ["yes"]) == 1.0
    assert vqa.official("YES.", ["Yes"] * 9 + ["Yes "]) == 0.0


def test_variants_differ_in_the_genitive():
    references = ["st john 's"] * 9 + ["x"]
    assert vqa.evalai("St. John's", references) == 1.0
    assert vqa.unguarded("St. John's", references) == 0.0


def test_few_references_are_refused():
    with pytest.raises(ValueError, match=r"3 reference\(s\).*exact"):
        vqa.official("cat", ["cat"] * 3)
