"""A record into the fixed slots of a batch; true order kept in positions.

Text before the first image goes to the prefix, all other text to the suffix. Storage is
not order: `positions` count text and images as they were written, so that any batch of
one shape may hold text first, image first, several images or none.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
from typing import Any

import numpy as np
from PIL.Image import Image

from lmm_jax.data import conversation, images
from lmm_jax.data.conversation import Encoded, Template
from lmm_jax.data.coordinates import coordinates
from lmm_jax.data.images import ImageSpec
from lmm_jax.data.sources import BadRecord, Record
from lmm_jax.data.tokenizer import Tokenizer
from lmm_jax.depth import Plan


@dataclasses.dataclass(frozen=True)
class Slots:
    """Capacities of a sample.

    Attributes:
        prefix: text slots before the first image; 0 puts all text into the suffix.
        suffix: the other text slots.
        images: I, images a sample may hold.
        tokens_per_image: V, visual tokens an image may have.
        rows: of a tiled image, tokens before any reduction.
        varies: an image has as many tokens as its rows, not all.
        queries: of the text slots, those of learned tokens behind each question.
    """

    prefix: int
    suffix: int
    images: int
    tokens_per_image: int
    rows: int = 0
    varies: bool = False
    queries: int = 0

    @classmethod
    def of(cls, plan: Plan) -> Slots:
        """Those of a plan."""
        g = plan.geometry
        return cls(
            g.prefix,
            g.suffix,
            g.images,
            plan.tokens_per_image,
            rows=g.tiled_tokens,
            varies=plan.connect is not None and plan.connect.varies,
            queries=sum(query.count for query in plan.queries),
        )

    @property
    def text(self) -> int:
        """T, number of text slots."""
        return self.prefix + self.suffix

    @property
    def visual(self) -> int:
        """I * V, number of visual slots."""
        return self.images * self.tokens_per_image

    def filled(self, text: int, images: int) -> Slots:
        """Of these slots as many as so much text and so many images fill, no prefix."""
        return dataclasses.replace(
            self,
            prefix=0,
            suffix=min(text, self.text),
            images=min(images, self.images),
        )


@dataclasses.dataclass(frozen=True)
class SampleSpec:
    """How a record becomes a sample.

    Attributes:
        truncate: cut too long conversations from the right instead of skipping them.

    Raises:
        ValueError: the tokenizer lacks the template's end mark.
    """

    image: ImageSpec
    slots: Slots
    template: Template
    tokenizer: Tokenizer
    truncate: bool = False

    def __post_init__(self):
        conversation.check(self.template, self.tokenizer)

    def encode(
        self, turns: Sequence[dict[str, str]], *, prompt: bool = False
    ) -> Encoded:
        """The text of a record, or of a prompt; see `conversation.encode`."""
        encode = conversation.prompt if prompt else conversation.encode
        return encode(turns, self.template, self.tokenizer, queries=self.slots.queries)

    def sample(
        self, record: Record, *, index: int, position: int = 0, snug: bool = False
    ) -> dict[str, Any]:
        """One record as the arrays of a batch, without the batch axis.

        I images, C views each, T text slots, V visual tokens an image.

        Args:
            index: stored as `id`.
            position: in the stream; a conversation has nothing that is drawn.
            snug: only the slots that the record fills, all text in the suffix, as
                `lmm_jax.data.packing` puts them together.

        Returns:
            The arrays of `look` and of `place`. For the host alone id int64 [], and skipped
            int64 [], a bad record in whose place this one stands, else -1. A packed row has
            both as int64 [N], for the N samples that it may hold, -1 where there is none.

        Raises:
            BadRecord: whatever keeps it from training, "unsupervised" included.
        """
        encoded = self.encode(record.turns)
        opened = [images.load(image) for image in record.images]
        filled = (len(encoded.tokens), len(opened))
        slots = self.slots.filled(*filled) if snug else self.slots
        arrays = arranged(encoded, opened, self, slots, truncate=self.truncate)
        if not arrays["loss_mask"].any():
            raise BadRecord(
                "unsupervised",
                f"record {record.id!r} has no answer token left to learn",
            )
        return {**arrays, **numbers(index)}

    def prompt(self, record: Record, *, index: int) -> dict[str, Any]:
        """The same up to the header of the answer that is to be generated; never cut, as
        that would lose the header.

        Raises:
            BadRecord: as `sample`.
        """
        encoded = self.encode(record.turns, prompt=True)
        opened = [images.load(image) for image in record.images]
        return {**arranged(encoded, opened, self, self.slots), **numbers(index)}


def numbers(index: int) -> dict[str, np.int64]:
    """What a sample says to the host alone; see `SampleSpec.sample`."""
    return {"id": np.int64(index), "skipped": np.int64(-1)}


def place(
    encoded: Encoded,
    slots: Slots,
    image_count: int,
    *,
    pad_id: int,
    counts: Sequence[int] | None = None,
    grids: Sequence[tuple[int, int]] | None = None,
    truncate: bool = False,
) -> dict[str, np.ndarray]:
    """The text and visual slots of one sample.

    Args:
        image_count: images that come with the text.
        counts: visual tokens, and positions, of each image: the first slots of those it
            may have. By default it has them all.
        grids: columns and rows of each image's visual tokens, if these have rotary
            coordinates; `counts` follows.
        pad_id: token of empty slots; `valid`, never the id, says what is real.
        truncate: cut what does not fit from the right, images after the cut included,
            as LLaVA does. Otherwise too long is an error.

    Returns:
        tokens, positions, segment, turn int32 [T]; role int8 [T]; valid bool [T];
        loss_mask float32 [T]; visual_positions, visual_segment int32 [I*V];
        visual_valid bool [I*V]. With `grids`, coords int32 [T, 3] and visual_coords
        int32 [I*V, 3].

    Raises:
        BadRecord: "placeholders", "too many images", "too many visual tokens" or "too
            long".
    """
    marks, length = encoded.marks, len(encoded.tokens)
    if len(marks) != image_count:
        raise BadRecord(
            "placeholders",
            f"{image_count} images but {len(marks)} <image> markers; every image needs "
            "its marker in a turn",
        )
    if image_count > slots.images:
        raise BadRecord(
            "too many images",
            f"{image_count} images in {slots.images} slots; raise slots.images",
        )
    per_image = slots.tokens_per_image
    if grids is not None:
        counts = [columns * rows for columns, rows in grids]
    counts = np.full(image_count, per_image) if counts is None else np.array(counts)
    if (counts > per_image).any():
        raise BadRecord(
            "too many visual tokens",
            f"an image of {counts.max()} visual tokens in {per_image} slots; make the "
            "image smaller, or its slots more",
        )
    head = int(marks[0]) if slots.prefix and image_count else 0
    kept = length
    if head > slots.prefix or length - head > slots.suffix:
        if not truncate:
            name, size, rule = (
                ("suffix", length - head, slots.suffix)
                if head <= slots.prefix
                else ("prefix", head, slots.prefix)
            )
            raise BadRecord(
                "too long",
                f"{size} text tokens for {rule} {name} slots; raise slots.{name}, or "
                "set truncate",
            )
        kept = head + slots.suffix if head <= slots.prefix else slots.prefix
    head = min(head, kept)
    # From token i of the text to its slot.
    slot = np.arange(kept)
    slot[head:] += slots.prefix - head

    def fill(values: np.ndarray, empty: int = 0) -> np.ndarray:
        out = np.full((slots.text, *values.shape[1:]), empty, values.dtype)
        out[slot] = values[:kept]
        return out

    order = np.arange(length, dtype=np.int32)
    # Visual tokens before image i, and of all images.
    ahead = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    before = ahead[np.searchsorted(marks, order, side="right")]
    within = np.arange(per_image, dtype=np.int32)
    real = within < counts[:, None]
    first = (marks + ahead[:-1])[:, None]
    visual_positions = np.zeros((slots.images, per_image), np.int32)
    visual_positions[:image_count] = np.where(real, first + within, 0)
    visual_valid = np.zeros((slots.images, per_image), bool)
    visual_valid[:image_count] = real & (marks <= kept)[:, None]
    placed = {
        "tokens": fill(encoded.tokens, pad_id),
        "positions": fill(order + before),
        "valid": fill(np.ones(length, bool)),
        "segment": np.zeros(slots.text, np.int32),
        "role": fill(encoded.role),
        "turn": fill(encoded.turn),
        "loss_mask": fill(encoded.loss_mask),
        "visual_positions": visual_positions.reshape(-1),
        "visual_valid": visual_valid.reshape(-1),
        "visual_segment": np.zeros(slots.visual, np.int32),
    }
    if grids is not None:
        coords, found = coordinates(length, marks, grids, per_image)
        visual = np.zeros((slots.images, per_image, 3), np.int32)
        visual[:image_count] = found
        placed |= {"coords": fill(coords), "visual_coords": visual.reshape(-1, 3)}
    return placed


def arranged(
    encoded: Encoded,
    opened: Sequence[Image],
    spec: SampleSpec,
    slots: Slots,
    *,
    truncate: bool = False,
) -> dict[str, np.ndarray]:
    """Text and images in these slots: the arrays of `look` and of `place`, which see."""
    text = place(
        encoded,
        slots,
        len(opened),
        pad_id=spec.tokenizer.pad_id,
        counts=counts(opened, spec.image, slots),
        grids=grids(opened, spec.image),
        truncate=truncate,
    )
    return {**look(opened, spec.image, slots), **text}


def look(
    opened: Sequence[Image], spec: ImageSpec, slots: Slots
) -> dict[str, np.ndarray]:
    """The views of one sample's images.

    Returns:
        images uint8 [I, C, *view]; views bool [I, C], which are real; grid int32 [I, 2]
        (columns, rows) of the crops, or of a native image's patches; of tiled images,
        visual_rows int32 [I, rows], see `VisionFeatures.rows`.
    """
    count, views = slots.images, spec.views
    found = {
        "images": np.zeros((count, views, *spec.view), np.uint8),
        "views": np.zeros((count, views), bool),
        "grid": np.zeros((count, 2), np.int32),
    }
    if spec.pinpoints:
        found["visual_rows"] = np.full((count, slots.rows), -1, np.int32)
    for i, image in enumerate(opened):
        found["images"][i], grid = images.views(image, spec)
        found["grid"][i], found["views"][i] = grid, images.real(grid, spec)
        if spec.pinpoints:
            rows = images.rows(image.size, spec)
            found["visual_rows"][i, : len(rows)] = rows
    return found


def grids(opened: Sequence[Image], spec: ImageSpec) -> list[tuple[int, int]] | None:
    """Columns and rows of each image's visual tokens; None where all images are alike."""
    if not spec.native:
        return None
    return [spec.native.tokens(image.size) for image in opened]


def counts(opened: Sequence[Image], spec: ImageSpec, slots: Slots) -> list[int] | None:
    """Visual tokens of each image after what the connector reduces; None where all images
    have as many."""
    if not slots.varies:
        return None
    found = (len(images.rows(image.size, spec)) for image in opened)
    return [min(count, slots.tokens_per_image) for count in found]
