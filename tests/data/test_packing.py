"""Rows of several samples: which meet, what a row holds, and what moves it."""

from __future__ import annotations

import dataclasses
import itertools

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from lmm_jax.data import packing
from lmm_jax.data.images import ImageSpec
from lmm_jax.data.native import NativeSpec
from lmm_jax.data.pipeline import (
    DataConfig,
    SkipLedger,
    SourceConfig,
    open_sources,
    train_batches,
)
from lmm_jax.data.placement import Slots
from tests.data.conftest import row
from tests.data.test_pipeline import assert_same, spoil, take

MOST = 4
SLOTS = Slots(prefix=16, suffix=184, images=5, tokens_per_image=4)
FORMS = {  # how images come, and the slots of a row for them
    "views": (ImageSpec(8, "stretch", crops=4), SLOTS),
    "tiles": (
        ImageSpec(8, "anyres", pinpoints=((2, 1), (1, 2)), patches=2),
        dataclasses.replace(SLOTS, tokens_per_image=16, rows=16, varies=True),
    ),
    "fine": (
        ImageSpec(8, "stretch", pinpoints=((2, 1), (1, 2)), patches=2, fine=2),
        dataclasses.replace(SLOTS, tokens_per_image=16, rows=16, varies=True),
    ),
    "native": (
        ImageSpec(8, "native", native=NativeSpec(4, 2, 64, 512)),
        dataclasses.replace(SLOTS, tokens_per_image=8),
    ),
}


@settings(deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), max_size=200),
    most=st.integers(1, 5),
    opened=st.integers(1, 8),
    seed=st.integers(0, 99),
)
def test_rows_hold_every_record_once_and_no_more_than_fits(sizes, most, opened, seed):
    sizes = np.array(sizes, int).reshape(-1, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "OPEN", opened)
        rows = packing.pack(sizes, (9, 3), most, np.random.default_rng(seed))
    assert sorted(itertools.chain(*rows)) == list(range(len(sizes)))
    for members in rows:
        assert 1 <= len(members) <= most
        assert (sizes[members].sum(axis=0) <= (9, 3)).all()
    # First fit: a row is opened only where none of the open ones has room.
    for at, members in enumerate(rows[1:], 1):
        first = sizes[members[0]]
        for other in rows[max(at - opened, 0) : at]:
            full = (sizes[other].sum(axis=0) + first > (9, 3)).any()
            assert full or len(other) == most


def test_few_slots_stay_empty():
    rng = np.random.default_rng(0)
    text = np.clip(rng.lognormal(5, 0.7, 5000), 20, 1400).astype(int)
    sizes = np.stack([text, rng.integers(0, 2, 5000)], axis=1)
    rows = packing.pack(sizes, (1472, 16), 16, rng)
    assert text.sum() / len(rows) / 1472 > 0.95


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(40)))
def test_a_row_is_a_function_of_seed_and_position(order):
    """Whatever was asked before; an epoch's rows are as many as they are."""
    rng = np.random.default_rng(3)
    sizes = np.stack([rng.integers(1, 9, 20), rng.integers(0, 2, 20)], axis=1)
    arguments = sizes, (9, 3), 4, 7
    straight = packing.Rows(*arguments)
    rows = [straight(position) for position in range(40)]
    asked = packing.Rows(*arguments)
    assert [asked(position) for position in order] == [rows[p] for p in order]
    epochs, epoch = [], []
    for members in rows:
        epoch += members
        if len(epoch) == 20:
            assert sorted(epoch) == list(range(20))
            epochs.append(epoch)
            epoch = []
    assert len(epochs) >= 2
    assert epochs[0] != epochs[1]


@pytest.fixture
def make(dataset, tmp_path):
    """(mixture, config) of rows: every third without image, every fifth with two."""

    def opened(count, *, bad=(), **fields):
        rows = [row(i) for i in range(count)]
        for i, text in enumerate(rows):
            if i % 3 == 0:
                del text["image"]
                text["conversations"][0]["value"] = "What?" + " And?" * i
            elif i % 5 == 0:
                text["conversations"][0]["value"] = "See <image> and <image>."
                text["image"] = [f"{i}.png", f"{i - 1}.png"]
        for index in bad:
            rows[index]["image"] = "nothing.png"
        source = SourceConfig(path=str(dataset(rows)), images=str(tmp_path))
        fields = dict(batch_size=2, seed=5, pack=MOST) | fields
        config = DataConfig(sources=(source,), **fields)
        return open_sources(config), config

    return opened


@pytest.fixture(params=FORMS)
def wide(request, spec):
    """The spec of a row for several samples, for every form of images."""
    image, slots = FORMS[request.param]
    return dataclasses.replace(spec, image=image, slots=slots)


@pytest.fixture
def plain(spec):
    return dataclasses.replace(spec, slots=SLOTS)


def listed(batches, key="id") -> list[int]:
    """The numbers in the rows of batches, without the -1 of places that stay empty."""
    found = np.concatenate([batch[key] for batch in batches]).ravel()
    return found[found >= 0].tolist()


TEXT = ("tokens", "positions", "role", "turn", "loss_mask", "coords")
VISUAL = ("visual_positions", "visual_valid", "visual_coords")
IMAGE = ("images", "views", "grid", "visual_rows")


