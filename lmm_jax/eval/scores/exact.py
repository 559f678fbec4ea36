"""Exact match of short answers (GQA and other open short-answer sets)."""

from __future__ import annotations

from collections.abc import Sequence


def score(prediction: str, references: Sequence[str]) -> float:
    """1 if the prediction equals a reference, else 0.

    Both sides are stripped of white space, then of all trailing points, and
    lower-cased. LLaVA's GQA converter does this to the prediction alone; GQA's answers
    are lower-case words without a point, so the results agree.

    Raises:
      ValueError: no reference.
    """
    if not references:
        raise ValueError("no reference to match; drop the question from the file")
    return float(_plain(prediction) in {_plain(text) for text in references})


def _plain(text: str) -> str:
    return text.strip().rstrip(".").strip().lower()
