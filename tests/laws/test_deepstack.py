"""Laws of stacking, in the language model (deepstack) and in the tower (deepstack_v)."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from lmm_jax.ops.spatial import dilated_groups
from tests.tiny import PREFIX, SPEC

NAMES = ("deepstack", "deepstack_v")
DEPTH = {"deepstack": SPEC.language.depth, "deepstack_v": SPEC.vision.depth}
CLOSE = dict(rtol=0, atol=2e-5)
PLACES = [
    ("deepstack", dict(start=0, interval=1)),
    ("deepstack", dict(start=1, interval=2)),
    ("deepstack", dict(start=5, interval=1)),
    ("deepstack_v", dict(start=0, interval=1)),
    ("deepstack_v", dict(start=0, interval=2)),
    ("deepstack_v", dict(start=2, interval=1)),
]


def without_views(batch):
    """The same images, none of them with hi-res views."""
    return dict(batch, grid=np.zeros_like(batch["grid"]))


@pytest.mark.parametrize("name", NAMES)
def test_no_groups_and_a_start_behind_the_last_layer_are_the_baseline(name, tiny):
    assert tiny.plan(tiny.strategy(name, groups=0)) == tiny.plan()
    assert tiny.plan(tiny.strategy(name, start=DEPTH[name])) == tiny.plan()


@pytest.mark.parametrize(("name", "places"), PLACES)
def test_groups_of_zeros_are_the_baseline(name, places, tiny):
    """Bit for bit in the language model; the tower reads fewer views than the baseline's,
    and products of other shapes round differently."""
    plan, baseline = tiny.plan(tiny.strategy(name, **places)), tiny.plan()
    batch = without_views(tiny.batch(plan))
    ours, plain = tiny.logits(plan, batch), tiny.logits(baseline, batch)
    np.testing.assert_allclose(ours, plain, **CLOSE)
    if name == "deepstack":
        np.testing.assert_array_equal(ours, plain)


@pytest.mark.parametrize(("name", "places"), PLACES)
def test_decoding_equals_the_whole_pass_wherever_groups_go(name, places, tiny):
    plan = tiny.plan(tiny.strategy(name, **places))
    batch = tiny.batch(plan)
    logits, slots = tiny.decoded(plan, batch, 3)
    whole = np.take_along_axis(tiny.logits(plan, batch), slots[..., None], 1)
    np.testing.assert_allclose(logits, whole, rtol=0, atol=5e-5)
    plain, _ = tiny.decoded(plan, without_views(batch), 3)
    assert np.abs(logits - plain)[:2].max() > 1e-3  # the stack was active


@pytest.mark.parametrize(("name", "places"), PLACES)
def test_text_has_no_part_in_it(name, places, tiny):
    """Neither rows without images, wherever they stand, nor text before the first."""
    plan, baseline = tiny.plan(tiny.strategy(name, **places)), tiny.plan()
    batch = tiny.batch(plan)
    ours, plain = tiny.logits(plan, batch), tiny.logits(baseline, batch)
    np.testing.assert_allclose(ours[2], plain[2], **CLOSE)
    np.testing.assert_allclose(ours[:, :PREFIX], plain[:, :PREFIX], **CLOSE)
    order = [2, 0, 1]
    moved = tiny.logits(plan, {key: x[order] for key, x in batch.items()})
    np.testing.assert_allclose(moved, ours[order], **CLOSE)


def test_a_group_behind_the_last_vision_layer_is_added_to_the_features(tiny):
    """And views before that do not see each other: they are the baseline's."""
    plan = tiny.plan(tiny.strategy("deepstack_v", start=SPEC.vision.run))
    batch = tiny.batch(plan)

    def features(plan):
        apply = jax.jit(lambda p, b: tiny.model(plan).apply(p, b, method="features"))
        return np.asarray(apply({"params": tiny.params}, batch).hidden)

    views = features(tiny.plan())
    groups = dilated_groups(views[:, :, 1:], batch["grid"], tiny.geometry.grid[1])
    expected = views[:, :, 0] + np.asarray(groups)[0].reshape(views[:, :, 0].shape)
    np.testing.assert_allclose(features(plan)[:, :, 0], expected, **CLOSE)


def test_late_entrance_at_the_first_layer_is_the_baseline(tiny):
    """deepstack_whole: zeros, and the tokens added to them before layer 0."""
    edits = tiny.strategy("deepstack_whole", start=0, inputs=False)
    plan, baseline = tiny.plan(edits), tiny.plan()
    batch = tiny.batch(plan)
    np.testing.assert_array_equal(
        tiny.logits(plan, batch), tiny.logits(baseline, batch)
    )
