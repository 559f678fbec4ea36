"""Golden pairs of the EvalAI processor and the quirks of the VQAv2 script."""

from __future__ import annotations

import pytest

from lmm_jax.eval import answers

# Produced by running the reference processor.
EVALAI = {
    "Yes.": "yes",
    "The Red Bus!": "red bus",
    "two": "2",
    "1,000": "1000",
    "2,5,6": "256",
    "3.5": "3.5",
    "10:30 a.m.": "10:30 am",
    "it's": "it 's",
    "its": "its",
    "dont": "don't",
    "rock-n-roll": "rock n roll",
    "black, white": "black white",
    "a": "",
    "St. John's": "st john 's",
    "$5.00": "$5.00",
    "U.S.A.": "usa",
    "none": "0",
    "7-up": "7 up",
    "left/right": "left right",
    "no.1": "no.1",
    "hello\nworld": "hello world",
    "wheres waldo": "where's waldo",
    "50%": "50%",
    "two-three": "2 3",
    "(a) b": "b",
}


@pytest.mark.parametrize(("text", "expected"), EVALAI.items())
def test_evalai(text, expected):
    assert answers.evalai(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3.5", "3.5"),
        ("U.S.A.", "usa"),
        ("www.foo.com", "wwwfoocom"),
        ("John's", "john's"),  # the EvalAI step that splits 's is absent
        ("black,white", "black white"),
        ("black, white", "black white"),
        ("1,000 red-white", "1000 redwhite"),  # digit-comma-digit deletes every mark
        ("a - b-c", "bc"),  # '-' touches a space somewhere: deleted everywhere
        ("$5 & 6% #1 *:'", "$5 & 6% #1 *:'"),
        ("None of the ten", "0 of 10"),
        ("tab\tand\nbreak ", "tab and break"),
    ],
)
def test_official(text, expected):
    assert answers.official(text) == expected


def test_at_most_32_points_are_deleted():
    assert answers.official("x" + "." * 40) == "x" + "." * 8


def test_the_table_is_complete():
    table = answers.CONTRACTIONS
    assert len(table) == 120
    assert table["couldn'tve"] == "couldn't've"
    assert table["'ow'sat"] == "'ow's'at"
    assert table["somebody'd"] == "somebodyd"
    assert table["let's"] == "let's"
    assert table["youve"] == "you've"


def test_keys_with_a_capital_never_match():
    assert answers.official("Im") == "im"