def test_a_row_holds_its_samples_and_nothing_else(make, wide):
    source, config = make(15)
    (batch,) = take(source, wide, config, 1)
    per_image = wide.slots.tokens_per_image
    slots = dataclasses.replace(wide.slots, prefix=0, suffix=wide.slots.text)
    alone = dataclasses.replace(wide, slots=slots)
    assert batch["id"].shape == batch["skipped"].shape == (2, MOST)
    for number in range(2):
        found = {key: x[number] for key, x in batch.items()}
        ids = found["id"][found["id"] >= 0]
        assert len(ids) > 1
        text = images = 0
        for segment, index in enumerate(ids):
            sole = alone.sample(source[index], index=index)
            length, count = sole["valid"].sum(), len(source[index].images)
            for keys, start, size in (
                (TEXT, text, length),
                (IMAGE, images, count),
                (VISUAL, images * per_image, count * per_image),
            ):
                for key in sole.keys() & keys:
                    part = found[key][start : start + size]
                    np.testing.assert_array_equal(part, sole[key][:size], key)
            assert (found["segment"][text : text + length] == segment).all()
            visual = slice(images * per_image, (images + count) * per_image)
            assert (found["visual_segment"][visual] == segment).all()
            text, images = text + length, images + count
        assert found["valid"].sum() == text
        assert not found["loss_mask"][text:].any()
        assert found["views"][:, 0].sum() == images
        assert not found["visual_valid"][images * per_image :].any()
        for key in sole.keys() - {"id", "skipped"}:
            assert found[key].shape == sole[key].shape, key
            assert found[key].dtype == sole[key].dtype, key


def test_an_epoch_holds_every_record_once(make, plain):
    source, config = make(15)
    batches = take(source, plain, config, 12)
    ids = listed(batches)
    for start in (0, 15, 30):
        assert sorted(ids[start : start + 15]) == list(range(15))
    assert ids[:15] != ids[15:30]


def test_neither_resuming_nor_workers_nor_processes_change_anything(make, plain):
    source, config = make(15, bad=[4])
    whole = take(source, plain, config, 8)
    for count in (1, 3, 6):  # in mid-epoch, and in the second one
        rest = take(source, plain, config, 8 - count, start=count)
        assert_same(rest, whole[count:])
    odd = take(source, plain, config, 8, own=[1])
    assert_same(odd, [{k: x[1:] for k, x in batch.items()} for batch in whole])
    spawned = dataclasses.replace(config, workers=2, threads=1, prefetch=1)
    batches = take(source, plain, spawned, 8)
    assert_same(batches, whole)


def test_bad_records_leave_their_slots_empty_and_are_named(dataset, tmp_path, plain):
    rows = [row(i) for i in range(16)]
    kinds = spoil(rows, tmp_path)
    rows[4]["conversations"][0]["value"] = "<image>\n" + "long " * 60
    path = SourceConfig(path=str(dataset(rows)), images=str(tmp_path))
    config = DataConfig((path,), batch_size=2, pack=MOST)
    source = open_sources(config)
    batches = take(source, plain, config, 3)
    good = [index for index in range(16) if index not in kinds]
    assert sorted(listed(batches)[: len(good)]) == good
    assert sorted(set(listed(batches, "skipped"))) == sorted(kinds)
    ledger = SkipLedger(len(kinds), source, plain)
    named = [entry for batch in batches for entry in ledger.observe(batch)]
    assert {index: reason.split(":")[0] for index, _, reason in named} == kinds


def test_a_record_longer_than_a_row_is_cut_or_left_out_as_without_packing(
    dataset, tmp_path, plain
):
    rows = [row(i) for i in range(3)]
    rows[1]["conversations"][1]["value"] = "long " * 60
    path = SourceConfig(path=str(dataset(rows)), images=str(tmp_path))
    config = DataConfig((path,), batch_size=1, pack=MOST)
    source = open_sources(config)
    batches = take(source, plain, config, 1)
    assert (sorted(listed(batches)), listed(batches, "skipped")) == ([0, 2], [1])
    cut = dataclasses.replace(plain, truncate=True)
    batches = take(source, cut, config, 2)
    assert sorted(listed(batches)) == [0, 1, 2]
    alone = next(batch for batch in batches if 1 in batch["id"])
    slots = dataclasses.replace(SLOTS, prefix=0, suffix=SLOTS.text)
    sole = dataclasses.replace(cut, slots=slots).sample(source[1], index=1)
    for key in ("tokens", "positions", "loss_mask", "images", "visual_valid"):
        np.testing.assert_array_equal(alone[key][0], sole[key])


def test_text_alone_needs_no_image_slots(make, plain):
    source, config = make(1)
    slots = dataclasses.replace(SLOTS, images=0)
    bare = dataclasses.replace(plain, image=ImageSpec(8), slots=slots)
    (batch,) = take(source, bare, config, 1)
    assert batch["images"].shape == (2, 0, 1, 8, 8, 3)
    assert batch["id"].tolist() == [[0, -1, -1, -1]] * 2


def test_what_cannot_be_packed(make, plain, dataset):
    with pytest.raises(ValueError, match=r"pack=4 with data.group='modality_length'"):
        make(15, group="modality_length")
    path = str(dataset([row(0)]))
    weighted = DataConfig(({"path": path, "weight": 1.0},), 1, pack=2)
    with pytest.raises(ValueError, match="pack with weights"):
        train_batches(open_sources(weighted), plain, weighted)
    bad = DataConfig(({"path": str(dataset([row(0, "?")] * 3))},), 1, pack=2)
    with pytest.raises(ValueError, match="no record is good"):
        train_batches(open_sources(bad), plain, bad)
