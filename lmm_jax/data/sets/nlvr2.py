"""NLVR2 (Suhr et al., arXiv:1811.00491): is a sentence true of two photographs?"""

from __future__ import annotations

from typing import Any

from lmm_jax.data.pairs import Pair, labelled
from lmm_jax.data.sources import JsonSource

CLASSES = ("False", "True")


class Nlvr2(JsonSource):
    """`train.json`, `dev.json`, ...: one object per line. Images lie in the root, those of
    train in the folder that their record names. Secret labels leave no target."""

    def parse(self, row: dict[str, Any], index: int) -> Pair:
        both = row["identifier"].rpartition("-")[0]
        folder = self.image_root / str(row.get("directory", ""))
        secret = "label" not in row
        return Pair(
            id=row["identifier"],
            images=tuple(str(folder / f"{both}-img{i}.png") for i in range(2)),
            text=row["sentence"],
            target={} if secret else labelled(str(row["label"]), CLASSES),
        )
