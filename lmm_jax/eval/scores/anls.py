"""Average normalised Levenshtein similarity (DocVQA, InfoVQA; arXiv:1905.13648)."""

from __future__ import annotations

from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

THRESHOLD = 0.5


def score(prediction: str, references: Sequence[str]) -> float:
    """Similarity to the nearest reference, in {0} and [0.5, 1].

    As the official script: strings are lower-cased and their white space collapsed for
    the distance, but the distance is divided by the longer length *before* that; a
    similarity of exactly 0.5 is kept, which the paper's formula drops.

    Raises:
      ValueError: no reference.
    """
    if not references:
        raise ValueError("no reference to match; drop the question from the file")
    similarity = 1 - min(_distance(prediction, text) for text in references)
    return similarity if similarity >= THRESHOLD else 0.0


def _distance(prediction: str, reference: str) -> float:
    longest = max(len(prediction), len(reference))
    if not longest:
        return 0.0
    return Levenshtein.distance(_clean(prediction), _clean(reference)) / longest


def _clean(text: str) -> str:
    return " ".join(text.lower().split())
