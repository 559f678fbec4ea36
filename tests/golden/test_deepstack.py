"""DeepStack-L against the reference implementation."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmm_jax import losses, strategies
from lmm_jax.checkpoint.params import check_rows, to_published
from lmm_jax.data.images import candidates
from lmm_jax.decode import Generator
from lmm_jax.depth import make_plan
from lmm_jax.models import lmm
from lmm_jax.ops.spatial import dilated_groups
from tests.golden import reference

CLOSE = dict(rtol=1e-4, atol=1e-4)


def build(fixture, start: int, interval: int, images: int, width: int) -> lmm.LMM:
    spec = reference.lmm_spec(fixture.meta["config"])
    geometry = lmm.geometry(
        spec,
        images=images,
        crops=fixture.meta["config"]["ds"]["num_crops"],
        prefix=0,
        suffix=width,
    )
    chosen = {"deepstack": dict(start=start, interval=interval)}
    return lmm.LMM(spec, make_plan(geometry, strategies.build(chosen, geometry)))


@functools.cache
def single():
    return reference.load("deepstack/deepstack_l")


def variants():
    return [tuple(v) for v in single().meta["config"]["variants_start_interval"]]


@pytest.mark.parametrize(("start", "interval"), variants())
def test_logits_and_loss(start, interval):
    f = single()
    ids, mask = f["in/input_ids"], f["in/attention_mask"]
    model = build(f, start, interval, 1, ids.shape[1])
    params = reference.lmm_params(f, model)
    batch = reference.batch(f, model.plan, ids, mask)
    state, logits = reference.run(model, params, batch)
    expected = f[f"out/logits_s{start}_i{interval}"]
    real = f["out/expanded_attention_mask"] > 0
    for ours, theirs, valid in zip(reference.in_order(logits, state), expected, real):
        np.testing.assert_allclose(ours, theirs[valid], **CLOSE)
    batch = labelled(f, batch)
    loss, _ = jax.jit(lambda p: token_loss(model, p, batch))(params)
    np.testing.assert_allclose(loss, f[f"out/loss_s{start}_i{interval}"], **CLOSE)


def labelled(f, batch):
    """The reference's labels as our mask; -100 is unsupervised."""
    labels = f["in/labels"]
    out = dict(batch, loss_mask=np.zeros_like(batch["loss_mask"]))
    for row, label in enumerate(labels):
        text = (f["in/attention_mask"][row] > 0) & (
            f["in/input_ids"][row] != reference.IMAGE
        )
        kept = label[text]
        out["loss_mask"][row, : len(kept)] = kept != -100
        tokens = out["tokens"][row, : len(kept)]
        assert (tokens[kept != -100] == kept[kept != -100]).all()
    out["loss_mask"] *= out["positions"] > 0  # nothing predicts the first token
    return out


def token_loss(model, params, batch):
    logits, _ = model.apply({"params": params}, batch, method="score")
    return losses.next_token(logits, batch["tokens"], batch["loss_mask"])


def test_gradients():
    f = single()
    model = build(f, 1, 1, 1, f["in/input_ids"].shape[1])
    params = reference.lmm_params(f, model)
    batch = reference.batch(f, model.plan, f["in/input_ids"], f["in/attention_mask"])
    batch = labelled(f, batch)
    grads = jax.jit(jax.grad(lambda p: token_loss(model, p, batch)[0]))(params)
    ours = to_published(jax.device_get(grads), lmm.params(model.spec))
    names = [k.removeprefix("grad/") for k in f.arrays if k.startswith("grad/")]
    assert names
    for name in names:
        theirs = f[f"grad/{name}"]
        atol = 3e-4 * np.abs(theirs).max()
        np.testing.assert_allclose(ours[name], theirs, rtol=0, atol=atol, err_msg=name)


def test_groups_and_features():
    f = single()
    ids = f["in/input_ids"]
    model = build(f, 1, 1, 1, ids.shape[1])
    params = reference.lmm_params(f, model)
    batch = reference.batch(f, model.plan, ids, f["in/attention_mask"])

    def enter(model, batch):
        return model._enter(batch, None)

    state, ctx = model.apply({"params": params}, batch, method=enter)
    count = len(f["out/image_features"])
    visual = np.asarray(state.hidden)[:count, state.layout.slice("visual")]
    np.testing.assert_allclose(visual, f["out/image_features"], **CLOSE)
    groups = np.asarray(ctx.aligned["deepstack"])[:, :count]
    np.testing.assert_allclose(groups, f["out/groups"], **CLOSE)


