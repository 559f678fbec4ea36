"""Order, resuming and bad records, end to end on sixteen tiny images."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys

import numpy as np
import pytest

from lmm_jax.data.conversation import find_template
from lmm_jax.data.images import ImageSpec
from lmm_jax.data.pipeline import (
    DataConfig,
    SkipLedger,
    SourceConfig,
    TooManyBadRecords,
    explain,
    open_sources,
    train_batches,
)
from tests.data.conftest import row

CONTRACT = {  # per sample: I, C, T and V of the `spec` fixture
    "images": ((1, 5, 8, 8, 3), np.uint8),
    "views": ((1, 5), bool),
    "grid": ((1, 2), np.int32),
    "tokens": ((96,), np.int32),
    "positions": ((96,), np.int32),
    "valid": ((96,), bool),
    "segment": ((96,), np.int32),
    "role": ((96,), np.int8),
    "turn": ((96,), np.int32),
    "loss_mask": ((96,), np.float32),
    "visual_positions": ((4,), np.int32),
    "visual_valid": ((4,), bool),
    "visual_segment": ((4,), np.int32),
    "id": ((), np.int64),
    "skipped": ((), np.int64),
}


@pytest.fixture
def make(dataset, tmp_path):
    """(mixture, config) of some rows."""

    def opened(rows, **fields):
        source = SourceConfig(path=str(dataset(rows)), images=str(tmp_path))
        config = DataConfig(sources=(source,), batch_size=4, seed=5, **fields)
        return open_sources(config), config

    return opened


def take(source, spec, config, count, start=0, own=None):
    """So many batches."""
    stream = train_batches(source, spec, config, start=start, own=own)
    batches = list(itertools.islice(stream, count))
    stream.close()
    return batches


def assert_same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def test_the_batch_contract(make, spec):
    source, config = make([row(i) for i in range(15)])
    (batch,) = take(source, spec, config, 1)
    found = {key: (value.shape[1:], value.dtype) for key, value in batch.items()}
    assert found == {key: (shape, np.dtype(d)) for key, (shape, d) in CONTRACT.items()}
    for text, index in zip(batch["tokens"], batch["id"]):
        learned = spec.tokenizer.decode(text[batch["loss_mask"][0] > 0])
        assert str(index) in learned
    assert (batch["views"].sum(-1) == 1 + batch["grid"].prod(-1)).all()
    assert (batch["skipped"] == -1).all()


def test_an_epoch_holds_every_record_once(make, spec):
    source, config = make([row(i) for i in range(16)])
    batches = take(source, spec, config, 8)
    ids = np.concatenate([batch["id"] for batch in batches]).tolist()
    assert sorted(ids[:16]) == sorted(ids[16:]) == list(range(16))
    assert ids[:16] != ids[16:]


def test_resuming_in_mid_epoch_changes_nothing(make, spec):
    source, config = make([row(i) for i in range(15)])
    whole = take(source, spec, config, 7)
    rest = take(source, spec, config, 4, start=3)
    assert_same(rest, whole[3:])


def test_processes_together_see_the_batch_of_one(make, spec):
    source, config = make([row(i) for i in range(15)])
    whole = take(source, spec, config, 5)
    for rows in ([0, 1], [2, 3], [1, 3], [2]):
        parts = take(source, spec, config, 5, own=rows)
        assert_same(parts, [{k: x[rows] for k, x in b.items()} for b in whole])


def test_going_on_with_other_processes_misses_and_repeats_nothing(make, spec):
    source, config = make([row(i) for i in range(15)])
    seen = []
    for start, count in ((0, 1), (1, 4), (3, 2)):  # of batches, of processes
        stop = min(start + 2, 4) if start else 1
        for own in np.split(np.arange(4), count):
            batches = take(source, spec, config, stop - start, start, own.tolist())
            seen += np.concatenate([batch["id"] for batch in batches]).tolist()
    whole = np.concatenate([b["id"] for b in take(source, spec, config, 4)])
    assert sorted(seen) == sorted(whole.tolist())


def test_workers_change_nothing(make, spec):
    rows = [row(i) for i in range(15)]
    rows[6]["image"] = "nothing.png"
    source, config = make(rows)
    whole = take(source, spec, config, 6)
    spawned = dataclasses.replace(config, workers=2, threads=1, prefetch=1)
    assert_same(take(source, spec, spawned, 3, start=2), whole[2:5])


def spoil(rows, tmp_path):
    """One record of every fault; returns {index: kind}."""
    rows[1]["image"] = "nothing.png"
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:60])
    del rows[3]["conversations"]
    rows[4]["conversations"][0]["value"] = "<image>\n" + "long " * 30
    rows[5]["conversations"][0]["value"] = "no marker"
    rows[6]["conversations"] = rows[6]["conversations"][:1]
    return {
        1: "missing image",
        2: "unreadable image",
        3: "malformed",
        4: "too long",
        5: "placeholders",
        6: "malformed",
    }


def test_bad_records_are_replaced_and_reported(make, spec, tmp_path):
    rows = [row(i) for i in range(16)]
    kinds = spoil(rows, tmp_path)
    source, config = make(rows)
    batches = take(source, spec, config, 4)
    ids = np.concatenate([batch["id"] for batch in batches])
    skipped = np.concatenate([batch["skipped"] for batch in batches])
    order = [int(source.order(config.seed)[i]) for i in range(32)]
    for position, (found, bad) in enumerate(zip(ids, skipped)):
        good = next(i for i in order[position:] if i not in kinds)
        assert found == good
        assert bad == (order[position] if order[position] in kinds else -1)
    for index in range(16):
        reason = explain(source, index, spec)
        assert reason.startswith(kinds[index]) if index in kinds else reason == ""


def test_the_ledger_names_each_once_and_stops(make, spec, tmp_path):
    rows = [row(i) for i in range(16)]
    kinds = spoil(rows, tmp_path)
    source, config = make(rows)
    batches = take(source, spec, config, 8)
    ledger = SkipLedger(len(kinds), source, spec)
    new = [entry for batch in batches for entry in ledger.observe(batch)]
    assert sorted(index for index, _, _ in new) == sorted(kinds)
    assert all(name.endswith(f"[{index}]") for index, name, _ in new)
    strict = SkipLedger(2, source, spec)
    with pytest.raises(
        TooManyBadRecords, match=r"2 allowed \(max_skipped\)[^$]*\[1\]: "
    ):
        for batch in batches:
            strict.observe(batch)


def test_nothing_good_is_an_error(make, spec):
    rows = [row(i, "no marker") for i in range(8)]
    source, config = make(rows)
    with pytest.raises(
        ValueError, match=r"100 bad records in a row.*lmm_jax.data.check"
    ):
        take(source, spec, config, 1)


def test_truncation_that_leaves_no_answer(make, spec):
    source, _ = make([row(0, "<image>\n" + "long " * 30), row(1)])
    short = dataclasses.replace(spec, truncate=True)
    assert explain(source, 0, short).startswith("unsupervised")
    assert explain(source, 1, short) == ""


def test_text_only_and_several_images(make, spec, tmp_path):
    text, two = row(0, "Hello"), row(1, "<image><image> Which?")
    del text["image"]
    two["image"] = ["1.png", "2.png"]
    source, _ = make([text, two])
    found = spec.sample(source[0], index=0)
    assert not found["visual_valid"].any()
    assert not found["views"].any()
    assert explain(source, 1, spec).startswith("too many images")
    slots = dataclasses.replace(spec.slots, images=2)
    found = dataclasses.replace(spec, slots=slots).sample(source[1], index=1)
    assert found["images"].shape[:2] == (2, 5)
    assert found["visual_valid"].all()
    assert found["visual_positions"].tolist() == list(range(7, 15))


def test_no_image_slots_at_all(make, spec):
    text = row(0, "Hello")
    del text["image"]
    slots = dataclasses.replace(spec.slots, images=0, prefix=0)
    plain = dataclasses.replace(spec, slots=slots, image=ImageSpec(8))
    source, config = make([text] * 4)
    (batch,) = take(source, plain, config, 1)
    assert batch["images"].shape == (4, 0, 1, 8, 8, 3)


def test_the_template_must_fit(spec):
    with pytest.raises(ValueError, match="family"):
        dataclasses.replace(spec, template=find_template("bunny"))


def test_sources_of_a_config(dataset):
    path = str(dataset([row(0)]))
    mixture = open_sources(DataConfig(({"path": path}, SourceConfig(path)), 2))
    assert (len(mixture), mixture.weights) == (2, None)
    with pytest.raises(ValueError, match="kind 'csv'"):
        SourceConfig(path, kind="csv")
    with pytest.raises(TypeError, match="wieght"):
        DataConfig(({"path": path, "wieght": 1.0},), 2)
    with pytest.raises(ValueError, match="positive"):
        open_sources(DataConfig(({"path": path, "weight": 1.0}, {"path": path}), 2))


def test_heavy_libraries_stay_out():
    code = (
        "import sys, lmm_jax.data.pipeline, lmm_jax.data.check\n"
        "heavy = {'tensorflow', 'torch', 'tensorflow_datasets', 'sentencepiece'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
