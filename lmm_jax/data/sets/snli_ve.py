"""SNLI-VE (Xie et al., arXiv:1901.06706): does a Flickr30k image entail a sentence?"""

from __future__ import annotations

from typing import Any

from lmm_jax.data.pairs import Pair, labelled
from lmm_jax.data.sources import JsonSource

CLASSES = ("contradiction", "neutral", "entailment")


class SnliVe(JsonSource):
    """`snli_ve_train.jsonl`, ...: one object per line. The text is the hypothesis alone."""

    def parse(self, row: dict[str, Any], index: int) -> Pair:
        return Pair(
            id=str(row.get("pairID", index)),
            images=(str(self.image_root / f"{row['Flickr30K_ID']}.jpg"),),
            text=row["sentence2"],
            target=labelled(row["gold_label"], CLASSES),
        )
