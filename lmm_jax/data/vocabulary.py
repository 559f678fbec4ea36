"""The answers among which a VQA classifier chooses, and how right each is.

    python -m lmm_jax.data.vocabulary --out=answers.json ANNOTATIONS...

ANNOTATIONS are official files of VQAv2. The published models count train and val together:
3129 answers were given nine times or more as the main one. ViLT and METER number them as
they occur, PuMer by the alphabet (`--order=alphabetical`).
"""

from __future__ import annotations

import argparse
import collections
from collections.abc import Sequence
import dataclasses
import functools
import json
from pathlib import Path
from typing import Literal

import numpy as np

from lmm_jax.data.rows import JsonRows
from lmm_jax.eval import answers

AT_LEAST = 9
SCORES = (0.0, 0.3, 0.6, 0.9, 1.0)  # by how many people gave an answer, four or more


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Answers by class.

    Raises:
        ValueError: an answer that comes twice.
    """

    answers: tuple[str, ...]

    def __post_init__(self):
        if len(self.classes) < len(self.answers):
            counted = collections.Counter(self.answers)
            raise ValueError(
                f"answer {counted.most_common(1)[0][0]!r} has several classes; give each "
                "answer one"
            )

    @classmethod
    def read(cls, path: str | Path) -> Vocabulary:
        """The `id2label` of a JSON file, or of the `config.json` of a hub folder.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it has no `id2label` of classes 0, 1, ...
        """
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        named = json.loads(path.read_text("utf-8")).get("id2label") or {}
        if not named or sorted(named, key=int) != list(map(str, range(len(named)))):
            raise ValueError(
                f"{path} has no 'id2label' from 0, 1, ... to answers; write one with "
                "python -m lmm_jax.data.vocabulary"
            )
        return cls(tuple(named[key] for key in sorted(named, key=int)))

    @classmethod
    def count(
        cls,
        annotations: Sequence[str | Path],
        *,
        at_least: int = AT_LEAST,
        order: Literal["first", "alphabetical"] = "first",
    ) -> Vocabulary:
        """The main answers, normalised as the official script does, that are frequent.

        Args:
            annotations: official files of VQAv2, in their order.
            at_least: how often an answer was given.
            order: of the classes: as they occur first (ViLT, METER), or "alphabetical"
                (PuMer).

        Raises:
            ValueError: no answer is as frequent, or a file of another kind.
        """
        counted: collections.Counter[str] = collections.Counter()

        def note(row: dict) -> None:  # no row is kept
            counted[answers.official(row["multiple_choice_answer"])] += 1

        for path in annotations:
            JsonRows(path, "annotations", note)
        found = [answer for answer, count in counted.items() if count >= at_least]
        if not found:
            raise ValueError(
                f"no answer in {', '.join(map(str, annotations))} was given {at_least} "
                "times; lower at_least"
            )
        return cls(tuple(sorted(found) if order == "alphabetical" else found))

    def __len__(self) -> int:
        return len(self.answers)

    @functools.cached_property
    def classes(self) -> dict[str, int]:
        """Answer -> class."""
        return {answer: i for i, answer in enumerate(self.answers)}

    def scores(self, given: Sequence[str]) -> np.ndarray:
        """How right each class is, float32 [classes], by the people who `given` it.

        The references compare answers as they were written, so we do too.
        """
        found = np.zeros(len(self), np.float32)
        for answer, count in collections.Counter(given).items():
            if answer in self.classes:
                found[self.classes[answer]] = SCORES[min(count, len(SCORES) - 1)]
        return found

    def write(self, path: str | Path) -> None:
        """A file from which `read` gives this vocabulary again."""
        named = {"id2label": dict(enumerate(self.answers))}
        Path(path).write_text(json.dumps(named, ensure_ascii=False, indent=1), "utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("annotations", nargs="+", type=Path, help="files of VQAv2")
    parser.add_argument("--out", required=True, type=Path, help="the JSON to write")
    parser.add_argument("--at-least", type=int, default=AT_LEAST, help="times given")
    parser.add_argument("--order", choices=["first", "alphabetical"], default="first")
    options = parser.parse_args(arguments)
    found = Vocabulary.count(
        options.annotations, at_least=options.at_least, order=options.order
    )
    found.write(options.out)
    print(f"{len(found)} answers in {options.out}")


if __name__ == "__main__":
    main()
