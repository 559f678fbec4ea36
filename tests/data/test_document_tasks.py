"""Generated sets in the official formats: read by their sources, right, and complete."""

from __future__ import annotations

import collections
import json
import random

import numpy as np
import pytest

from lmm_jax.data import document_tasks, documents
from lmm_jax.data.images import ImageSpec
from lmm_jax.data.pairs import PairSpec
from lmm_jax.data.sets.nlvr2 import Nlvr2
from lmm_jax.data.sets.vqav2 import Vqav2
from lmm_jax.data.tokenizer import Tokenizer
from lmm_jax.data.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    return document_tasks.generate(folder, train=30, validation=6, seed=1)


@pytest.mark.parametrize("split, pages", [("train2014", 30), ("val2014", 6)])
def test_questions_have_their_answer(root, split, pages):
    folder = root / "vqav2"
    source = Vqav2(
        folder / f"v2_OpenEnded_mscoco_{split}_questions.json",
        folder / split,
        folder / f"v2_mscoco_{split}_annotations.json",
        Vocabulary.read(folder / "answers.json"),
    )
    spec = PairSpec(ImageSpec(64, "stretch"), 12, Tokenizer.load(root / "tokenizer"))
    seen = set()
    for index in range(len(source)):
        pair = source[index]
        found = spec.prompt(pair, index=index)
        assert found["images"].shape == (1, 64, 64, 3)
        unknown = spec.tokenizer.backend.id("[UNK]")
        assert unknown not in found["tokens"]
        assert found["valid"].sum() < 12
        assert len(set(pair.answers)) == 1
        (classes,) = found["labels"].nonzero()
        answer = {source.vocabulary.answers[i] for i in classes}
        known = pair.answers[0] in source.vocabulary.answers
        assert known or split == "val2014"
        assert answer == (set(pair.answers) if known else set())
        seen.add(pair.images)
    assert len(seen) == pages


def test_sentences_of_two_pages(root):
    source = Nlvr2(root / "nlvr2" / "train.json", root / "nlvr2" / "images" / "train")
    assert len(source) == 30 * document_tasks.SENTENCES
    tokenizer = Tokenizer.load(root / "tokenizer")
    spec = PairSpec(ImageSpec(64, "stretch"), 12, tokenizer, images=2)
    found = [spec.sample(source[i], index=i) for i in range(len(source))]
    assert {int(x["label"]) for x in found} == {0, 1}
    assert found[0]["images"].shape == (2, 64, 64, 3)


def test_no_sentence_betrays_whether_it_is_true():
    rng = random.Random(0)
    counts = collections.defaultdict(list)
    for _ in range(2000):
        left, right = (documents.sample_page(rng, held_out=False) for _ in range(2))
        if rng.random() < 0.5:
            right = left
        text, true = document_tasks.statement(left, right, rng)
        words = text.rstrip(".").split()
        counts[" ".join(words[:-1])].append(true)
        said = words[-1]
        expected = {
            "The left": said == left.title,
            "The right": said == right.title,
            "One of": said in (left.title, right.title),
            "Both titles": left.title == right.title,
        }
        assert expected[" ".join(words[:2])] == true
    assert len(counts) == 4
    assert all(0.35 < np.mean(truths) < 0.65 for truths in counts.values())


def test_a_set_is_written_once(root, tmp_path):
    sizes = dict(train=30, validation=6, seed=1)
    before = (root / "nlvr2" / "dev.json").stat().st_mtime_ns
    assert document_tasks.generate(root, **sizes) == root
    assert (root / "nlvr2" / "dev.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"holds the set .* delete it"):
        document_tasks.generate(root, **{**sizes, "seed": 2})
    with pytest.raises(ValueError, match="got train=0"):
        document_tasks.generate(tmp_path, **{**sizes, "train": 0})
    again = document_tasks.generate(tmp_path / "again", **sizes)
    for name in ("nlvr2/train.json", "vqav2/answers.json", "tokenizer/vocab.txt"):
        assert (again / name).read_bytes() == (root / name).read_bytes()
    whole = json.loads((again / documents.MANIFEST).read_text())
    assert whole["seed"] == 1