@pytest.mark.parametrize(("side", "chunk"), [("right", 0), ("left", 0), ("left", 9)])
def test_several_images_and_text_only_rows(side, chunk):
    f = reference.load("deepstack/deepstack_l_multi_image")
    c = f.meta["config"]
    ids, mask = f[f"in/input_ids_{side}"], f[f"in/attention_mask_{side}"]
    model = build(f, c["start"], c["interval"], max(c["images_per_row"]), ids.shape[1])
    params = reference.lmm_params(f, model)
    batch = reference.batch(f, model.plan, ids, mask)
    state, logits = reference.run(model, params, batch, chunk)
    real = f[f"out/expanded_attention_mask_{side}"] > 0
    theirs = f[f"out/logits_{side}"]
    for ours, expected, valid in zip(reference.in_order(logits, state), theirs, real):
        np.testing.assert_allclose(ours, expected[valid], **CLOSE)


def test_greedy_decoding_with_cache():
    f = reference.load("deepstack/deepstack_l_decode")
    ids, mask = f["in/input_ids"], f["in/attention_mask"]
    model = build(f, 1, 1, 1, ids.shape[1])
    params = reference.lmm_params(f, model)
    batch = reference.batch(f, model.plan, ids, mask)
    steps = f.meta["config"]["steps"]
    answers = Generator(model, steps, end=-1)(params, batch)
    np.testing.assert_array_equal(answers, f["out/tokens"])

    prefill = jax.jit(
        lambda b: model.apply({"params": params}, b, slots=steps, method="prefill")
    )
    decode = jax.jit(
        lambda t, c: model.apply({"params": params}, t, c, method="decode")
    )
    logits, cache = prefill(batch)
    for step in range(steps):
        np.testing.assert_allclose(logits, f["out/step_logits"][:, step], **CLOSE)
        logits, cache = decode(f["out/tokens"][:, step], cache)


def test_sampling_tables():
    """Every grid of every budget and order: value = 1 + view * V + token, 0 = no group."""
    f = reference.load("deepstack/sampling")
    tables = [k for k in f.arrays if k.startswith("out/index_")]
    assert tables
    for key in tables:
        _, budget, side, order, columns, rows = key.split("_")
        budget, side = int(budget[2:]), int(side[1:])
        grid = np.array([[[int(columns[2:]), int(rows[2:])]]], np.int32)
        numbers = 1 + np.arange(budget * side * side, dtype=np.float32)
        crops = numbers.reshape(1, 1, budget, side * side, 1)
        ours = dilated_groups(jnp.asarray(crops), grid, side, order=order)
        np.testing.assert_array_equal(ours[:, 0, :, 0], f[key], err_msg=key)


@pytest.mark.parametrize("order", ["2d", "1d", "grid"])
def test_sampling_of_features(order):
    f = reference.load("deepstack/sampling")
    c = f.meta["config"]["float_case"]
    side, budget = c["p"], c["num_crops"]
    crops = np.zeros((len(c["grids_wh"]), budget, side * side, c["channels"]), "f")
    for i in range(len(crops)):
        tokens = f[f"in/tokens_{i}"][1:]
        crops[i, : len(tokens)] = tokens
    grid = f["in/grids_wh"][None]
    ours = dilated_groups(jnp.asarray(crops)[None], grid, side, order=order)
    ours = ours.reshape(budget, len(crops), side * side, -1)
    np.testing.assert_array_equal(ours, f[f"out/groups_{order}"])


def test_parameter_rows_are_complete_and_invertible():
    f = single()
    model = build(f, 1, 1, 1, 4)
    abstract = jax.eval_shape(lambda k: lmm.init(model, k), jax.random.key(0))
    rows = lmm.params(model.spec)
    check_rows(rows, abstract)
    params = reference.lmm_params(f, model)
    back = to_published(params, rows)
    assert set(back) == set(f.params)
    for name, value in back.items():
        np.testing.assert_array_equal(value, f.params[name], err_msg=name)


def test_candidate_grids_of_the_paper():
    grids = [(1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)]
    assert [tuple(grid) for grid in candidates(4)] == grids
