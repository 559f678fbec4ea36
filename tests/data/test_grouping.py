"""Batches of one modality: properties of the order, and what moves it."""

from __future__ import annotations

import itertools

from hypothesis import assume, given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from lmm_jax.data import grouping
from lmm_jax.data.grouping import epoch_order
from lmm_jax.data.pipeline import DataConfig, SourceConfig, open_sources, train_batches
from tests.data.conftest import row
from tests.data.test_pipeline import assert_same, take


@settings(deadline=None)
@given(
    images=st.integers(0, 40),
    texts=st.integers(0, 40),
    parts=st.integers(1, 3),
    share=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_an_epoch(images, texts, parts, share, seed):
    rng, size = np.random.default_rng(seed), parts * share
    assume(images + texts >= size)
    lengths = rng.permutation([*range(1, images + 1), *range(-texts, 0)])
    order = epoch_order(lengths, size, parts, np.random.default_rng(seed))
    again = epoch_order(lengths, size, parts, np.random.default_rng(seed))
    np.testing.assert_array_equal(order, again)
    assert len(order) == (images + texts) // size * size
    assert len(set(order.tolist())) == len(order)
    batches = order.reshape(-1, size)
    pure = [abs(np.sign(lengths[batch]).sum()) == size for batch in batches]
    whole = images // size + texts // size
    assert all(pure[:whole])
    assert len(batches) - whole <= 1, "mixed ones stand at the end"


def test_which_records_meet_changes_with_the_seed_and_not_with_their_lengths():
    lengths = np.arange(1, 65)
    first, second = (
        [set(b) for b in epoch_order(lengths, 8, 2, rng).reshape(-1, 8).tolist()]
        for rng in map(np.random.default_rng, (0, 1))
    )
    assert not any(batch in second for batch in first)
    spreads = [max(batch) - min(batch) for batch in first]
    assert np.mean(spreads) > 30, "long and short ones meet"


def test_parts_of_a_batch_are_equally_long():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 1000, 640)
    dealt = np.abs(lengths[epoch_order(lengths, 64, 8, rng)]).reshape(-1, 8, 8)
    drawn = lengths.reshape(-1, 8, 8)
    spread = [np.ptp(x.sum(axis=2), axis=1).mean() for x in (dealt, drawn)]
    assert spread[0] < 0.2 * spread[1]


def test_dealing_is_that_of_the_reference():
    """Longest first, each to the shortest part that has room."""
    lengths = np.array([9, 8, 7, 3, 2, 1])
    dealt = grouping._dealt(np.arange(6), lengths, 2)
    assert lengths[dealt].tolist() == [9, 3, 2, 8, 7, 1]


@pytest.fixture
def make(dataset, tmp_path):
    def opened(count, *, bad=(), **fields):
        rows = [row(i) for i in range(count)]
        for text in rows[::3]:
            del text["image"]
            text["conversations"][0]["value"] = f"What {'else ' * len(text['id'])}?"
        for index in bad:
            rows[index]["image"] = "nothing.png"
        source = SourceConfig(path=str(dataset(rows)), images=str(tmp_path))
        fields = dict(batch_size=4, seed=5, group="modality_length", parts=2) | fields
        config = DataConfig(sources=(source,), **fields)
        return open_sources(config), config

    return opened


def test_batches_resume_and_do_not_depend_on_workers_or_processes(make, spec):
    source, config = make(15, bad=[4])
    whole = take(source, spec, config, 8)  # two epochs and more
    rest = take(source, spec, config, 3, start=5)
    assert_same(rest, whole[5:])
    odd = take(source, spec, config, 8, own=[1, 3])
    assert_same(odd, [{k: x[[1, 3]] for k, x in batch.items()} for batch in whole])
    spawned = DataConfig(**{**vars(config), "workers": 2, "threads": 1, "prefetch": 1})
    batches = take(source, spec, spawned, 8)
    assert_same(batches, whole)


def test_batches_hold_one_modality(make, spec):
    source, config = make(16)
    stream = train_batches(source, spec, config)
    pure = [len(set(b["id"] % 3 == 0)) == 1 for b in itertools.islice(stream, 8)]
    # 6 texts and 10 with images: one batch of an epoch's four is mixed.
    assert pure == [True, True, True, False] * 2


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (dict(batch_size=16), "a batch of 16 needs as many records, and there are 15"),
        (dict(parts=3), "parts=3"),
    ],
)
def test_what_cannot_be_grouped(make, spec, fields, says):
    source, config = make(15, **fields)
    with pytest.raises(ValueError, match=says):
        train_batches(source, spec, config)
