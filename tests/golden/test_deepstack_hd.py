"""DeepStack-HD against the reference implementation."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmm_jax import strategies
from lmm_jax.checkpoint.params import from_published
from lmm_jax.data.conversation import Encoded
from lmm_jax.data.images import ImageSpec, candidates, real
from lmm_jax.data.placement import Slots, place
from lmm_jax.data.tiles import rows
from lmm_jax.depth import Plan, VisionFeatures, make_plan
from lmm_jax.hub.families import deepstack
from lmm_jax.models import lmm
from lmm_jax.strategies.anyres import Tiles
from lmm_jax.strategies.deepstack_hd import FineTiles
from tests.golden import reference

CLOSE = dict(rtol=1e-4, atol=1e-4)
GRIDS = candidates(4)


@functools.cache
def fixture():
    return reference.load("deepstack/deepstack_hd")


def build(start: int = 1, interval: int = 1) -> lmm.LMM:
    spec = reference.lmm_spec(fixture().meta["config"])
    views = dict(crops=4, pinpoints=GRIDS, fine=2)
    width = fixture()["in/input_ids"].shape[1]
    sizes = lmm.geometry(spec, images=1, prefix=0, suffix=width, **views)
    chosen = {"deepstack_hd": dict(start=start, interval=interval)}
    return lmm.LMM(spec, make_plan(sizes, strategies.build(chosen, sizes)))


def parameters(model: lmm.LMM):
    abstract = jax.eval_shape(lambda k: lmm.init(model, k), jax.random.key(0))
    published = deepstack.rows(dataclasses.replace(model.spec, fine=2))
    return from_published(fixture().params, published, abstract)


def view_spec(size: int, side: int) -> ImageSpec:
    return ImageSpec(size, "stretch", fine=2, pinpoints=GRIDS, patches=side)


def batch(plan: Plan) -> dict[str, np.ndarray]:
    """An image stands where its placeholder does; views go to the slots they have here."""
    f = fixture()
    made = [sample(plan, row) for row in range(len(f["in/input_ids"]))]
    return {name: np.stack([row[name] for row in made]) for name in made[0]}


def sample(plan: Plan, row: int) -> dict[str, np.ndarray]:
    f, g = fixture(), plan.geometry
    ids = f["in/input_ids"][row][f["in/attention_mask"][row] > 0]
    marks = np.flatnonzero(ids == reference.IMAGE).astype(np.int32)
    text = ids[ids != reference.IMAGE]
    zeros = np.zeros(len(text), np.int32)
    supervised = zeros.astype(np.float32)
    encoded = Encoded(text, np.ones(len(text), np.int8), zeros, supervised, marks)
    side, size = g.grid[0], f["in/pixel_values_0"].shape[-1]
    spec = view_spec(size, side)
    seen = {
        "images": np.zeros((1, spec.views, *spec.view), np.float32),
        "views": np.zeros((1, spec.views), bool),
        "grid": np.zeros((1, 2), np.int32),
        "visual_rows": np.full((1, g.tiled_tokens), -1, np.int32),
    }
    counts = []
    if len(marks):
        grid = f["in/grids_wh"][row]
        found = rows(tuple(grid), side, 1 + g.crops)
        seen["views"][0], seen["grid"][0] = real(grid, spec), grid
        pixels = f[f"in/pixel_values_{row}"].transpose(0, 2, 3, 1)
        seen["images"][0, seen["views"][0]] = pixels
        seen["visual_rows"][0, : len(found)] = found
        counts = [len(found)]
    slots = Slots(0, g.suffix, 1, plan.tokens_per_image, varies=True)
    return seen | place(encoded, slots, len(marks), pad_id=0, counts=counts)


@pytest.mark.parametrize("grid", GRIDS)
def test_order_of_tokens(grid):
    """value = 1 + view * P + patch in the reference's order of views, -1 for newlines."""
    side, name = 2, "gw{}_gh{}".format(*grid)
    spec = view_spec(8, side)
    has = real(grid, spec)
    numbers = np.zeros((spec.views, side**2), np.float32)
    numbers[has] = 1 + np.arange(has.sum() * side**2).reshape(-1, side**2)
    views, fine = np.split(numbers[None, None, ..., None], [5], axis=2)
    found = rows(grid, side, 5)
    vision = VisionFeatures(
        jnp.asarray(views),
        jnp.array([[grid]]),
        rows=jnp.array([[found]]),
        fine=jnp.asarray(fine.reshape(1, 1, 5, 4, side**2, 1)),
    )
    newline, tiles = {"newline": jnp.array([-1.0])}, Tiles(1)

    def same(features):
        return features

    base = tiles.apply({"params": newline}, vision, same)
    np.testing.assert_array_equal(
        base[0, 0, :, 0], fixture()[f"out/index_base_p2_{name}"]
    )
    stack = FineTiles(tiles, (side, side), 2, 4)
    groups = stack.apply({"params": {"tiles": newline}}, vision, same)
    np.testing.assert_array_equal(
        groups[:, 0, :, 0], fixture()[f"out/index_groups_p2_{name}"]
    )


def test_features_and_groups():
    f, model = fixture(), build()
    params = parameters(model)

    def enter(model, batch):
        return model._enter(batch, None)

    state, ctx = model.apply({"params": params}, batch(model.plan), method=enter)
    visual = np.asarray(state.hidden)[:, state.layout.slice("visual")]
    groups = np.asarray(ctx.aligned["deepstack_hd"])
    for i, length in enumerate(f["out/context_lengths"]):
        valid = np.asarray(state.valid)[i, state.layout.slice("visual")]
        assert valid.sum() == length
        theirs = f[f"out/image_features_{i}"]
        np.testing.assert_allclose(visual[i][valid], theirs, **CLOSE)
        stacked = f[f"out/groups_{i}"]
        np.testing.assert_allclose(groups[:, i][:, valid], stacked, **CLOSE)


@pytest.mark.parametrize(("start", "interval"), [(1, 1), (0, 2)])
def test_logits(start, interval):
    f, model = fixture(), build(start, interval)
    state, logits = reference.run(model, parameters(model), batch(model.plan))
    expected = f[f"out/logits_s{start}_i{interval}"]
    real_ = f["out/expanded_attention_mask"] > 0
    ours = reference.in_order(logits, state)
    for mine, theirs, valid in zip(ours, expected, real_, strict=True):
        np.testing.assert_allclose(mine, theirs[valid], **CLOSE)


def test_the_newline_is_one_parameter():
    model = build()
    abstract = jax.eval_shape(lambda k: lmm.init(model, k), jax.random.key(0))
    learn = {name for name in abstract if name.startswith("strategy_")}
    assert learn == {"strategy_anyres"}


def test_lengths_of_the_published_size():
    lengths = [len(rows(grid, 24, 5)) for grid in GRIDS]
    assert lengths == [1776, 2376, 2976, 1752, 2928, 2328, 2904]
