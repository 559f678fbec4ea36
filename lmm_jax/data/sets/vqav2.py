"""VQAv2 (Goyal et al., arXiv:1612.00837): questions about COCO images, ten answers each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lmm_jax.data.pairs import Pair
from lmm_jax.data.rows import JsonRows
from lmm_jax.data.vocabulary import Vocabulary


class Vqav2:
    """A split in its official files.

    Args:
        questions: `v2_OpenEnded_mscoco_<split>_questions.json`.
        images: folder of `COCO_<split>_<twelve digits>.jpg`.
        annotations: `v2_mscoco_<split>_annotations.json`; "" where they are secret.
        vocabulary: the classes; needed with annotations.
        answerable: leave out questions none of whose answers has a class, as ViLT, METER
            and PuMer do in training; in evaluation they count as wrong.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a broken file, or a question without annotation.
    """

    def __init__(
        self,
        questions: str | Path,
        images: str | Path,
        annotations: str | Path = "",
        vocabulary: Vocabulary | None = None,
        *,
        answerable: bool = False,
    ):
        if bool(annotations) != bool(vocabulary):
            raise ValueError(
                f"VQAv2 with annotations {str(annotations)!r} and "
                f"{len(vocabulary or ())} classes of answers: they go together; name both, "
                "or neither where answers are secret"
            )
        self.images, self.vocabulary = Path(images), vocabulary
        self._questions = JsonRows(questions, "questions", _question_id)
        split = str(self._questions.fields.get("data_subtype", ""))
        self._split = split.replace("-dev", "")  # test-dev2015 is a part of test2015
        self._rows = np.arange(len(self._questions))
        if annotations:
            self._annotations = JsonRows(annotations, "annotations", self._note)
            self._answers = self._paired()
            if answerable:
                notes = self._annotations.notes.tolist()
                known = [row for row, at in enumerate(self._answers) if notes[at][1]]
                self._rows = np.array(known, int)

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        return self._questions.name(int(self._rows[index]))

    def __getitem__(self, index: int) -> Pair:
        row = int(self._rows[index])
        given = ()
        if self.vocabulary:
            given = self._annotations.read(int(self._answers[row]), _given)
        return self._questions.read(row, lambda found: self._pair(found, given))

    def _pair(self, row: dict[str, Any], given: tuple[str, ...]) -> Pair:
        file = f"COCO_{self._split}_{row['image_id']:012d}.jpg"
        target = {"labels": self.vocabulary.scores(given)} if self.vocabulary else {}
        return Pair(
            id=str(row["question_id"]),
            images=(str(self.images / file),),
            text=row["question"],
            target=target,
            answers=given,
        )

    def _note(self, row: dict[str, Any]) -> tuple[int, int]:
        """Its question, and whether one of its answers has a class."""
        return row["question_id"], any(
            a in self.vocabulary.classes for a in _given(row)
        )

    def _paired(self) -> np.ndarray:
        """The annotation of each question, int [questions]."""
        notes = self._annotations.notes.tolist()
        where = {question: at for at, (question, _) in enumerate(notes)}
        asked = self._questions.notes.ravel().tolist()
        lost = [question for question in asked if question not in where]
        if lost:
            raise ValueError(
                f"question {lost[0]} of {self._questions.path} has no annotation in "
                f"{self._annotations.path}; give the files of one split"
            )
        return np.array([where[question] for question in asked], int)


def _question_id(row: dict[str, Any]) -> tuple[int]:
    return (row["question_id"],)


def _given(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(answer["answer"] for answer in row["answers"])
