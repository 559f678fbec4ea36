"""Packed patches of the reference, as the slots of our batch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lmm_jax.data.conversation import Encoded
from lmm_jax.data.placement import Slots, place
from lmm_jax.models import lmm
from lmm_jax.models.specs import VisionSpec
from tests.golden.reference import Fixture


def frames(f: Fixture) -> list[tuple[int, int, int]]:
    """(kind, rows, columns) in patches, of every image (1) and video frame (2)."""
    found = [(1, h, w) for _, h, w in f.arrays.get("in/image_grid_thw", ())]
    for t, h, w in f.arrays.get("in/video_grid_thw", ()):
        found += [(2, h, w)] * t
    return found


def marks(f: Fixture, row: int) -> list[tuple[int, int]]:
    """(kind, text tokens before it) of each image or frame of a row."""
    kinds = f["in/mm_token_type_ids"][row][f["in/attention_mask"][row] > 0]
    starts = np.flatnonzero((kinds > 0) & (np.r_[0, kinds[:-1]] != kinds))
    return [(int(kinds[at]), int((kinds[:at] == 0).sum())) for at in starts]


def batch(f: Fixture, model: lmm.LMM) -> dict[str, np.ndarray]:
    """Packed patches to slots, the rest by the placement that training uses."""
    g, v = model.plan.geometry, model.spec.vision
    ids, kinds = f["in/input_ids"], f["in/mm_token_type_ids"]
    abstract = lmm.abstract_batch(model, len(ids))
    pixels = (*abstract["images"].shape[:4], v.frames, v.patch, v.patch, 3)
    out = {name: np.zeros(x.shape, x.dtype) for name, x in abstract.items()}
    out["images"] = np.zeros(pixels, np.float32)
    left = {kind: iter(patches(f, kind, v)) for kind in (1, 2)}
    slots = Slots(0, g.suffix, g.images, g.visual_tokens)
    for row in range(len(ids)):
        grids = []
        for i, (kind, _) in enumerate(marks(f, row)):
            (height, width), found = next(left[kind])
            out["images"][row, i, 0, : len(found)] = found
            out["grid"][row, i] = width, height
            out["views"][row, i, 0] = True
            grids.append((width // v.merge, height // v.merge))
        text = ids[row][(f["in/attention_mask"][row] > 0) & (kinds[row] == 0)]
        none = np.zeros(len(text), np.int32)
        before = np.array([at for _, at in marks(f, row)], np.int32)
        encoded = Encoded(text, none.astype(np.int8), none, none.astype("f"), before)
        placed = place(encoded, slots, len(grids), pad_id=0, grids=grids)
        for name, value in placed.items():
            out[name][row] = value
    return out


def patches(
    f: Fixture, kind: int, v: VisionSpec
) -> Iterator[tuple[tuple[int, int], np.ndarray]]:
    """((rows, columns), [P, F, p, p, 3]) of each image or frame, in order."""
    key = {1: "in/pixel_values", 2: "in/pixel_values_videos"}[kind]
    start = 0
    for other, height, width in frames(f):
        if other == kind:
            flat = f[key][start : start + height * width]
            start += height * width
            split = flat.reshape(-1, 3, v.frames, v.patch, v.patch)
            yield (int(height), int(width)), split.transpose(0, 2, 3, 4, 1)
