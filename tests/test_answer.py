"""Questions to answers: buckets, files of questions, conversations."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import jax
import pytest

from lmm_jax import chat, experiment
from lmm_jax.answer import Answerer, buckets
from lmm_jax.data import conversation
from lmm_jax.data.pipeline import BadRecord, Question
from lmm_jax.models import lmm
from lmm_jax.weights import prepared
from tests.small import small_config

NEW = 3


@pytest.fixture(scope="module")
def exp(tmp_path_factory):
    config = small_config(tmp_path_factory.mktemp("answer"), "llava")
    config.text.prefix = 24
    config.eval.update(suffix=128, buckets=(32, 64))
    made = experiment.build(config, (jax.devices()[0],))
    experiment.prepare_data(made)
    return made


@pytest.fixture(scope="module")
def params(exp):
    return prepared(lmm.init(exp.model(train=False), jax.random.key(0)))


@pytest.fixture(scope="module")
def page(exp) -> str:
    pages = Path(exp.config.eval.images, "images").glob("validation*")
    return str(next(pages))


def question(page: str, words: int) -> Question:
    return Question(str(words), (page,), "Why? " * words)


def test_sizes_of_buckets():
    assert buckets(192) == (64, 128, 192)
    assert buckets(64) == (64,)
    assert buckets(40) == (40,)


def test_short_prompts_take_small_buckets_and_answer_the_same(exp, params, page):
    asked = [question(page, n) for n in (1, 2, 1, 8, 1, 3, 18, 2)]
    answerer = Answerer(exp, params, NEW)
    found = answerer.ask(asked, 2)
    # Of the four batches two share a bucket; a bucket is a prefill and a loop.
    assert answerer.programs == 2 * 3
    assert answerer.ask(asked[::-1], 2) == found[::-1]
    assert answerer.programs == 2 * 3
    evaluation = dataclasses.replace(exp.config.eval, buckets=(128,))
    config = dataclasses.replace(exp.config, eval=evaluation)
    whole = dataclasses.replace(exp, config=config)
    assert Answerer(whole, params, NEW).ask(asked, 2) == found


def test_chunks_of_the_config(exp, params, page):
    asked = [question(page, n) for n in (1, 8)]
    found = Answerer(exp, params, NEW).ask(asked, 2)
    for chunk in (20, 0):
        evaluation = dataclasses.replace(exp.config.eval, chunk=chunk)
        config = dataclasses.replace(exp.config, eval=evaluation)
        answerer = Answerer(dataclasses.replace(exp, config=config), params, NEW)
        assert answerer.ask(asked, 2) == found
        assert {made.chunk for made in answerer._generators.values()} == {chunk}
    with pytest.raises(ValueError, match="chunk=-2: use a number of tokens, or 0"):
        dataclasses.replace(exp.config.eval, chunk=-2)


def test_a_prompt_that_does_not_fit(exp, params, page):
    with pytest.raises(BadRecord, match="question 40: too long"):
        Answerer(exp, params, NEW).ask([question(page, 40)], 1)


def test_an_answer_streams_as_it_is_given_whole(exp, params, page):
    answerer = Answerer(exp, params, NEW)
    asked = question(page, 2)
    ((whole, _),) = answerer.ask([asked], 1)
    assert "".join(answerer.stream(asked.record)) == whole


class Parrot:
    """Says how many images and turns it was given."""

    def stream(self, record, number):
        if "bad" in record.images:
            raise BadRecord("missing image", "no file bad")
        yield f"{len(record.images)} images, "
        yield f"{len(record.turns)} turns"


def test_a_conversation_through_a_pipe(capsys):
    lines = [
        "what?",
        "and?",
        "/image b.png",
        "this?",
        "/image bad",
        "that?",
        "still?",
        "/image",
        "",
        "/reset",
        "again?",
        "/quit",
        "never",
    ]
    said = []
    chat.converse(
        Parrot(),
        ("a.png",),
        io.StringIO("\n".join(lines)),
        lambda pieces: said.append("".join(pieces)) or said[-1],
    )
    assert said == [
        "1 images, 1 turns",
        "1 images, 3 turns",
        "2 images, 5 turns",
        "2 images, 7 turns",
        "1 images, 1 turns",
    ]
    error = capsys.readouterr().err
    assert "no file bad" in error and chat.HELP in error


def test_the_second_question_sees_the_first(exp, params, page):
    """Its prompt is the conversation as training would have it."""
    one = chat.Chat(Answerer(exp, params, NEW), (page,))
    one.ask("Why?", "".join)
    one.ask("How?", "".join)
    first, answer, second, _ = [turn["value"] for turn in one.turns]
    assert (first, second) == ("<image>\nWhy?", "How?")
    template = one.answerer.samples.template
    encoded = conversation.prompt(one.turns[:3], template, exp.tokenizer)
    text = exp.tokenizer.decode(encoded.tokens)
    assert text.endswith(f"Why?\nASSISTANT: {answer}USER: How?\nASSISTANT:")
