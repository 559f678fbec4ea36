"""Kinds of sources that a config may name, and what opens them."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses

from lmm_jax.data.sets.flickr30k import Flickr30k
from lmm_jax.data.sets.nlvr2 import Nlvr2
from lmm_jax.data.sets.snli_ve import SnliVe
from lmm_jax.data.sets.vqav2 import Vqav2
from lmm_jax.data.sources import LlavaJson, Source, TfdsSource
from lmm_jax.data.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One source of a mixture.

    Attributes:
        path: the file, or the folder of a TFDS version.
        kind: name in `CONVERSATIONS` or `PAIRS`.
        images: root of the image paths.
        split: of a TFDS folder or of Flickr30k.
        annotations: the second file of VQAv2, "" where answers are secret.
        answers: JSON file or hub folder with the classes of VQAv2; see `Vocabulary`.
        weight: share in the stream; give it to all sources or to none.
    """

    path: str
    kind: str = "llava"
    images: str = ""
    split: str = "train"
    annotations: str = ""
    answers: str = ""
    weight: float | None = None

    def __post_init__(self):
        known = (*CONVERSATIONS, *PAIRS)
        if self.kind not in known:
            raise ValueError(
                f"source kind {self.kind!r}; choose from {', '.join(known)}"
            )


def _vqav2(source: SourceConfig, train: bool) -> Vqav2:
    classes = Vocabulary.read(source.answers) if source.answers else None
    files = source.path, source.images, source.annotations
    return Vqav2(*files, classes, answerable=train)


# Kind of a source -> what opens it, for training or for evaluation.
Opener = Callable[[SourceConfig, bool], Source]
CONVERSATIONS: dict[str, Opener] = {
    "llava": lambda source, train: LlavaJson(source.path, source.images),
    "tfds": lambda source, train: TfdsSource(source.path, source.split),
}
PAIRS: dict[str, Opener] = {
    "vqav2": _vqav2,
    "nlvr2": lambda source, train: Nlvr2(source.path, source.images),
    "snli_ve": lambda source, train: SnliVe(source.path, source.images),
    "flickr30k": lambda source, train: Flickr30k(
        source.path, source.images, source.split
    ),
}


def open_source(source: SourceConfig, *, train: bool) -> Source:
    """One source.

    Args:
        train: without what cannot be learned; an evaluation counts that too.

    Raises:
        FileNotFoundError, ValueError: see the source of this kind.
    """
    return {**CONVERSATIONS, **PAIRS}[source.kind](source, train)
