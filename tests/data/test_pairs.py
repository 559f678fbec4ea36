"""Pairs to samples and batches: shapes, marks, negatives and what is drawn."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest

from lmm_jax.data import images
from lmm_jax.data.augment import RandAugment
from lmm_jax.data.images import ImageSpec
from lmm_jax.data.kinds import SourceConfig
from lmm_jax.data.pairs import Pair, PairSpec
from lmm_jax.data.pipeline import (
    DataConfig,
    explain,
    in_order,
    open_sources,
    train_batches,
)
from lmm_jax.data.sources import BadRecord

LABEL = {"label": np.int32(2)}


@pytest.fixture
def spec(characters) -> PairSpec:
    image = ImageSpec(8, mode="stretch", resample="bilinear")
    return PairSpec(image, length=12, tokenizer=characters, seed=1)


@pytest.fixture
def pair(dataset, tmp_path) -> Pair:
    return Pair("a", (str(tmp_path / "3.png"),), "Is it?", LABEL)


def others(pair: Pair, count: int = 20) -> Pair:
    texts = tuple(f"No {i}" for i in range(count))
    return dataclasses.replace(pair, target={}, others=texts)


def test_a_sample(spec, pair):
    found = spec.sample(pair, index=5)
    shapes = {name: (x.shape, x.dtype) for name, x in found.items()}
    assert shapes == {
        "images": ((1, 8, 8, 3), np.uint8),
        "tokens": ((12,), np.int32),
        "valid": ((12,), bool),
        "label": ((), np.int32),
        "id": ((), np.int64),
        "skipped": ((), np.int64),
    }
    size, bilinear = (8, 8), images.Image.Resampling.BILINEAR
    pixels = images.load(pair.images[0]).resize(size, bilinear)
    np.testing.assert_array_equal(found["images"][0], pixels)
    text = spec.tokenizer.decode(found["tokens"][found["valid"]], skip_special=False)
    assert text == "<s>Is it?</s>"
    assert (found["tokens"][~found["valid"]] == spec.tokenizer.pad_id).all()
    assert (found["id"], found["label"]) == (5, 2)
    for name, x in spec.prompt(pair, index=5).items():
        np.testing.assert_array_equal(x, found[name])


def test_long_texts_keep_their_end_mark(spec):
    found = spec.read(["a" * 50])
    assert found["valid"].all()
    text = spec.tokenizer.decode(found["tokens"], skip_special=False)
    assert text == f"<s>{'a' * 10}</s>"


def test_negatives_are_drawn_by_position(spec, pair):
    spec = dataclasses.replace(spec, negatives=15)
    pair = others(pair)

    def texts(position: int, seed: int = 1) -> list[str]:
        drawing = dataclasses.replace(spec, seed=seed)
        found = drawing.sample(pair, index=0, position=position)
        assert found["tokens"].shape == found["valid"].shape == (16, 12)
        decode = spec.tokenizer.decode
        return [decode(row[v]) for row, v in zip(found["tokens"], found["valid"])]

    first, *rest = texts(3)
    assert first == pair.text
    assert len(set(rest)) == 15
    assert set(rest) <= set(pair.others)
    assert texts(3) == [first, *rest]
    assert texts(3) != texts(4)
    assert texts(3) != texts(3, seed=2)
    assert spec.prompt(pair, index=0)["tokens"].shape == (12,)
    with pytest.raises(ValueError, match="15 negatives of 14 other texts"):
        spec.sample(others(pair, 14), index=0)


def test_augmentation_is_of_training_alone(spec, pair):
    augmented = dataclasses.replace(spec, augment=RandAugment())
    seen = [augmented.sample(pair, index=0, position=p)["images"] for p in range(12)]
    again = [augmented.sample(pair, index=9, position=p)["images"] for p in range(12)]
    np.testing.assert_array_equal(seen, again)
    assert len({x.tobytes() for x in seen}) > 6
    plain = spec.prompt(pair, index=0)["images"]
    np.testing.assert_array_equal(augmented.prompt(pair, index=0)["images"], plain)


def test_what_cannot_be_a_sample(spec, pair):
    with pytest.raises(BadRecord, match="images: 1 images for a model of 2"):
        dataclasses.replace(spec, images=2).sample(pair, index=0)
    with pytest.raises(BadRecord, match="unsupervised: pair 'a'"):
        spec.sample(dataclasses.replace(pair, target={}), index=0)
    with pytest.raises(ValueError, match="with 5 views"):
        dataclasses.replace(spec, image=ImageSpec(8, "stretch", crops=4))
    with pytest.raises(ValueError, match="2 text tokens"):
        dataclasses.replace(spec, length=2)


@pytest.fixture
def mixture(dataset, tmp_path):
    """(source, config) of nine sentences about two images, one of which is missing."""
    path = tmp_path / "train.jsonl"
    rows = []
    for i in range(9):
        rows.append({"identifier": f"t-{i}-0", "sentence": f"s{i}", "label": "True"})
        for side in range(2):
            picture = (tmp_path / f"{i + side}.png").read_bytes()
            (tmp_path / f"t-{i}-img{side}.png").write_bytes(picture)
    (tmp_path / "t-4-img1.png").unlink()
    path.write_text("\n".join(map(json.dumps, rows)))
    source = SourceConfig(path=str(path), kind="nlvr2", images=str(tmp_path))
    config = DataConfig((source,), batch_size=3, seed=2)
    return open_sources(config), config


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_resume(mixture, spec, workers):
    source, config = mixture
    config = dataclasses.replace(config, workers=workers, threads=1, prefetch=1)
    spec = dataclasses.replace(spec, images=2, augment=RandAugment())

    def take(count, start=0):
        stream = train_batches(source, spec, config, start=start)
        found = list(itertools.islice(stream, count))
        stream.close()
        return found

    whole, rest = take(5), take(3, start=2)
    for ours, theirs in zip(rest, whole[2:], strict=True):
        for name in theirs:
            np.testing.assert_array_equal(ours[name], theirs[name])
    assert whole[0]["images"].shape == (3, 2, 8, 8, 3)
    skipped = np.concatenate([batch["skipped"] for batch in whole])
    assert set(skipped.tolist()) == {-1, 4}
    assert explain(source, 4, spec).startswith("missing image")


def test_evaluation_is_in_order_and_stops_where_something_is_missing(mixture, spec):
    source, _ = mixture
    spec = dataclasses.replace(spec, images=2)
    first = next(in_order(source, spec, 4))
    assert first["id"].tolist() == [0, 1, 2, 3]
    with pytest.raises(BadRecord, match="question t-4-0: missing image"):
        list(in_order(source, spec, 4))
    good = [source[i] for i in range(4)]
    batches = list(in_order(good, spec, 3))
    assert [b["id"].tolist() for b in batches] == [[0, 1, 2], [3, -1, -1]]
    np.testing.assert_array_equal(batches[1]["tokens"][0], batches[1]["tokens"][2])


@pytest.mark.parametrize(
    "kinds, fields",
    [
        (["vqav2"], dict(pack=2)),
        (["vqav2"], dict(group="modality_length")),
        (["vqav2", "llava"], {}),
        (["vqav2", "snli_ve"], {}),
    ],
)
def test_pairs_are_of_one_kind_neither_packed_nor_grouped(kinds, fields):
    sources = tuple(SourceConfig("x.json", kind=kind) for kind in kinds)
    with pytest.raises(ValueError, match=r"sources of .*vqav2.* all of one kind"):
        DataConfig(sources, 2, **fields)
