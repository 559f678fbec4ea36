"""Multiple choice by log-likelihood, against `transformers`."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers

from lmm_jax import choose, evaluate, experiment, weights
from lmm_jax.data.sources import BadRecord
from lmm_jax.data.tokenizer import Tokenizer
from lmm_jax.eval.choices import Choice
from tests.hub.test_llava import TEXT, VISION
from tests.hub.test_vision import scramble
from tests.small import small_config

SOLVED = tuple(
    Choice(str(i), f"Is {i} odd?", ("yes", "no"), "BA"[i % 2], "numbers")
    for i in range(5)
)
ASKED = (
    Choice("one", "2 + 2?", ("3", "4", "5", "6"), "B", "numbers", SOLVED),
    Choice("two", "A longer question, is it not?", ("yes", "no"), "A", "words"),
    Choice("three", "Is 7 odd?", ("yes", "no", "who knows"), "A", "numbers", SOLVED),
)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(**TEXT | dict(vocab_size=110)),
        image_token_index=108,
    )
    model = scramble(transformers.LlavaForConditionalGeneration(config))
    path = tmp_path_factory.mktemp("choose")
    model.save_pretrained(path / "hf")
    return path, model


@pytest.fixture(scope="module")
def exp(theirs):
    folder, _ = theirs
    config = small_config(folder, "llava")
    config.init = dict(load=str(folder / "hf"))
    file = folder / "choices.jsonl"
    rows = [
        dict(
            question=c.question, choices=c.choices, answer=c.answer, category=c.category
        )
        | dict(split="dev" if c in SOLVED else "test", question_id=c.id)
        for c in (*SOLVED, *ASKED)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    config.eval.update(tasks=("choices",), choices=str(file), batch_size=8)
    return experiment.build(config)


def expected(model, question: Choice, shots: int) -> tuple[np.ndarray, int]:
    characters = Tokenizer.load("characters")
    ids = [characters.bos_id, *characters.encode(f"{question.prompt(shots)} ")[0]]
    letters = [characters.encode(letter)[0][0] for letter in question.letters]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
    return torch.log_softmax(logits, -1)[letters].numpy(), len(ids)


def test_log_likelihoods_are_those_of_transformers(theirs, exp):
    """In two buckets; in the smaller one examples are left out until the rest fits."""
    params = weights.prepared(weights.to_run(exp, exp.model(train=False)))
    for slots, shots in ((512, (5, 0, 5)), (200, (2, 0, 2))):
        found = choose.Chooser(exp, params, slots, shots=5).ask(ASKED, 8)
        for question, some, (likelihoods, length) in zip(ASKED, shots, found):
            right, tokens = expected(theirs[1], question, some)
            assert length == tokens
            np.testing.assert_allclose(likelihoods, right, rtol=1e-5, atol=1e-5)
    with pytest.raises(BadRecord, match="question one: too long: 112 tokens in 64"):
        choose.Chooser(exp, params, 64, shots=5).ask(ASKED, 8)


def test_evaluation_reports_subjects_and_what_text_costs(theirs, exp):
    records = {record.category: record for record in evaluate.evaluate(exp)}
    assert records.keys() == {"total", "numbers", "words"}
    best = [expected(theirs[1], q, 5)[0].argmax() for q in ASKED]
    right = [q.letters[i] == q.answer for q, i in zip(ASKED, best)]
    assert records["total"].value == pytest.approx(100 * np.mean(right))
    assert records["words"].value == 100 * right[1]
    assert records["total"].visual_tokens == 0
    assert records["total"].vision_tflops_per_example == 0
    lines = (
        (theirs[0] / "run" / "predictions" / "choices.jsonl").read_text().splitlines()
    )
    assert [json.loads(line)["text"] for line in lines] == [
        q.letters[i] for q, i in zip(ASKED, best)
    ]


def test_a_backbone_needs_no_tower_for_text(theirs, exp, tmp_path):
    _, model = theirs
    language = transformers.LlamaForCausalLM(model.config.text_config)
    language.model.load_state_dict(model.model.language_model.state_dict())
    language.lm_head.load_state_dict(model.lm_head.state_dict())
    language.save_pretrained(tmp_path / "llama")
    config = small_config(tmp_path, "llava")
    config.init = dict(language=str(tmp_path / "llama"))
    with pytest.raises(ValueError, match="has no checkpoint"):
        evaluate.evaluate(experiment.build(config))
    config.eval.update(
        tasks=("choices",), choices=exp.config.eval.choices, batch_size=8
    )
    evaluate.evaluate(experiment.build(config))
    lines = (
        (tmp_path / "run" / "predictions" / "choices.jsonl").read_text().splitlines()
    )
    for line, question in zip(lines, ASKED):
        found = json.loads(line)["metadata"]["likelihoods"]
        right = expected(model, question, 5)[0]
        np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-5)


def test_letters_must_be_single_tokens(exp):
    class Spelled:
        adds_bos = False

        def encode(self, text):
            return [*text.encode(), *[0] * (ord(text[-1]) - ord("A"))], []

    samples = exp.samples(exp.text_model(512).plan)
    object.__setattr__(samples, "tokenizer", Spelled())
    with pytest.raises(BadRecord, match="for each of A, B, C; use another"):
        choose.Letters(samples, 0, 4).prompt(ASKED[2], index=0)
