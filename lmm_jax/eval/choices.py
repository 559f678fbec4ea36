"""Multiple-choice questions as text: MMLU's files and prompts, and our own JSON lines.

Hendrycks et al., "Measuring Massive Multitask Language Understanding", ICLR 2021,
arXiv:2009.03300; the prompts are those of its code, its two spaces before a subject too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import csv
import dataclasses
import json
from pathlib import Path
import string
from typing import Any

LETTERS = string.ascii_uppercase


@dataclasses.dataclass(frozen=True)
class Choice:
    """A question with some answers, of which one is right.

    Attributes:
        id: unique in its file or folder.
        choices: the answers, "A" first.
        answer: letter of the right one.
        category: its subject, words joined by "_".
        examples: solved questions of the same subject.
    """

    id: str
    question: str
    choices: tuple[str, ...]
    answer: str
    category: str
    examples: tuple[Choice, ...] = ()

    def __post_init__(self):
        if self.answer not in self.letters or len(self.choices) < 2:
            raise ValueError(
                f"question {self.id} has {len(self.choices)} choices and the answer "
                f"{self.answer!r}: give 2 to {len(LETTERS)}, and the letter of one."
            )

    @property
    def letters(self) -> tuple[str, ...]:
        """Those of its choices."""
        return tuple(LETTERS[: len(self.choices)])

    def prompt(self, shots: int) -> str:
        """The text after which a letter is due, behind at most so many examples."""
        subject = "".join(f" {word}" for word in self.category.split("_"))
        asked = "The following are multiple choice questions (with answers)"
        solved = (f"{one.asked} {one.answer}\n\n" for one in self.examples[:shots])
        return f"{asked} about {subject}.\n\n{''.join(solved)}{self.asked}"

    @property
    def asked(self) -> str:
        """The question and its choices."""
        lines = (f"\n{letter}. {c}" for letter, c in zip(self.letters, self.choices))
        return f"{self.question}{''.join(lines)}\nAnswer:"


def read(path: str | Path) -> tuple[Choice, ...]:
    """The questions of MMLU's folder, or of a file of JSON lines.

    The folder has `test/SUBJECT_test.csv` and, with solved examples, `dev/SUBJECT_dev.csv`:
    question, choices, letter. A line is an object with `question`, `choices`, `answer` (a
    letter, or a number from 0), and perhaps `category`, `question_id`; where `split` is
    "dev", it is a solved example for its category.

    Raises:
        FileNotFoundError: no such file, or no subject in the folder.
        ValueError: a line that is no question; says which.
    """
    path = Path(path)
    if not path.is_dir():
        return tuple(_of_lines(path))
    files = sorted((path / "test").glob("*_test.csv"))
    if not files:
        raise FileNotFoundError(
            f"{path} has no test/SUBJECT_test.csv: give the folder of MMLU with its dev/ "
            "and test/, or a file of JSON lines."
        )
    found = []
    for file in files:
        subject = file.name.removesuffix("_test.csv")
        solved = path / "dev" / f"{subject}_dev.csv"
        examples = tuple(_of_table(solved, subject)) if solved.is_file() else ()
        tested = _of_table(file, subject)
        found += [dataclasses.replace(one, examples=examples) for one in tested]
    return tuple(found)


def _of_table(file: Path, subject: str) -> Iterator[Choice]:
    with file.open(newline="", encoding="utf-8") as rows:
        for number, row in enumerate(csv.reader(rows)):
            question, *choices, answer = row if len(row) > 1 else (*row, "")
            name = f"{file.stem}/{number}"
            yield Choice(name, question, tuple(choices), answer.strip(), subject)


def _of_lines(file: Path) -> list[Choice]:
    asked: list[Choice] = []
    examples: dict[str, list[Choice]] = {}
    for number, line in enumerate(file.read_text("utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            one = _of_row(row, number)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(
                f"{file}, line {number}: {error!r}; a question is an object with "
                "'question', 'choices' and 'answer'"
            ) from error
        if row.get("split") == "dev":
            examples.setdefault(one.category, []).append(one)
        else:
            asked.append(one)
    return [
        dataclasses.replace(one, examples=tuple(examples.get(one.category, ())))
        for one in asked
    ]


def _of_row(row: dict[str, Any], number: int) -> Choice:
    answer, choices = row["answer"], tuple(map(str, row["choices"]))
    return Choice(
        str(row.get("question_id", number)),
        row["question"],
        choices,
        LETTERS[answer] if isinstance(answer, int) else answer,
        row.get("category", ""),
    )


def most(questions: Sequence[Choice]) -> int:
    """The largest number of choices."""
    return max(len(question.choices) for question in questions)
