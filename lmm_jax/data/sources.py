"""Where records come from: JSON lists, JSON lines, TFDS folders, mixtures.

Sources are random access, so that the order of training is a function of (seed, epoch,
index) and nothing else. A source answers `len`, `[index]` and `name(index)`, pickles
small, and raises `BadRecord` for a record that cannot be used.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
import dataclasses
import json
from pathlib import Path
from typing import Any, Protocol

import grain
import numpy as np

from lmm_jax.data.rows import BadRecord, JsonRows


@dataclasses.dataclass(frozen=True)
class Record:
    """One conversation about zero or more images.

    Attributes:
        id: the data set's own name of the record.
        images: each a path or encoded bytes (PNG, JPEG, ...).
        turns: `{"from": "human" | "gpt", "value": str}`, `<image>` marking an image.
        meta: every other field of the record.
    """

    id: str
    images: tuple[str | bytes, ...]
    turns: tuple[dict[str, str], ...]
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)


class Source(Protocol):
    """Random access to records."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Any: ...
    def name(self, index: int) -> str: ...


class JsonSource(abc.ABC):
    """Records of a file of JSON objects, each on its own; see `JsonRows`.

    Args:
        path: a JSON list, or one JSON object per line.
        image_root: folder that the records' image paths are relative to.
    """

    def __init__(self, path: str | Path, image_root: str | Path = ""):
        self.rows, self.image_root = JsonRows(path), Path(image_root)

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return self.rows.name(index)

    def __getitem__(self, index: int) -> Any:
        return self.rows.read(index, lambda row: self.parse(row, index))

    @abc.abstractmethod
    def parse(self, row: Any, index: int) -> Any:
        """The record of an object; BadRecord, KeyError or TypeError where it is not one."""


class LlavaJson(JsonSource):
    """A LLaVA file."""

    def parse(self, row: Any, index: int) -> Record:
        return parse(row, index, self.image_root)


def parse(row: Any, index: int, image_root: Path) -> Record:
    """A LLaVA object as a `Record`; `index` names it where it has no id.

    Raises:
        BadRecord: a key is missing or has the wrong type.
    """
    if not isinstance(row, dict):
        raise BadRecord("malformed", f"a record is an object, not {row!r:.60}")
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise BadRecord("malformed", f"needs a list 'conversations', has {sorted(row)}")
    for turn in turns:
        values = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else ()
        if len(values) != 2 or not all(isinstance(value, str) for value in values):
            raise BadRecord(
                "malformed", f"a turn needs texts 'from' and 'value': {turn!r:.60}"
            )
    return Record(
        id=str(row.get("id", index)),
        images=image_paths(row.get("image"), image_root),
        turns=tuple({"from": turn["from"], "value": turn["value"]} for turn in turns),
        meta={key: row[key] for key in row.keys() - {"id", "conversations"}},
    )


def image_paths(value: Any, image_root: Path) -> tuple[str, ...]:
    """The `image` field (absent, one path or a list of paths) below `image_root`."""
    paths = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(path, str) and path for path in paths):
        raise BadRecord("malformed", f"'image' is a path or a list, not {value!r:.60}")
    return tuple(str(image_root / path) for path in paths)


class TfdsSource:
    """One split of a data set that `lmm_jax.data.build` wrote.

    Args:
        data_dir: folder of one version, the one with `dataset_info.json`.
        split: a TFDS split, slices included: "train", "train[:1%]".

    Raises:
        ValueError: the folder holds other features.
    """

    FEATURES = frozenset({"id", "images", "turns", "meta"})

    def __init__(self, data_dir: str | Path, split: str = "train"):
        import tensorflow_datasets as tfds

        self.path, self.split = Path(data_dir), split
        builder = tfds.builder_from_directory(str(data_dir))
        if set(builder.info.features) != self.FEATURES:
            raise ValueError(
                f"{data_dir} has features {sorted(builder.info.features)}, needs "
                f"{sorted(self.FEATURES)}; write it with python -m lmm_jax.data.build"
            )
        self._rows = builder.as_data_source(split)

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        return f"{self.path}:{self.split}[{index}]"

    def __getitem__(self, index: int) -> Record:
        row = self._rows[index]
        turns = zip(row["turns"]["from"], row["turns"]["value"])
        return Record(
            id=row["id"].decode(),
            images=tuple(row["images"]),
            turns=tuple({"from": f.decode(), "value": v.decode()} for f, v in turns),
            meta=json.loads(row["meta"]),
        )


class Mixture:
    """Several sources behind one global index: the records of the first, then ...

    Args:
        sources: what to mix.
        weights: share of each source in the stream, any positive scale. None shuffles
            all records together, each once an epoch.
    """

    def __init__(
        self, sources: Sequence[Source], weights: Sequence[float] | None = None
    ):
        for source in sources:
            if not len(source):
                raise ValueError("a source has no records; remove it from the mixture")
        if weights and (len(weights) != len(sources) or min(weights) <= 0):
            raise ValueError(
                f"weights {list(weights)} for {len(sources)} sources: give each a "
                "positive one, or none"
            )
        self.sources = tuple(sources)
        self.weights = tuple(weights) if weights else None
        self._starts = np.cumsum([0, *map(len, sources)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def locate(self, index: int) -> tuple[int, int]:
        """(number of the source, row in it) of a global index."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        source = int(np.searchsorted(self._starts, index, side="right")) - 1
        return source, index - int(self._starts[source])

    def __getitem__(self, index: int) -> Record:
        source, row = self.locate(index)
        return self.sources[source][row]

    def name(self, index: int) -> str:
        source, row = self.locate(index)
        return self.sources[source].name(row)

    def order(self, seed: int) -> grain.MapDataset:
        """The endless stream of global indices, shuffled anew each epoch.

        Element k is a pure function of (seed, k); with weights, every stretch of the
        stream holds the sources in their proportions.
        """
        if self.weights is None:
            return grain.MapDataset.range(len(self)).shuffle(seed).repeat()
        parts = [
            # An epoch adds 1 to the seed, so neighbours must be far apart.
            grain.MapDataset.range(start, stop).shuffle((seed + part * 999_983) % 2**32)
            for part, (start, stop) in enumerate(
                zip(self._starts[:-1].tolist(), self._starts[1:].tolist())
            )
        ]
        return grain.MapDataset.mix([part.repeat() for part in parts], self.weights)
