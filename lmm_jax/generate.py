"""Answers questions about image files: one, a file of them, or in a conversation.

    python -m lmm_jax.generate --config.workdir=runs/quickstart --image=page.png \\
        --prompt="What is the title?"
    python -m lmm_jax.generate --config.workdir=runs/quickstart --image=page.png --chat
    python -m lmm_jax.generate --config.workdir=runs/quickstart \\
        --questions=questions.jsonl --images=data --answers=answers.jsonl

One answer and a chat are printed as they come. A line of the questions is an object with
`question_id`, `text` and perhaps `image`; answers come in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable
import json
from pathlib import Path
import sys

from absl import flags

from lmm_jax import chat, cli, experiment, weights
from lmm_jax.answer import Answerer
from lmm_jax.data import pipeline
from lmm_jax.data.pipeline import Question
from lmm_jax.decode import Sampling

_IMAGE = flags.DEFINE_multi_string(
    "image", [], "Image file; several for several images."
)
_PROMPT = flags.DEFINE_string("prompt", None, "What to ask.")
_CHAT = flags.DEFINE_bool("chat", False, "Converse: questions are lines of input.")
_QUESTIONS = flags.DEFINE_string("questions", None, "JSONL file of questions.")
_IMAGES = flags.DEFINE_string("images", "", "Folder of the images in --questions.")
_ANSWERS = flags.DEFINE_string("answers", "answers.jsonl", "JSONL file to write.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 is greedy.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Probability mass to draw from.")
_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "Longest answer.")
_STOP = flags.DEFINE_multi_string("stop", [], "Text before which an answer ends.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the draws.")


def main(argv: list[str], config) -> None:
    asked = [_PROMPT.value is not None, _CHAT.value, _QUESTIONS.value is not None]
    if sum(asked) != 1:
        raise ValueError("give one of --prompt=TEXT, --chat and --questions=FILE.")
    exp = experiment.build(config)
    answerer = Answerer(
        exp,
        weights.prepared(weights.to_run(exp, exp.model(train=False))),
        _TOKENS.value,
        Sampling(_TEMPERATURE.value, _TOP_P.value),
        tuple(_STOP.value),
        _SEED.value,
    )
    if _CHAT.value:
        chat.converse(answerer, tuple(_IMAGE.value), sys.stdin, show)
    elif _PROMPT.value is not None:
        question = Question("prompt", tuple(_IMAGE.value), _PROMPT.value)
        show(answerer.stream(question.record))
    else:
        answer_file(answerer, exp.config.eval.batch_size)


def show(pieces: Iterable[str]) -> str:
    """Prints pieces of a line as they come; returns the line."""
    said = []
    for piece in pieces:
        said.append(piece)
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    return "".join(said)


def answer_file(answerer: Answerer, batch_size: int) -> None:
    """Answers --questions into --answers."""
    questions = pipeline.read_questions(_QUESTIONS.value, _IMAGES.value)
    found = answerer.ask(questions, batch_size, "questions")
    with Path(_ANSWERS.value).open("w", encoding="utf-8") as file:
        for question, (text, _) in zip(questions, found):
            row = {"question_id": question.id, "prompt": question.text, "text": text}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(
        f"{len(questions)} answers in {_ANSWERS.value}, {answerer.programs} programs "
        "compiled"
    )


if __name__ == "__main__":
    cli.run(main)
