"""SliMM's forms of DeepStack: which patches make which row, and where they do nothing."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest

from lmm_jax import strategies
from lmm_jax.checkpoint.params import check_rows
from lmm_jax.depth import Connect, VisionFeatures, make_plan
from lmm_jax.models import lmm
from lmm_jax.models.specs import LMMSpec, named
from lmm_jax.nn.merger import Merger
from lmm_jax.nn.params import of_ops
from lmm_jax.nn.rope import Axial, RopeSpec
from tests.tiny import SPEC

NAMES = ("slimm_e", "slimm_m", "slimm_v1")
GRID, WIDTH = (8, 4), 6  # rows and columns of patches, with vision width
# Patches a side of a token in the context, and of one that is added to it.
SIDES = {"slimm_e": (4, 2), "slimm_m": (2, 2), "slimm_v1": (2, 1)}


def sizes(**changes):
    g = lmm.geometry(SPEC, images=2, crops=0, prefix=0, suffix=4)
    vision = dataclasses.replace(g.vision, width=WIDTH)
    return dataclasses.replace(g, vision=vision, fixed_grid=GRID, patches=32, **changes)


def stack(name: str, geometry):
    arguments = dict(taps=(1, 0)) if name == "slimm_m" else {}
    edits = strategies.build({name: arguments}, geometry)
    return next(e for e in edits if not isinstance(e, Connect))


def features(rng) -> VisionFeatures:
    """Of two examples with two images each, and one view of each image."""
    shape = (3, 2, 2, 1, GRID[0] * GRID[1], WIDTH)
    hidden, *taps = rng.normal(size=shape).astype(np.float32)
    return VisionFeatures(hidden, None, dict(enumerate(taps)))


@pytest.mark.parametrize("name", NAMES)
def test_each_row_has_the_patches_that_lie_under_its_token(name):
    """Against slices of the map; M's mergers are in the order of its `taps`."""
    vision = features(np.random.default_rng(0))
    op = stack(name, sizes()).op
    params = op.init(jax.random.key(0), vision, None)["params"]
    rows = np.asarray(op.apply({"params": params}, vision, None))
    token, part = SIDES[name]
    across = GRID[1] // token
    assert rows.shape[2] == 2 * across * GRID[0] // token
    for row, found in enumerate(rows):
        if name == "slimm_m":
            source, down, right = vision.taps[row], 0, 0
            own = jax.tree.map(lambda p, j=1 - row: p[j], params["mergers"])
        else:
            source, (down, right) = vision.hidden, divmod(row, 2)
            own = params["merger"]
        merge = jax.jit(functools.partial(Merger(op.spec).apply, {"params": own}))
        maps = source.reshape(2, 2, *GRID, WIDTH)
        found = found.reshape(2, 2, -1, found.shape[-1])
        for place in range(found.shape[2]):
            top = place // across * token + down * part
            left = place % across * token + right * part
            patches = maps[:, :, top : top + part, left : left + part]
            expected = merge(patches.reshape(2, 2, -1, WIDTH))[:, :, 0]
            np.testing.assert_allclose(found[:, :, place], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_zeros_are_the_context_alone(name, tiny):
    edits = tiny.strategy(name)
    both, alone = tiny.plan(edits), tiny.plan(edits[:1])
    params = jax.tree.map(np.copy, tiny.params)
    op = params[f"strategy_{name}"]
    for leaf in op["mergers" if name == "slimm_m" else "merger"]["second"].values():
        leaf[...] = 0
    batch = tiny.batch(both)
    np.testing.assert_array_equal(
        tiny.logits(both, batch, params), tiny.logits(alone, batch, params)
    )


@pytest.mark.parametrize("name", NAMES)
def test_all_that_they_learn_has_a_row(name, tiny):
    plan = tiny.plan(tiny.strategy(name))
    model = tiny.model(plan)
    abstract = jax.eval_shape(lambda key: lmm.init(model, key), jax.random.key(0))
    assert "connector" not in abstract  # their mergers take its place
    rows = (row for row in lmm.params(SPEC) if not row.path.startswith("connector/"))
    check_rows((*rows, *of_ops(plan)), abstract)


@pytest.mark.parametrize(
    ("name", "tokens"), [("slimm_e", 36), ("slimm_m", 144), ("slimm_v1", 144)]
)
def test_tokens_in_the_context_of_clip(name, tokens):
    spec = LMMSpec(named("vision", "clip-l-336"), named("language", "vicuna-7b"))
    g = lmm.geometry(spec, images=1, crops=0, prefix=0, suffix=4)
    arguments = dict(taps=(5, 11, 17, 21)) if name == "slimm_m" else {}
    plan = make_plan(g, strategies.build({name: arguments}, g))
    assert plan.tokens_per_image == tokens
    (inject,) = plan.injects
    assert inject.layers == (1, 2, 3, 4)


def native() -> LMMSpec:
    """Images of their own size, 2 x 2 patches merged by the connector, a tapped layer."""
    block = dataclasses.replace(SPEC.vision.block, rope=RopeSpec(axes=Axial()))
    own = dict(block=block, class_token=False, native=24, merge=2, taps=(0,))
    return dataclasses.replace(SPEC, vision=dataclasses.replace(SPEC.vision, **own))


@pytest.mark.parametrize("name", ["slimm_m", "slimm_v1"])
def test_towers_whose_connector_merges_need_no_other(name):
    """The model's own injection of inner layers stays, and may read the same layers."""
    spec = native()
    g = lmm.geometry(spec, images=2, crops=0, prefix=2, suffix=4)
    arguments = dict(taps=(0, 1)) if name == "slimm_m" else {}
    edits = strategies.build({name: arguments}, g)
    plan = make_plan(g, (*lmm.own_edits(spec, g), *edits))
    assert plan.connect is None and plan.tokens_per_image == 6
    model = lmm.LMM(spec, plan)
    params = jax.jit(lambda key: lmm.init(model, key))(jax.random.key(0))
    abstract = lmm.abstract_batch(model, 1)
    batch = {name: np.zeros(x.shape, x.dtype) for name, x in abstract.items()}
    batch["grid"][:] = 4, 4
    rng = np.random.default_rng(0)
    batch["images"] = rng.integers(0, 256, batch["images"].shape, dtype=np.uint8)

    def stacked(model, batch):
        vision = model.features(batch)
        return vision, model._enter(batch, None)[1].aligned[name]

    vision, rows = model.apply({"params": params}, batch, method=stacked)
    own = params[f"strategy_{name}"]
    for row in range(len(rows)):
        if name == "slimm_m":
            part = jax.tree.map(lambda p, j=row: p[j], own["mergers"])
            tokens = vision.taps[row][:, :, 0]
        else:
            part, tokens = own["merger"], vision.hidden[:, :, 0, row::4]
        op = plan.injects[-1].op
        expected = Merger(op.spec).apply({"params": part}, tokens)
        expected = np.asarray(expected).reshape(rows[row].shape)
        np.testing.assert_allclose(rows[row], expected, rtol=0, atol=1e-5)


def test_slimm_e_needs_images_of_one_shape():
    g = lmm.geometry(native(), images=1, crops=0, prefix=2, suffix=4)
    with pytest.raises(ValueError, match="views of one shape"):
        strategies.build({"slimm_e": {}}, g)


@pytest.mark.parametrize("name", NAMES)
def test_maps_that_are_not_tiled_are_refused(name):
    g = sizes()
    odd = dataclasses.replace(g, fixed_grid=(27, 27), patches=729)
    with pytest.raises(ValueError, match=r"do not tile the 27 x 27 map: set model"):
        strategies.build({name: {}}, odd)
