"""Official files in little, with the images they name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image
import pytest

ANSWERS = [  # of ten people to each question
    ["net"] * 4 + ["mesh"] * 3 + ["Net"] * 2 + ["web"],
    ["pitcher"] * 9 + ["catcher"],
    ["yes"] * 2 + ["no"] * 1 + ["maybe"] * 7,
]


def picture(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((6, 9, 3), shade, np.uint8)).save(path)


@pytest.fixture
def vqa(tmp_path) -> Path:
    """Questions 10, 11, 12 about image 7, annotations in another order."""
    header = {"info": {"version": "2.0"}, "data_subtype": "train2014"}
    questions = [
        {"image_id": 7, "question": f"What {i}?", "question_id": 10 + i}
        for i in range(3)
    ]
    annotations = [
        {
            "image_id": 7,
            "question_id": 10 + i,
            "multiple_choice_answer": max(set(given), key=given.count),
            "answers": [{"answer": a, "answer_id": n} for n, a in enumerate(given, 1)],
        }
        for i, given in enumerate(ANSWERS)
    ]
    whole = {**header, "questions": questions}
    (tmp_path / "questions.json").write_text(json.dumps(whole))
    whole = {**header, "annotations": annotations[::-1], "license": {}}
    (tmp_path / "annotations.json").write_text(json.dumps(whole, indent=1))
    picture(tmp_path / "images" / "COCO_train2014_000000000007.jpg", 7)
    return tmp_path


@pytest.fixture
def flickr(tmp_path) -> Path:
    """Images of two, three and one caption in train, one of test between them."""
    rows, number = [], 0
    for image, (split, count) in enumerate(
        [("train", 2), ("test", 1), ("train", 3), ("train", 1)]
    ):
        sentences = [
            {"raw": f"Caption {number + i}.", "sentid": number + i, "tokens": []}
            for i in range(count)
        ]
        number += count
        name = f"{image}.jpg"
        rows.append({"filename": name, "split": split, "sentences": sentences})
        picture(tmp_path / name, image)
    path = tmp_path / "dataset_flickr30k.json"
    path.write_text(json.dumps({"images": rows, "dataset": "flickr30k"}))
    return path
