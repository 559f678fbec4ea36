"""Relaxed accuracy of ChartQA (Masry et al., arXiv:2203.10244)."""

from __future__ import annotations

from collections.abc import Sequence

TOLERANCE = 0.05


def score(prediction: str, references: Sequence[str]) -> float:
    """1 if a reference is met within 5 % as a number, or as a string, else 0.

    Numbers are what Python's `float` takes, with "5%" as 0.05; "1,000" is none. A
    reference of zero, or where either side is no number, asks for the same string,
    ignoring case.

    Raises:
      ValueError: no reference.
    """
    if not references:
        raise ValueError("no reference to match; drop the question from the file")
    return float(any(_meets(prediction, text) for text in references))


def _meets(prediction: str, reference: str) -> bool:
    value, target = _number(prediction), _number(reference)
    if value is None or not target:
        return prediction.lower() == reference.lower()
    return abs(value - target) / abs(target) <= TOLERANCE


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
