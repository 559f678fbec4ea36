"""VQA accuracy against ten human answers (Antol et al., arXiv:1505.00468)."""

from __future__ import annotations

from collections.abc import Sequence

from lmm_jax.eval import answers


def official(prediction: str, references: Sequence[str]) -> float:
    """Accuracy of the VQAv2 script, in [0, 1].

    The script normalises only where humans disagree: if all references are equal after
    white space is cleaned, the comparison is raw and case-sensitive.

    Raises:
      ValueError: as in `agreement`.
    """
    prediction = answers.whitespace(prediction)
    references = [answers.whitespace(text) for text in references]
    if len(set(references)) > 1:
        prediction = answers.official(prediction)
        references = [answers.official(text) for text in references]
    return agreement(prediction, references)


def unguarded(prediction: str, references: Sequence[str]) -> float:
    """As `official`, but always normalised, as most other harnesses do.

    Raises:
      ValueError: as in `agreement`.
    """
    return agreement(
        answers.official(prediction), [answers.official(text) for text in references]
    )


def evalai(prediction: str, references: Sequence[str]) -> float:
    """Accuracy with the EvalAI processor on both sides: TextVQA, VizWiz.

    Raises:
      ValueError: as in `agreement`.
    """
    return agreement(
        answers.evalai(prediction), [answers.evalai(text) for text in references]
    )


def agreement(prediction: str, references: Sequence[str]) -> float:
    """Mean over humans i of min(1, equal answers of the others / 3), in [0, 1].

    With ten humans of whom 0, 1, 2, 3, 4 or more agree with the prediction this is
    0, 0.3, 0.6, 0.9, 1. "The others" go by position: equal answers of two humans both
    count.

    Raises:
      ValueError: fewer than four references, with which no answer can reach 1.
    """
    if len(references) < 4:
        raise ValueError(
            f"{len(references)} reference(s): VQA accuracy needs four or more human "
            "answers (ten as a rule); use the exact score for single answers"
        )
    equal = [text == prediction for text in references]
    total = sum(equal)
    return sum(min(1.0, (total - own) / 3) for own in equal) / len(equal)
