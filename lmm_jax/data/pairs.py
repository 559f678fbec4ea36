"""Images with a text, and what an encoder shall say of them: records and samples.

The batch contract of encoders, per sample: I images, T text tokens, P candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np
from PIL.Image import Image

from lmm_jax.data import images
from lmm_jax.data.augment import RandAugment
from lmm_jax.data.images import ImageSpec
from lmm_jax.data.placement import numbers
from lmm_jax.data.rows import BadRecord
from lmm_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Pair:
    """One example.

    Attributes:
        id: the data set's own name of it.
        images: each a path or encoded bytes.
        text: question, statement or caption.
        target: what is to be learned, by its name in a batch: `labels` float32 [classes],
            how right each is, or `label` int32 []. Empty where it is secret, or where the
            text itself is what is right.
        answers: the annotators' words, where there are any.
        others: texts that do not belong to the images.
    """

    id: str
    images: tuple[str | bytes, ...]
    text: str
    target: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    answers: tuple[str, ...] = ()
    others: Sequence[str] = ()


def labelled(label: str, classes: Sequence[str]) -> dict[str, np.ndarray]:
    """The target of one class.

    Raises:
        BadRecord: "malformed", a label that is none of the classes.
    """
    if label not in classes:
        raise BadRecord("malformed", f"label {label!r} is none of {', '.join(classes)}")
    return {"label": np.int32(classes.index(label))}


@dataclasses.dataclass(frozen=True)
class PairSpec:
    """How a pair becomes a sample.

    Attributes:
        image: one view of each.
        length: T. Longer texts are cut, but for the token behind them.
        tokenizer: with tokens before and after a text.
        images: I, images of every pair.
        negatives: P - 1, texts of other images beside the right one; 0 for no choice.
        augment: of images in training; None leaves them as they are.
        seed: of what is drawn.

    Raises:
        ValueError: fields that do not go together.
    """

    image: ImageSpec
    length: int
    tokenizer: Tokenizer
    images: int = 1
    negatives: int = 0
    augment: RandAugment | None = None
    seed: int = 0

    def __post_init__(self):
        if self.image.views != 1 or self.image.native:
            raise ValueError(
                f"image.mode={self.image.mode!r} with {self.image.views} views: an "
                "encoder's image is one view; use mode='stretch' without crops"
            )
        if self.tokenizer.bos is None or self.length < 3:
            raise ValueError(
                f"{self.length} text tokens with {self.tokenizer.bos!r} before and "
                f"{self.tokenizer.eos!r} after them: both are needed, and room for more"
            )

    def sample(self, record: Pair, *, index: int, position: int = 0) -> dict[str, Any]:
        """What is learned from a pair, without the batch axis.

        Args:
            index: stored as `id`.
            position: in the stream; augmentation and negatives are a function of
                (seed, position), so they differ from epoch to epoch.

        Returns:
            The arrays of `prompt`. With negatives, tokens and valid are [P, T], and the
            right text comes first.

        Raises:
            BadRecord: "unsupervised", an image that cannot be read, or as `prompt`.
            ValueError: fewer other texts than negatives.
        """
        if not record.target and not self.negatives:
            raise BadRecord(
                "unsupervised", f"pair {record.id!r} has nothing that could be learned"
            )
        rng = np.random.default_rng((self.seed, position))
        opened = [images.load(image) for image in record.images]
        if self.augment:
            opened = [self.augment(image, rng) for image in opened]
        found = self._arrays(record, opened, index)
        return {**found, **self.read([record.text, *self._drawn(record, rng)])}

    def prompt(self, record: Pair, *, index: int) -> dict[str, Any]:
        """A pair as it is, without the batch axis.

        Returns:
            The arrays of `look` and of `read`, those of the record's target, and id and
            skipped; see `SampleSpec.sample`.

        Raises:
            BadRecord: an image that cannot be read, or as `look`.
        """
        opened = [images.load(image) for image in record.images]
        return {**self._arrays(record, opened, index), **self.read([record.text])}

    def look(self, opened: Sequence[Image]) -> dict[str, np.ndarray]:
        """The images of one pair.

        Returns:
            images uint8 [I, *view]. Of images that keep their shape on a canvas also grid
            int32 [I, 2], columns and rows of patches.

        Raises:
            BadRecord: "images", another number than I.
        """
        if len(opened) != self.images:
            raise BadRecord(
                "images", f"{len(opened)} images for a model of {self.images} a text"
            )
        seen = [images.views(image, self.image) for image in opened]
        grid = np.array([columns_rows for _, columns_rows in seen], np.int32)
        found = {"images": np.stack([views[0] for views, _ in seen])}
        return {**found, "grid": grid} if grid.any() else found

    def read(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Texts as ids between the tokens before and after.

        Returns:
            tokens int32 and valid bool, [T] of a single text, else [P, T].
        """
        marks = self.tokenizer.bos_id, self.tokenizer.eos_id
        tokens = np.full((len(texts), self.length), self.tokenizer.pad_id, np.int32)
        lengths = []
        for row, text in zip(tokens, texts):
            words = self.tokenizer.encode(text)[0][: self.length - 2]
            ids = [marks[0], *words, marks[1]]
            row[: len(ids)] = ids
            lengths.append(len(ids))
        valid = np.arange(self.length) < np.array(lengths)[:, None]
        found = {"tokens": tokens, "valid": valid}
        return found if len(texts) > 1 else {name: x[0] for name, x in found.items()}

    def _arrays(self, record: Pair, opened: Sequence[Image], index: int) -> dict:
        return {**self.look(opened), **record.target, **numbers(index)}

    def _drawn(self, record: Pair, rng: np.random.Generator) -> list[str]:
        count = len(record.others)
        if count < self.negatives:
            raise ValueError(
                f"{self.negatives} negatives of {count} other texts; use fewer"
            )
        chosen = rng.choice(count, self.negatives, replace=False) if count else ()
        return [record.others[i] for i in chosen]
