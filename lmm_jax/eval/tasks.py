"""Evaluation tasks: rows of data; scores of answers, their means, prediction lines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import json
import os
from pathlib import Path
from typing import Any, TypeVar

from lmm_jax.eval.scores import anls, exact, relaxed, vqa

# (prediction, references) -> score in [0, 1]
Scorer = Callable[[str, Sequence[str]], float]
Q = TypeVar("Q")

SHORT_ANSWER = "Answer the question using a single word or phrase."
UNANSWERABLE = (
    "When the provided information is insufficient, respond with 'Unanswerable'."
)


@dataclasses.dataclass(frozen=True)
class Task:
    """One benchmark under one protocol.

    Attributes:
      name: as in the command line and in result records.
      questions: JSON lines of `question_id, image, text, category, answers`, relative
        to the current directory; of multiple choice, what `choices.read` reads.
      images: folder of the images.
      suffix: format request, on a line of its own after the question; "" for none.
      max_new_tokens: of a generated answer.
      metrics: name -> scorer of one answer; the task's value is the mean.
      version: of the scorers; a change makes old results incomparable.
      protocol: whose prompts and answer handling these are; never mixed in a table.
      citation: arXiv identifier of the benchmark.
      examples: number of questions of the published set, None if any will do.
      shots: of multiple choice by log-likelihood, solved examples before each question;
        None where answers are generated.
      slots: longest prompt of such a question in tokens.
    """

    name: str
    questions: str
    images: str
    suffix: str
    max_new_tokens: int
    metrics: Mapping[str, Scorer]
    citation: str
    protocol: str = "llava"
    version: int = 1
    examples: int | None = None
    shots: int | None = None
    slots: int = 2048

    def asked(self, question: Q) -> Q:
        """The question, a dataclass with `text`, with the format request, once."""
        if not self.suffix or question.text.endswith(self.suffix):
            return question
        text = f"{question.text}\n{self.suffix}"
        return dataclasses.replace(question, text=text)

    def check_size(self, examples: int) -> None:
        """Passes if a question file is complete; for runs without a limit.

        Raises:
          ValueError: it has more or fewer questions than the published set.
        """
        if self.examples not in (None, examples):
            raise ValueError(
                f"{examples} questions of {self.name}, which has {self.examples}; "
                "complete the file, or ask a limited number on purpose"
            )


_ROW_KEYS = {"question_id", "prompt", "text", "answers"}
_ROW_KEYS |= {"score", "category", "model_id", "metadata"}

TASKS: tuple[Task, ...] = (
    Task(
        name="gqa",
        questions="data/gqa/testdev_balanced.jsonl",
        images="data/gqa/images",
        suffix=SHORT_ANSWER,
        max_new_tokens=128,
        metrics={"accuracy": exact.score},
        citation="1902.09506",
        examples=12_578,
    ),
    Task(
        name="vqav2",
        questions="data/vqav2/val.jsonl",
        images="data/coco/val2014",
        suffix=SHORT_ANSWER,
        max_new_tokens=128,
        metrics={"accuracy": vqa.official},
        citation="1612.00837",
        examples=214_354,
    ),
    Task(
        name="okvqa",
        questions="data/okvqa/val.jsonl",
        images="data/coco/val2014",
        suffix=SHORT_ANSWER,
        max_new_tokens=128,
        metrics={"accuracy": vqa.official},
        citation="1906.00067",
        examples=5_046,
    ),
    Task(
        name="textvqa",
        questions="data/textvqa/val.jsonl",
        images="data/textvqa/train_images",
        suffix=SHORT_ANSWER,
        max_new_tokens=128,
        metrics={"accuracy": vqa.evalai},
        citation="1904.08920",
        examples=5_000,
    ),
    Task(
        name="vizwiz",
        questions="data/vizwiz/val.jsonl",
        images="data/vizwiz/val",
        suffix=f"{UNANSWERABLE}\n{SHORT_ANSWER}",
        max_new_tokens=128,
        metrics={"accuracy": vqa.evalai},
        citation="1802.08218",
        examples=4_319,
    ),
    Task(
        name="docvqa",
        questions="data/docvqa/val.jsonl",
        images="data/docvqa/images",
        suffix=SHORT_ANSWER,
        max_new_tokens=32,
        metrics={"anls": anls.score},
        citation="2007.00398",
        protocol="lmms",
        examples=5_349,
    ),
    Task(
        name="infovqa",
        questions="data/infovqa/val.jsonl",
        images="data/infovqa/images",
        suffix=SHORT_ANSWER,
        max_new_tokens=32,
        metrics={"anls": anls.score},
        citation="2104.12756",
        protocol="lmms",
        examples=2_801,
    ),
    Task(
        name="chartqa",
        questions="data/chartqa/test.jsonl",
        images="data/chartqa/png",
        suffix="Answer the question with a single word.",
        max_new_tokens=16,
        metrics={"relaxed_accuracy": relaxed.score},
        citation="2203.10244",
        protocol="lmms",
        examples=2_500,
    ),
    Task(
        name="documents",
        questions="data/documents/questions.jsonl",
        images="data/documents",
        suffix="",
        max_new_tokens=32,
        metrics={"accuracy": exact.score, "anls": anls.score},
        citation="generated by lmm_jax.data.documents",
        protocol="lmm_jax",
    ),
    Task(
        name="mmlu",
        questions="data/mmlu",
        images="",
        suffix="",
        max_new_tokens=0,
        metrics={"accuracy": exact.score},
        citation="2009.03300",
        protocol="hendrycks",
        examples=14_042,
        shots=5,
    ),
    Task(
        name="choices",
        questions="data/choices.jsonl",
        images="",
        suffix="",
        max_new_tokens=0,
        metrics={"accuracy": exact.score},
        citation="any file of lmm_jax.eval.choices",
        protocol="hendrycks",
        shots=5,
    ),
)


def named(name: str) -> Task:
    """The row of `TASKS` with this name.

    Raises:
      ValueError: there is none.
    """
    for task in TASKS:
        if task.name == name:
            return task
    known = ", ".join(task.name for task in TASKS)
    raise ValueError(f"no task {name!r}; there are: {known}")


def score(task: Task, text: str, answers: Sequence[str]) -> dict[str, float]:
    """{metric: value in [0, 1]} of one generated answer."""
    return {name: scorer(text, answers) for name, scorer in task.metrics.items()}


def prediction(
    task: Task,
    model: str,
    text: str,
    *,
    name: str,
    prompt: str,
    answers: Sequence[str],
    category: str = "",
    secret: bool = False,
) -> dict[str, Any]:
    """A row for `write_predictions` and `aggregate`.

    Args:
      model: its name.
      text: its answer.
      name: of the question.
      answers: right ones.
      secret: whether nobody but the benchmark's owners knows them; then there is no score.

    Raises:
      ValueError: too few answers to score by.
    """
    return {
        "question_id": name,
        "prompt": prompt,
        "text": text,
        "answers": list(answers),
        "score": {} if secret else score(task, text, answers),
        "category": category,
        "model_id": model,
        "metadata": {"protocol": task.protocol, "version": task.version},
    }


def aggregate(
    task: Task,
    rows: Iterable[Mapping[str, Any]],
    groups: Mapping[str, Sequence[str]] | None = None,
    part: bool = False,
) -> dict[str, dict[str, float]]:
    """Means in percent, and counts, per category, per group of them, and in total.

    Args:
      rows: with `score` (see `score`) and `category`, "" for none.
      groups: name -> categories that are averaged together.
      part: not all questions were asked; groups do without categories that nobody was
        asked about, and those without any other are left out.

    Returns:
      {metric: {"total": percent, category: percent, ...}, "n": {"total": count, ...}};
      every mean is over examples, not over categories.

    Raises:
      ValueError: no row, a group of unknown categories, or a name used twice.
    """
    members: dict[str, list[Mapping[str, float]]] = {}
    everything = []
    for row in rows:
        everything.append(row["score"])
        if row["category"]:
            members.setdefault(row["category"], []).append(row["score"])
    if not everything:
        raise ValueError(f"no predictions of task {task.name!r} to average")
    merged = {"total": everything}
    for name, categories in (groups or {}).items():
        unknown = sorted(set(categories) - members.keys())
        if unknown and not part:
            raise ValueError(
                f"group {name!r}: no category {unknown}; {task.name!r} has "
                f"{sorted(members)}"
            )
        scores = [x for category in categories for x in members.get(category, ())]
        if scores:
            merged[name] = scores
    if twice := sorted(members.keys() & merged.keys()):
        raise ValueError(f"categories {twice} are also names of groups; rename these")
    parts = merged | members
    result: dict[str, dict[str, float]] = {
        metric: {
            name: 100 * sum(score[metric] for score in scores) / len(scores)
            for name, scores in parts.items()
        }
        for metric in task.metrics
    }
    result["n"] = {name: len(scores) for name, scores in parts.items()}
    return result


def write_predictions(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """JSON lines in the order of the questions, all or nothing.

    Args:
      rows: each with exactly question_id, prompt, text (the answer), answers, score,
        category, model_id and metadata.

    Raises:
      ValueError: a row has other keys.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        for row in rows:
            if wrong := row.keys() ^ _ROW_KEYS:
                raise ValueError(
                    f"prediction {row.get('question_id')!r}: missing or unknown keys "
                    f"{sorted(wrong)}; a row has {sorted(_ROW_KEYS)}"
                )
            file.write(json.dumps(dict(row), ensure_ascii=False) + "\n")
    os.replace(partial, path)
