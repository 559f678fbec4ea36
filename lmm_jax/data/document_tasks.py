"""Generated pages as VQAv2 and as NLVR2, file by file as those are published.

    python -m lmm_jax.data.document_tasks --out=DIR --train=N --validation=M --seed=S

`DIR/vqav2` holds pages with their questions, ten equal answers each, and `answers.json`,
their classes (see `lmm_jax.data.vocabulary`). `DIR/nlvr2` holds pairs of pages with
sentences about their titles, half of them true. `DIR/tokenizer` is a `vocab.txt` of all
their words. Pages are those of `lmm_jax.data.documents`; no contents are in both splits.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import io
import json
from pathlib import Path
import random
import re
from typing import Any

from lmm_jax.data import documents
from lmm_jax.data.documents import TITLES, Page
from lmm_jax.data.vocabulary import Vocabulary
from lmm_jax.eval import answers

VERSION = 1
# Large print and what is counted: few answers, so that a small classifier learns them.
CATEGORIES = ("read_large", "where_large", "count_large", "count_small")
SENTENCES = 2  # about a pair of pages
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # in BERT's order
_COCO = {"train": "train2014", "validation": "val2014"}
_NLVR2 = {"train": "train", "validation": "dev"}


def generate(
    directory: str | Path,
    *,
    train: int,
    validation: int,
    seed: int,
    size: int = documents.SIZE,
    categories: Sequence[str] = CATEGORIES,
) -> Path:
    """Writes both sets into a directory, or finds them complete and leaves them.

    Args:
        train, validation: pages of VQAv2, and pairs of pages of NLVR2, in each split.
        seed: what the sets are drawn from.
        size: side of the pages in pixels.
        categories: of questions; see `documents.questions`.

    Raises:
        ValueError: for impossible sizes, or when the directory holds others.
    """
    if min(train, validation) < 1 or size < documents.SIZE:
        raise ValueError(
            f"sets need pages in both splits, {documents.SIZE} pixels or more a side: "
            f"got train={train}, validation={validation}, size={size}"
        )
    counts = {"train": train, "validation": validation}
    wanted = {"version": VERSION, "seed": seed, "size": size, **counts}
    wanted["categories"] = list(categories)
    root = Path(directory)
    if documents.complete(root, wanted):
        return root
    texts = []
    for split, count in counts.items():
        rng = random.Random(f"{seed}/{split}")
        draw = _Draw(rng, held_out=split == "validation", size=size)
        texts += _write_vqav2(root / "vqav2", _COCO[split], count, draw, categories)
        texts += _write_nlvr2(root / "nlvr2", _NLVR2[split], count, draw)
    annotations = root / "vqav2" / f"v2_mscoco_{_COCO['train']}_annotations.json"
    Vocabulary.count([annotations], at_least=1).write(root / "vqav2" / "answers.json")
    words = sorted(set(re.findall(r"\w+|[^\w\s]", " ".join(texts).lower())))
    lines = [*SPECIAL, *words, ""]
    _write(root / "tokenizer" / "vocab.txt", "\n".join(lines).encode())
    # Written last: its presence says that everything above is complete.
    _write(root / documents.MANIFEST, json.dumps(wanted).encode())
    return root


def statement(left: Page, right: Page, rng: random.Random) -> tuple[str, bool]:
    """A sentence about two pages and whether it is true, which is as often as not."""
    wanted = rng.random() < 0.5
    while True:
        title = rng.choice((left.title, right.title, rng.choice(TITLES)))
        text, true = rng.choice(
            (
                (f"The left title is {title}.", title == left.title),
                (f"The right title is {title}.", title == right.title),
                (f"One of the titles is {title}.", title in (left.title, right.title)),
                ("Both titles are the same.", left.title == right.title),
            )
        )
        if true == wanted:
            return text, true


class _Draw:
    """Pages of one split, and images of them."""

    def __init__(self, rng: random.Random, *, held_out: bool, size: int):
        self.rng, self._held_out, self._size = rng, held_out, size

    def page(self, title: str = "") -> Page:
        """A page, of this title if there is one."""
        while True:
            page = documents.sample_page(self.rng, held_out=self._held_out)
            if page.title == title or not title:
                return page

    def save(self, page: Page, path: Path) -> None:
        buffer = io.BytesIO()
        image = documents.render(page, self.rng, self._size)
        # JPEG would blur small print, but for these settings; PNG ignores them.
        kind = "PNG" if path.suffix == ".png" else "JPEG"
        image.save(buffer, kind, quality=95, subsampling=0)
        _write(path, buffer.getvalue())


def _write_vqav2(
    root: Path, split: str, count: int, draw: _Draw, categories: Sequence[str]
) -> list[str]:
    """One split; returns its questions."""
    asked, annotated = [], []
    for image in range(count):
        page = draw.page()
        draw.save(page, root / split / f"COCO_{split}_{image:012d}.jpg")
        chosen = [q for q in documents.questions(page) if q[0] in categories]
        for number, (category, question, answer) in enumerate(chosen):
            ids = {"image_id": image, "question_id": 1000 * image + number}
            # As people answered VQAv2, lower case and without punctuation.
            answer = answers.official(answer)
            given = {"answer": answer, "answer_confidence": "yes"}
            asked.append({**ids, "question": question})
            annotated.append(
                {
                    **ids,
                    "question_type": category,
                    "answer_type": "number" if answer.isdigit() else "other",
                    "multiple_choice_answer": answer,
                    "answers": [{**given, "answer_id": i + 1} for i in range(10)],
                }
            )
    header = {"data_type": "mscoco", "data_subtype": split}
    for name, key, rows in (
        (f"v2_OpenEnded_mscoco_{split}_questions", "questions", asked),
        (f"v2_mscoco_{split}_annotations", "annotations", annotated),
    ):
        text = json.dumps({"info": {}, **header, key: rows})
        _write(root / f"{name}.json", text.encode())
    return [row["question"] for row in asked]


def _write_nlvr2(root: Path, split: str, count: int, draw: _Draw) -> list[str]:
    """One split; returns its sentences."""
    rows: list[dict[str, Any]] = []
    for pair in range(count):
        left = draw.page()
        # As often as not the titles are the same, or "Both ..." were always false.
        right = draw.page(left.title if draw.rng.random() < 0.5 else "")
        name = f"{split}-{pair}-0"
        for side, page in enumerate((left, right)):
            draw.save(page, root / "images" / split / f"{name}-img{side}.png")
        for number in range(SENTENCES):
            sentence, true = statement(left, right, draw.rng)
            row = {"identifier": f"{name}-{number}", "sentence": sentence}
            rows.append({**row, "label": str(true)})
    lines = [*map(json.dumps, rows), ""]
    _write(root / f"{split}.json", "\n".join(lines).encode())
    return [row["sentence"] for row in rows]


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    documents.write(path, content)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument("--train", type=int, default=4000, help="training pages")
    parser.add_argument("--validation", type=int, default=400, help="validation pages")
    parser.add_argument("--seed", type=int, default=0, help="what is drawn from")
    parser.add_argument(
        "--size", type=int, default=documents.SIZE, help="pixels a side"
    )
    options = vars(parser.parse_args(arguments))
    print(generate(options.pop("out"), **options))


if __name__ == "__main__":
    main()
