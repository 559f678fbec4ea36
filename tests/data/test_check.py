"""The report names every fault and the exit code says whether there was one."""

from __future__ import annotations

import json

import pytest

from lmm_jax.data import check
from tests.data.conftest import row


def test_a_good_file(dataset, tmp_path, capsys):
    text = row(3, "Hello")
    del text["image"]
    path = dataset(
        [row(0), row(1), {**row(2, "<image><image>"), "image": ["0.png"] * 2}, text]
    )
    assert check.main([str(path), f"--images={tmp_path}"]) == 0
    out = capsys.readouterr().out
    for line in ("samples 4", "images 4", "text only 1", "turns 8", "all good"):
        assert line in " ".join(out.split())


def test_how_full_rows_are(dataset, tmp_path, capsys):
    path = dataset([row(0), row(1), row(2), {**row(3), "image": ["0.png"] * 3}])
    arguments = [str(path), f"--images={tmp_path}", "--slots=100,2", "--pack=2"]
    check.main(arguments)
    out = " ".join(capsys.readouterr().out.split())
    tokens = int(out.split("median ")[1].split(",")[0])
    assert f"rows 3, packed 2 text slots used {tokens}.0%, packed {1.5 * tokens}" in out


def test_every_fault_is_counted_and_named(dataset, tmp_path, capsys):
    rows = [row(i) for i in range(8)]
    rows[0]["image"] = ["nothing.png", "never.png"]
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:60])
    del rows[2]["conversations"]
    rows[3]["conversations"][0]["value"] = "no marker"
    rows[4]["conversations"].pop()
    rows += [{**row(5), "image": "lost.png"} for _ in range(12)]
    assert check.main([str(dataset(rows, "train.jsonl")), f"--images={tmp_path}"]) == 1
    out = capsys.readouterr().out
    for line in (
        "missing image: 14",
        "and 4 more",
        "unreadable image: 1",
        "malformed: 2",
        "placeholders: 2",
        "train.jsonl[3]: 1 images, 0 markers",
        "19 faults",
    ):
        assert line in out


def test_pairs(tmp_path, dataset, capsys):
    dataset([])
    good = {"sentence2": "A cat.", "gold_label": "neutral"}
    rows = [{**good, "Flickr30K_ID": str(i)} for i in (1, 2, 99)]
    rows.append({**good, "gold_label": "-", "Flickr30K_ID": "1"})
    path = tmp_path / "snli_ve.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    for picture in tmp_path.glob("*.png"):
        picture.rename(picture.with_suffix(".jpg"))
    assert check.main([str(path), "--kind=snli_ve", f"--images={tmp_path}"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "samples 4 images 3" in out
    assert "text tokens median 8, 99 % 8, max 8" in out
    assert "malformed: 1" in out
    assert "missing image: 1" in out
    assert out.endswith("2 faults")


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no data file"):
        check.main([str(tmp_path / "nothing.json")])
