"""Questions meet their annotations, and answers their classes."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest

from lmm_jax.data.kinds import SourceConfig, open_source
from lmm_jax.data.sets.vqav2 import Vqav2
from lmm_jax.data.sources import BadRecord
from lmm_jax.data.vocabulary import Vocabulary

KNOWN = Vocabulary(("net", "mesh", "catcher", "yes", "no"))


def opened(root, **options) -> Vqav2:
    files = root / "questions.json", root / "images", root / "annotations.json"
    return Vqav2(*files, options.pop("vocabulary", KNOWN), **options)


def test_a_question_with_its_scores(vqa):
    source = opened(vqa)
    assert len(source) == 3
    pair = pickle.loads(pickle.dumps(source))[0]
    assert (pair.id, pair.text) == ("10", "What 0?")
    assert pair.images == (str(vqa / "images" / "COCO_train2014_000000000007.jpg"),)
    assert pair.target["labels"].dtype == np.float32
    # "Net" is not the answer "net": the references do not normalise annotators.
    np.testing.assert_allclose(pair.target["labels"], [1.0, 0.9, 0, 0, 0])
    np.testing.assert_allclose(source[2].target["labels"], [0, 0, 0, 0.6, 0.3])
    assert len(pair.answers) == 10


def test_training_leaves_out_what_no_class_answers(vqa):
    known = Vocabulary(("net", "no"))
    assert [p.id for p in opened(vqa, vocabulary=known)] == ["10", "11", "12"]
    source = opened(vqa, vocabulary=known, answerable=True)
    assert [source[i].id for i in range(len(source))] == ["10", "12"]
    assert source.name(1).endswith("questions.json[2]")


def test_secret_answers(vqa):
    pair = Vqav2(vqa / "questions.json", vqa)[1]
    assert (pair.target, pair.answers) == ({}, ())


def test_images_of_a_part_of_a_split(vqa):
    text = (vqa / "questions.json").read_text()
    (vqa / "dev.json").write_text(text.replace("train2014", "test-dev2015"))
    assert "COCO_test2015_0000" in Vqav2(vqa / "dev.json", vqa)[0].images[0]


def test_files_that_do_not_belong_together(vqa):
    with pytest.raises(ValueError, match=r"annotations '' and 5 classes.*name both"):
        Vqav2(vqa / "questions.json", vqa, vocabulary=KNOWN)
    other = json.loads((vqa / "annotations.json").read_text())
    other["annotations"].pop()
    (vqa / "annotations.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"question 10 of .* has no annotation"):
        opened(vqa)
    with pytest.raises(ValueError, match="no list 'questions'"):
        Vqav2(vqa / "annotations.json", vqa)
    with pytest.raises(FileNotFoundError, match=r"nothing\.json"):
        Vqav2(vqa / "nothing.json", vqa)


def test_a_question_without_text(vqa):
    whole = json.loads((vqa / "questions.json").read_text())
    del whole["questions"][1]["question"]
    (vqa / "questions.json").write_text(json.dumps(whole))
    source = opened(vqa)
    assert source[2].id == "12"
    with pytest.raises(BadRecord, match=r"questions\.json\[1\]: no 'question'"):
        source[1]


@pytest.mark.parametrize("train, count", [(True, 1), (False, 3)])
def test_from_a_config(vqa, train, count):
    Vocabulary(("pitcher",)).write(vqa / "answers.json")
    config = SourceConfig(
        path=str(vqa / "questions.json"),
        kind="vqav2",
        images=str(vqa / "images"),
        annotations=str(vqa / "annotations.json"),
        answers=str(vqa / "answers.json"),
    )
    assert len(open_source(config, train=train)) == count
