"""LLaVA file -> ArrayRecord -> the same records, bytes untouched."""

from __future__ import annotations

from pathlib import Path
import pickle
import sys

import pytest

from lmm_jax.data import build
from lmm_jax.data.pipeline import DataConfig, SourceConfig, open_sources, train_batches
from lmm_jax.data.sources import BadRecord, LlavaJson, TfdsSource
from tests.data.conftest import row


def test_round_trip(dataset, tmp_path, spec):
    rows = [row(i) for i in range(12)]
    rows[3]["image"] = ["3.png", "4.png"]
    rows[5]["conversations"][1]["value"] = "naïve ☃"
    rows[6]["category"] = "animals"
    del rows[7]["image"]
    path, out = dataset(rows), tmp_path / "records"
    build.main([f"--json={path}", f"--images={tmp_path}", f"--out={out}"])
    (folder,) = out.glob("*/1.0.0")
    loose, packed = LlavaJson(path, tmp_path), TfdsSource(folder)
    assert len(packed) == len(loose)
    for index in range(len(loose)):
        wanted, found = loose[index], pickle.loads(pickle.dumps(packed))[index]
        assert (found.id, found.turns, found.meta) == (
            wanted.id,
            wanted.turns,
            wanted.meta,
        )
        contents = tuple(Path(image).read_bytes() for image in wanted.images)
        assert found.images == contents
    assert len(TfdsSource(folder, "train[:25%]")) == 3
    assert "tensorflow" not in sys.modules
    config = DataConfig((SourceConfig(str(folder), kind="tfds"),), batch_size=2)
    batch = next(train_batches(open_sources(config), spec, config))
    assert batch["images"].any()


def test_a_missing_image_stops_the_build(dataset, tmp_path):
    source = LlavaJson(dataset([row(0), {**row(1), "image": "nothing.png"}]), tmp_path)
    with pytest.raises(BadRecord, match=r"train\.json\[1\].*nothing\.png.*data\.check"):
        build.build(source, tmp_path / "records")
