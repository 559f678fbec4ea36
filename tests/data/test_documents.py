"""Generated documents: what is drawn is what is asked, once, anywhere."""

from __future__ import annotations

import hashlib
import json
import pathlib
import random
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

from lmm_jax.data import documents


def _digest(root: pathlib.Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("documents") / "set"
    return documents.generate(directory, train=40, validation=12, seed=3, workers=1)


@pytest.fixture(scope="module")
def pages() -> list[documents.Page]:
    rng = random.Random(0)
    return [documents.sample_page(rng, held_out=False) for _ in range(300)]


def test_same_seed_same_bytes_whatever_the_workers(
    root: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "_WORTH_WORKERS", 8)
    again = documents.generate(tmp_path, train=40, validation=12, seed=3, workers=2)
    assert _digest(again) == _digest(root)
    other = documents.generate(
        tmp_path / "other", train=40, validation=12, seed=4, workers=1
    )
    assert (other / "train.json").read_bytes() != (root / "train.json").read_bytes()


def test_splits_share_no_contents() -> None:
    def drawn(split: str) -> set[documents.Page]:
        return {
            documents.sample_page(
                random.Random(f"0/{split}/{index}"), held_out=split == "validation"
            )
            for index in range(2000)
        }

    train, validation = drawn("train"), drawn("validation")
    assert not train & validation
    assert len(train) > 1900
    assert all(page.held_out for page in validation)


def test_conversations_are_in_llava_format(root: pathlib.Path) -> None:
    for split, count in (("train", 40), ("validation", 12)):
        records = json.loads((root / f"{split}.json").read_text())
        assert len({record["id"] for record in records}) == count
        for record in records:
            assert set(record) == {"id", "image", "conversations"}
            with Image.open(root / record["image"]) as image:
                assert (image.format, image.mode, image.size) == (
                    "PNG",
                    "RGB",
                    (documents.SIZE, documents.SIZE),
                )
            turns = record["conversations"]
            roles = [turn["from"] for turn in turns]
            assert roles == ["human", "gpt"] * (len(turns) // 2)
            assert len(turns) in (2, 4, 6)
            assert turns[0]["value"].startswith("<image>\n")
            assert sum("<image>" in turn["value"] for turn in turns) == 1


def test_questions_are_about_validation_pages(root: pathlib.Path) -> None:
    lines = (root / "questions.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    known = {r["image"] for r in json.loads((root / "validation.json").read_text())}
    assert {record["image"] for record in records} == known
    assert len({record["question_id"] for record in records}) == len(records)
    categories = documents.HIRES_CATEGORIES + documents.LOWRES_CATEGORIES
    assert {record["category"] for record in records} == set(categories)
    assert all(len(record["answers"]) == 1 for record in records)


def test_answers_say_what_the_page_says(pages: list[documents.Page]) -> None:
    for page in pages:
        told = {question: answer for _, question, answer in documents.questions(page)}
        assert told["What is the title?"] == page.title
        part = "bar" if page.kind == "plot" else "line"
        assert told[f"How many {part}s?"] == str(len(page.rows))
        for place, (key, value) in enumerate(page.rows, start=1):
            assert told[f"What is the word of {part} {place}?"] == key
            if page.kind != "plot":
                assert told[f"What is the number of line {place}?"] == value
                assert told[f"Read line {place}."] == f"{key} {value}"
            assert key in told["Read all."]
        if page.kind == "sign":
            assert told["Where is the mark?"] == page.corner


def test_a_page_is_transcribed_or_asked(pages: list[documents.Page]) -> None:
    """Never both: answers could be copied from a transcript."""
    transcribed = 0
    for number, page in enumerate(pages):
        turns = documents.conversation(page, random.Random(number))
        assert set(turns) <= set(documents.questions(page))
        asked = [question for _, question, _ in turns]
        if "Read all." in asked:
            transcribed += 1
            assert len(turns) == 1
        else:
            assert len(set(turns)) == len(turns) == documents.TURNS
    assert 0.3 < transcribed / len(pages) < 0.7


def _ink(page: documents.Page) -> np.ndarray:
    """The page as numbers, drawn with the same accidents whatever it says."""
    return np.asarray(documents.render(page, random.Random(5)).convert("L"), float)


def test_a_value_is_drawn_where_its_line_is() -> None:
    rows = (("kg", "11"), ("lb", "22"), ("cm", "33"))
    changed = (rows[0], ("lb", "88"), rows[2])
    for kind in ("receipt", "form"):
        before = _ink(documents.Page(kind, "SALE", rows))
        after = _ink(documents.Page(kind, "SALE", changed))
        y, x = np.nonzero(np.abs(before - after) > 40)
        assert len(y) > 4
        assert y.max() - y.min() < 8, "one line changes"
        assert x.max() - x.min() < 12, "and its value alone"


def test_small_print_vanishes_and_large_print_stays_when_shrunk() -> None:
    def contrast(page: documents.Page, other: documents.Page, size: int) -> float:
        images = [
            documents.render(each, random.Random(5)).convert("L").resize((size, size))
            for each in (page, other)
        ]
        first, second = (np.asarray(image, float) for image in images)
        return float(np.abs(first - second).max())

    page = documents.Page("receipt", "SALE", (("kg", "33"),))
    small = documents.Page("receipt", "SALE", (("kg", "88"),))
    large = documents.Page("receipt", "STOP", (("kg", "33"),))
    assert contrast(page, small, 32) < 0.1 * contrast(page, small, 64)
    assert contrast(page, large, 32) > 0.75 * contrast(page, large, 64)


def test_a_complete_set_is_reused(tmp_path: pathlib.Path) -> None:
    wanted = {"train": 2, "validation": 2, "seed": 0}
    documents.generate(tmp_path, **wanted)
    kept = (tmp_path / "train.json").stat().st_mtime_ns
    documents.generate(tmp_path, **wanted)
    assert (tmp_path / "train.json").stat().st_mtime_ns == kept
    with pytest.raises(ValueError, match="holds the set"):
        documents.generate(tmp_path, train=3, validation=2, seed=0)


def test_an_interrupted_set_is_finished(tmp_path: pathlib.Path) -> None:
    wanted = {"train": 2, "validation": 2, "seed": 0}
    documents.generate(tmp_path, **wanted)
    complete = _digest(tmp_path)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "train.json").write_text("[")
    documents.generate(tmp_path, **wanted)
    assert _digest(tmp_path) == complete


def test_unwritable_directory_is_named(tmp_path: pathlib.Path) -> None:
    # A file in the way stops the superuser too, whom permissions do not.
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OSError, match=r"cannot write documents to .*file"):
        documents.generate(blocked / "set", train=1, validation=1, seed=0)


@pytest.mark.parametrize("wrong", [{"train": 0}, {"validation": 0}, {"size": 32}])
def test_impossible_sets_are_refused(
    tmp_path: pathlib.Path, wrong: dict[str, int]
) -> None:
    with pytest.raises(ValueError, match="pages in both splits"):
        documents.generate(
            tmp_path, **{"train": 1, "validation": 1, "seed": 0, **wrong}
        )


def test_larger_pages_are_drawn_larger() -> None:
    page = documents.Page("form", "SALE", (("kg", "47"),))
    assert documents.render(page, random.Random(0), 128).size == (128, 128)


def test_command_line(tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "-m", "lmm_jax.data.documents", f"--out={tmp_path}"]
    done = subprocess.run(
        [*command, "--train=2", "--validation=1", "--seed=7"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(tmp_path) in done.stdout
    assert len(json.loads((tmp_path / "train.json").read_text())) == 2
