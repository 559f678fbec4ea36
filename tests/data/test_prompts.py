"""Questions to batches of prompts, with the code of training."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lmm_jax.data.pipeline import Question, prompts, read_questions
from lmm_jax.data.sources import BadRecord, LlavaJson
from tests.data.conftest import row


def question(index: int) -> Question:
    return Question(f"q{index}", (), f"What is {index}?", ("x",))


def test_prompts_cover_every_question_once(spec):
    questions = [question(i) for i in range(5)]
    whole = list(prompts(questions, spec, 4))
    assert [batch["id"].tolist() for batch in whole] == [[0, 1, 2, 3], [4, -1, -1, -1]]
    assert not any(batch["loss_mask"].any() for batch in whole)
    parts = [list(prompts(questions, spec, 4, rows)) for rows in ([0, 1], [2, 3])]
    assert [b["id"].tolist() for b in parts[0]] == [[0, 1], [4, -1]]
    assert [b["id"].tolist() for b in parts[1]] == [[2, 3], [-1, -1]]
    text = whole[0]["tokens"][2][whole[0]["valid"][2]]
    shown = spec.tokenizer.decode(text, skip_special=False)
    assert shown == "<s>USER: What is 2?\nASSISTANT:"
    np.testing.assert_array_equal(whole[1]["tokens"][0], whole[1]["tokens"][3])


def test_a_prompt_is_the_training_sample_without_its_answer(dataset, spec, tmp_path):
    source = LlavaJson(dataset([row(0)]), tmp_path)
    trained = spec.sample(source[0], index=0)
    asked = Question("q", (str(tmp_path / "0.png"),), "What?")
    (batch,) = prompts([asked], spec, 1)
    kept = batch["valid"][0]
    for key in ("tokens", "positions", "role", "turn"):
        np.testing.assert_array_equal(batch[key][0][kept], trained[key][kept])
    for key in ("images", "grid", "views", "visual_positions"):
        np.testing.assert_array_equal(batch[key][0], trained[key])


def test_a_question_that_cannot_be_asked_stops(spec):
    asked = [Question("q7", ("nothing.png",), "What?")]
    with pytest.raises(BadRecord, match=r"question q7.*nothing\.png"):
        list(prompts(asked, spec, 1))


def test_question_files(tmp_path):
    path = tmp_path / "questions.jsonl"
    rows = [
        {"question_id": 3, "image": "a.png", "text": "Q\u2028?", "answers": "yes"},
        {"question_id": "b", "text": "R", "answers": ["x", "y"], "category": "c"},
    ]
    lines = [json.dumps(r, ensure_ascii=False) for r in rows]
    path.write_text("\n\n".join(lines) + "\n", "utf-8")
    first, second = read_questions(path, tmp_path)
    assert first == Question("3", (str(tmp_path / "a.png"),), "Q\u2028?", ("yes",))
    assert second == Question("b", (), "R", ("x", "y"), "c")
    path.write_text('{"question_id": 1}\n')
    with pytest.raises(ValueError, match=r"questions\.jsonl, line 1.*'text'"):
        read_questions(path)
