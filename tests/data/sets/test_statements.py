"""NLVR2 and SNLI-VE: lines, images and classes."""

from __future__ import annotations

import json

import pytest

from lmm_jax.data.sets.nlvr2 import Nlvr2
from lmm_jax.data.sets.snli_ve import SnliVe
from lmm_jax.data.sources import BadRecord


def write(folder, *rows):
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_nlvr2(tmp_path):
    row = {"identifier": "train-10-0-12", "sentence": "Two dogs.", "label": "True"}
    path = write(
        tmp_path,
        {**row, "directory": 41},
        {**row, "label": "False"},
        {"identifier": "test2-3-1-0", "sentence": "s"},
        {**row, "label": "Maybe"},
    )
    source = Nlvr2(path, "images")
    first, second, secret = (source[i] for i in range(3))
    assert (first.id, first.text) == ("train-10-0-12", "Two dogs.")
    names = ("train-10-0-img0.png", "train-10-0-img1.png")
    assert first.images == tuple(f"images/41/{name}" for name in names)
    assert second.images == tuple(f"images/{name}" for name in names)
    labels = [pair.target["label"] for pair in (first, second)]
    assert labels == [1, 0]
    assert all(label.dtype == "int32" for label in labels)
    assert not secret.target
    with pytest.raises(BadRecord, match=r"rows\.jsonl\[3\]: .*'Maybe' is none"):
        source[3]


def test_snli_ve(tmp_path):
    row = {"Flickr30K_ID": "3416050480", "sentence1": "p", "sentence2": "A cat."}
    classes = ("contradiction", "neutral", "entailment")
    rows = [{**row, "gold_label": c, "pairID": f"{c}#1"} for c in classes]
    source = SnliVe(write(tmp_path, *rows, {**row, "gold_label": "-"}), "flickr")
    assert [int(source[i].target["label"]) for i in range(3)] == [0, 1, 2]
    assert source[2].id == "entailment#1"
    assert source[0].images == ("flickr/3416050480.jpg",)
    assert source[0].text == "A cat."
    with pytest.raises(BadRecord, match=r"label '-' is none of contradiction"):
        source[3]
