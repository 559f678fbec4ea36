"""Noise for timings: every slot is full, and all parts of a batch belong together."""

from __future__ import annotations

import numpy as np
import pytest

from lmm_jax.data import images, noise
from lmm_jax.data.images import ImageSpec
from lmm_jax.data.native import NativeSpec
from lmm_jax.data.placement import Slots

GRIDS = ((2, 1), (2, 2), (1, 4), (4, 1))
TILED = 4 + 4 * 2 * (1 * 2 + 1)  # patches of the whole, then of (1, 4) with newlines
FORMS = {
    "pad": (ImageSpec(8), Slots(3, 5, 2, 4)),
    "crops": (ImageSpec(8, "stretch", crops=5), Slots(0, 7, 1, 4)),
    "square crops": (
        ImageSpec(8, "stretch", crops=4, grid="square"),
        Slots(2, 6, 1, 4),
    ),
    "tiles": (
        ImageSpec(8, "anyres", pinpoints=GRIDS, patches=2),
        Slots(2, 6, 2, TILED, rows=TILED, varies=True),
    ),
    "fine tiles": (
        ImageSpec(8, "stretch", pinpoints=GRIDS, patches=2, fine=2),
        Slots(2, 6, 1, TILED, rows=TILED, varies=True),
    ),
    "native": (
        ImageSpec(8, "native", native=NativeSpec(4, 2, 64, 24 * 16)),
        Slots(2, 6, 2, 6),
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("answered", [False, True])
def test_every_slot_is_full(form, answered):
    spec, slots = FORMS[form]
    batch = noise.batch(spec, slots, 50, 3, answered=answered)
    for name in ("valid", "visual_valid", "views"):
        assert batch[name].all(), name
    assert (batch.get("visual_rows", np.zeros(1)) >= 0).all()
    assert batch["images"].shape == (3, slots.images, spec.views, *spec.view)
    assert batch["images"].any(axis=(-3, -2, -1)).all()
    for row in range(3):  # text and images are one sequence without gaps
        order = np.r_[batch["positions"][row], batch["visual_positions"][row]]
        assert sorted(order) == list(range(slots.text + slots.visual))
    before = batch["visual_positions"].min(axis=1)
    np.testing.assert_array_equal(before, slots.prefix)
    learned = batch["loss_mask"].sum(axis=1)
    np.testing.assert_array_equal(
        learned, slots.text - slots.text // 2 if answered else 0
    )
    assert batch["tokens"].max() < 50 and len(np.unique(batch["tokens"])) > 5


@pytest.mark.parametrize("form", FORMS)
def test_the_largest_image_is_not_made_smaller(form):
    spec, slots = FORMS[form]
    width, height = noise.largest(spec)
    assert width * height == {
        "pad": 64,
        "crops": 5 * 64,
        "square crops": 64,
        "native": 24 * 16,
    }.get(form, 4 * 64)
    if spec.pinpoints:
        assert len(images.rows((width, height), spec)) == slots.rows
