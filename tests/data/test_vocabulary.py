"""Answers that are frequent, their order and their scores."""

from __future__ import annotations

import json

import pytest

from lmm_jax.data import vocabulary
from lmm_jax.data.vocabulary import Vocabulary

MAIN = ["Yes", "the dog.", "yes", "Dog", "two", "cat", "yes!"]


@pytest.fixture
def annotations(tmp_path):
    path = tmp_path / "annotations.json"
    rows = [{"multiple_choice_answer": answer} for answer in MAIN]
    path.write_text(json.dumps({"annotations": rows}))
    return path


def test_frequent_answers_as_the_script_normalises_them(annotations):
    assert Vocabulary.count([annotations], at_least=2).answers == ("yes", "dog")
    found = Vocabulary.count([annotations], at_least=1, order="alphabetical")
    assert found.answers == ("2", "cat", "dog", "yes")
    both = Vocabulary.count([annotations, annotations], at_least=4)
    assert both.answers == ("yes", "dog")
    with pytest.raises(ValueError, match="9 times; lower at_least"):
        Vocabulary.count([annotations])


@pytest.mark.parametrize(
    "times, score", [(1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)]
)
def test_scores_by_people(times, score):
    found = Vocabulary(("a", "b")).scores(["b"] * times + ["x"] * (10 - times))
    assert found.tolist() == pytest.approx([0.0, score])


def test_written_is_read(annotations, tmp_path):
    out = tmp_path / "answers.json"
    vocabulary.main([str(annotations), f"--out={out}", "--at-least=1"])
    assert Vocabulary.read(out).answers == ("yes", "dog", "2", "cat")
    hub = {"id2label": {str(i): f"answer {i}" for i in range(12)}, "model_type": "vilt"}
    (tmp_path / "config.json").write_text(json.dumps(hub))
    assert Vocabulary.read(tmp_path).answers == tuple(hub["id2label"].values())


@pytest.mark.parametrize("labels", [None, {}, {"1": "a"}, {"0": "a", "2": "b"}])
def test_no_vocabulary(tmp_path, labels):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"id2label": labels}))
    with pytest.raises(ValueError, match="no 'id2label' from 0, 1"):
        Vocabulary.read(path)


def test_an_answer_has_one_class():
    with pytest.raises(ValueError, match="'a' has several classes"):
        Vocabulary(("b", "a", "a"))
