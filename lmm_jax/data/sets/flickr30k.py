"""Flickr30k in Karpathy's splits (arXiv:1412.2306): which caption is of which image?"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from lmm_jax.data.pairs import Pair
from lmm_jax.data.rows import JsonRows


@dataclasses.dataclass(frozen=True)
class Gallery:
    """All images and all captions of a split, to be scored each with each.

    Attributes:
        images: paths.
        captions: of all images, in their order.
        image_of: int [captions], the image that each belongs to.
    """

    images: tuple[str, ...]
    captions: tuple[str, ...]
    image_of: np.ndarray


class Flickr30k:
    """`dataset_flickr30k.json`: one record per caption of a split, images in order.

    Args:
        path: the file.
        images: folder of the photographs.
        split: "train", "val" or "test".

    Raises:
        FileNotFoundError: no such file.
        ValueError: a broken file, or no such split in it.
    """

    def __init__(self, path: str | Path, images: str | Path, split: str = "train"):
        self.images, found = Path(images), set()

        def note(row: dict[str, Any]) -> tuple[int] | None:
            found.add(row["split"])
            return (len(row["sentences"]),) if row["split"] == split else None

        self._rows = JsonRows(path, "images", note)
        if not len(self._rows):
            raise ValueError(
                f"{path} has no image of split {split!r}; choose from {sorted(found)}"
            )
        # Captions before each image, and all.
        self._starts = np.cumsum([0, *self._rows.notes[:, 0]])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def name(self, index: int) -> str:
        image, which = self._locate(index)
        return f"{self._rows.name(image)}[{which}]"

    def __getitem__(self, index: int) -> Pair:
        image, which = self._locate(index)
        first, end = self._starts[image : image + 2].tolist()

        def parse(row: dict[str, Any]) -> Pair:
            sentence = row["sentences"][which]
            return Pair(
                id=str(sentence["sentid"]),
                images=(self._path(row),),
                text=sentence["raw"],
                others=_Others(self, first, end),
            )

        return self._rows.read(image, parse)

    def caption(self, index: int) -> str:
        """The text of a record."""
        image, which = self._locate(index)
        return self._rows.read(image, lambda row: row["sentences"][which]["raw"])

    @property
    def gallery(self) -> Gallery:
        """What an evaluation ranks."""
        paths, captions = [], []
        for image in range(len(self._rows)):
            path, found = self._rows.read(image, self._all)
            paths.append(path)
            captions += found
        counts = self._rows.notes[:, 0]
        image_of = np.repeat(np.arange(len(paths)), counts)
        return Gallery(tuple(paths), tuple(captions), image_of)

    def _all(self, row: dict[str, Any]) -> tuple[str, list[str]]:
        return self._path(row), [sentence["raw"] for sentence in row["sentences"]]

    def _path(self, row: dict[str, Any]) -> str:
        return str(self.images / row["filename"])

    def _locate(self, index: int) -> tuple[int, int]:
        """(image, which of its captions) of a record."""
        image = int(np.searchsorted(self._starts, index, side="right")) - 1
        return image, index - int(self._starts[image])


@dataclasses.dataclass(frozen=True)
class _Others(Sequence[str]):
    """The captions of a source but those from `first` to `end`, read when asked for."""

    source: Flickr30k
    first: int
    end: int

    def __len__(self) -> int:
        return len(self.source) - (self.end - self.first)

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        behind = self.end - self.first if index >= self.first else 0
        return self.source.caption(index + behind)
