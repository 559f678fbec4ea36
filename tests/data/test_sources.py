"""Records of good and bad files, and the order of mixtures."""

from __future__ import annotations

import collections
import json
import pickle

import pytest

from lmm_jax.data.sources import BadRecord, LlavaJson, Mixture
from tests.data.conftest import row


@pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
def test_reads_lists_and_lines(dataset, tmp_path, name):
    rows = [row(0), {**row(1, "naïve ☃"), "image": ["1.png", "2.png"]}, row(2)]
    del rows[2]["image"], rows[2]["id"]
    source = LlavaJson(dataset(rows, name), tmp_path)
    assert len(source) == 3
    first, second, third = (source[i] for i in range(3))
    assert first.id == "r0"
    assert first.images == (str(tmp_path / "0.png"),)
    assert first.turns[1] == {"from": "gpt", "value": "number 0"}
    assert first.meta == {"image": "0.png"}
    assert second.turns[0]["value"] == "naïve ☃"
    assert len(second.images) == 2
    assert (third.images, third.id) == ((), "2")
    assert pickle.loads(pickle.dumps(source))[1] == second


@pytest.mark.parametrize(
    "text", [" [ ]", "\ufeff[{}\r\n,\n {} ]\n", '[\n{"a": "é]"} , 3]']
)
def test_lists_however_spaced(tmp_path, text):
    path = tmp_path / "train.json"
    path.write_bytes(text.encode())
    source = LlavaJson(path)
    assert len(source) == len(json.loads(text.lstrip("\ufeff")))


BAD_ROWS = [
    (3, "object"),
    ({"id": "x"}, "'conversations'"),
    ({"conversations": []}, "'conversations'"),
    ({"conversations": [{"from": "human"}]}, "'from' and 'value'"),
    ({"conversations": ["hello"]}, "'from' and 'value'"),
    ({**row(0), "image": 7}, "'image'"),
    ({**row(0), "image": [""]}, "'image'"),
]


@pytest.mark.parametrize("bad, message", BAD_ROWS)
def test_a_malformed_record_fails_when_read(dataset, bad, message):
    source = LlavaJson(dataset([row(0), bad]))
    assert source[0].id == "r0"
    with pytest.raises(BadRecord, match=rf"malformed: .*train\.json\[1\].*{message}"):
        source[1]


def test_a_bad_line_fails_when_read(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(row(0)) + "\n\n{broken\n" + json.dumps(row(2)))
    source = LlavaJson(path)
    assert [source[0].id, source[2].id] == ["r0", "r2"]
    with pytest.raises(BadRecord, match=r"train\.jsonl\[1\]"):
        source[1]


@pytest.mark.parametrize(
    "text, place",
    [
        ('[{"a": 1},\n {"a": ]', "line 2, column 8"),
        ('[{"a": 1}\n {}]', "line 2, column 2"),
        ('[{"a": 1},', "line 1, column 11"),
    ],
)
def test_a_file_that_is_not_json(tmp_path, text, place):
    path = tmp_path / "train.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"train\.json is not JSON.*{place}"):
        LlavaJson(path)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no data file"):
        LlavaJson(tmp_path / "nothing.json")


@pytest.fixture
def pair(dataset):
    return [
        LlavaJson(dataset([row(i) for i in range(count)], f"{count}.json"))
        for count in (4, 10)
    ]


def test_one_index_for_all(pair):
    mixture = Mixture(pair)
    assert len(mixture) == 14
    assert mixture.locate(3) == (0, 3)
    assert mixture.locate(4) == (1, 0)
    assert mixture[13].id == "r9"
    assert mixture.name(4).endswith("10.json[0]")
    for outside in (-1, 14):
        with pytest.raises(IndexError):
            mixture[outside]


def test_unweighted_order_is_a_permutation_each_epoch(pair):
    order = Mixture(pair).order(seed=3)
    epochs = [[order[14 * e + i] for i in range(14)] for e in range(3)]
    assert all(sorted(epoch) == list(range(14)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [Mixture(pair).order(3)[i] for i in range(14)] == epochs[0]
    assert [Mixture(pair).order(4)[i] for i in range(14)] != epochs[0]


def test_weights_are_shares_of_the_stream(pair):
    order = Mixture(pair, [3.0, 1.0]).order(seed=0)
    stream = [int(order[i]) for i in range(160)]
    small = [index for index in stream if index < 4]
    assert len(small) == 120
    assert set(collections.Counter(small).values()) == {30}
    assert abs(sum(index < 4 for index in stream[:20]) - 15) <= 1


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, -2.0]])
def test_bad_weights(pair, weights):
    with pytest.raises(ValueError, match="positive"):
        Mixture(pair, weights)


def test_an_empty_source_is_refused(dataset):
    with pytest.raises(ValueError, match="no records"):
        Mixture([LlavaJson(dataset([]))])
