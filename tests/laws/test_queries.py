"""Laws of learned tokens that read question and image once (`depth.Query`)."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from lmm_jax import strategies
from lmm_jax.depth import Memory, Place, Role, VisionFeatures
from lmm_jax.nn.attention import Sight
from tests.tiny import PREFIX

CLOSE = dict(rtol=0, atol=2e-5)
OURS = "strategy_flashsloth_query"


@pytest.fixture(scope="module")
def plan(tiny):
    return tiny.plan(tiny.strategy("flashsloth"))


def silent(params):
    """The same, but queries add nothing."""
    up = jax.tree.map(np.zeros_like, params[OURS]["up"])
    return {**params, OURS: {**params[OURS], "up": up}}


def test_they_act_behind_their_place_and_only_with_an_image(plan, tiny):
    batch = tiny.batch(plan)
    loud = tiny.logits(plan, batch)
    quiet = tiny.logits(plan, batch, silent(tiny.params))
    acts = np.abs(loud - quiet).max(-1) > 1e-4
    first = np.argmax(batch["role"] == Role.QUERY, axis=1)
    for row, start in enumerate(first):  # logits of a slot are read just before it
        assert not acts[row, : start + 1].any()
        assert acts[row, start + 1 :].any() == batch["views"][row].any()
    text_only = ~batch["views"].any((1, 2))
    assert text_only.any()
    np.testing.assert_array_equal(loud[text_only], quiet[text_only])


def test_a_row_without_images_teaches_them_nothing(plan, tiny):
    batch = {name: x[2:] for name, x in tiny.batch(plan).items()}
    assert not batch["views"].any()

    @jax.jit
    @jax.grad
    def gradient(params):
        score = tiny.model(plan).apply({"params": params}, batch, method="score")[0]
        return (score * batch["loss_mask"][..., None]).sum()

    ours = gradient(tiny.params)[OURS]
    assert np.abs(ours.pop("tokens")).max() > 0  # they are tokens like any other
    assert not any(np.any(x) for x in jax.tree.leaves(ours))


def test_a_question_is_read_by_the_queries_behind_it(plan, tiny):
    """Of two turns, what the second asks changes nothing in the first."""
    batch = tiny.batch(plan)
    count = plan.queries[0].count
    asks = slice(
        PREFIX + 1, PREFIX + 1 + count
    )  # the first turn: a word and its queries
    batch["role"][:, PREFIX] = Role.QUESTION
    batch["role"][:, asks] = Role.QUERY
    batch["tokens"][:, asks] = np.arange(count)
    batch["turn"][:, asks.stop :] = 1
    other = dict(batch, turn=batch["turn"].copy())
    asked = (batch["role"] == Role.QUESTION) & (batch["turn"] == 1)
    other["turn"][asked] = 2  # nobody's question: the same words, unread
    ours, theirs = tiny.logits(plan, batch), tiny.logits(plan, other)
    differs = np.abs(ours - theirs).max(-1) > 1e-5
    last = np.array([np.flatnonzero(r)[-1] for r in batch["role"] == Role.QUERY])
    with_image = batch["views"].any((1, 2))
    for row in np.flatnonzero(with_image):
        assert (
            not differs[row, : last[row]].any() and differs[row, last[row] + 1 :].any()
        )


def test_they_see_what_pooling_hides(plan, tiny):
    """Opposite changes of two patches of a window, under a scorer that weighs all alike."""
    (query,), connect = plan.queries, plan.connect
    rng = np.random.default_rng(0)
    rows, width = tiny.geometry.patches, tiny.geometry.vision.width
    before = rng.normal(size=(1, 1, 1, rows, width)).astype(np.float32)
    after = before.copy()
    after[..., 0, :] += 0.5
    after[..., 1, :] -= 0.5
    flat = jax.tree.map(np.zeros_like, tiny.params["strategy_flashsloth_pool"])

    def pooled(patches):
        vision = VisionFeatures(patches, np.ones((1, 1, 2), np.int32))
        return connect.op.apply({"params": flat}, vision, lambda features: features)

    def read(patches):
        place = Place(*(np.zeros((1, rows), np.int32) for _ in range(3)))
        memory = Memory(patches.reshape(1, rows, width), place)
        states = np.ones((1, query.count, query.op.spec.width), np.float32)
        sights = (
            Sight(np.ones((1, query.count, n), bool)) for n in (query.count, rows)
        )
        args = (states, states, memory, *sights)
        return query.op.apply({"params": tiny.params[OURS]}, *args, method="read")

    np.testing.assert_allclose(pooled(after), pooled(before), **CLOSE)
    assert np.abs(np.asarray(read(after) - read(before))).max() > 1e-2


def test_they_alone_change_where_they_read(plan, tiny):
    """Whatever order patches and words have, and nothing but the rows of queries."""
    (query,), batch = plan.queries, tiny.batch(plan)
    params = {"params": tiny.params}
    state, ctx = tiny.model(plan).apply(params, batch, None, method="_enter")
    ours = {"params": tiny.params[OURS]}
    read = np.asarray(query.op.apply(ours, state, ctx).hidden)
    asks = np.asarray(state.role == Role.QUERY)
    changed = np.abs(read - np.asarray(state.hidden)).max(-1) > 0
    with_image = batch["views"].any((1, 2))
    np.testing.assert_array_equal(changed, asks & with_image[:, None])

    rng = np.random.default_rng(0)
    order = rng.permutation(ctx.memory.hidden.shape[1])
    mixed = ctx.replace(memory=jax.tree.map(lambda x: x[:, order], ctx.memory))
    again = np.asarray(query.op.apply(ours, state, mixed).hidden)
    np.testing.assert_allclose(again, read, **CLOSE)
    words = np.flatnonzero(np.asarray(state.role[0] == Role.QUESTION))
    order = np.arange(state.role.shape[1])
    order[words] = rng.permutation(words)
    mixed = state.replace(hidden=state.hidden[:, order], positions=state.positions)
    again = np.asarray(query.op.apply(ours, mixed, ctx).hidden)
    np.testing.assert_allclose(again[0, asks[0]], read[0, asks[0]], **CLOSE)


def test_decoding_does_not_read_again(plan, tiny):
    """It has no use for the parameters of pooling and queries."""
    model, batch = tiny.model(plan), tiny.batch(plan)

    def prefill(params):
        return model.apply({"params": params}, batch, slots=2, method="prefill")

    logits, cache = jax.jit(prefill)(tiny.params)
    tokens = np.argmax(logits, -1).astype(np.int32)
    lost = {name: x for name, x in tiny.params.items() if "strategy" not in name}

    def step(params):
        args = {"params": params}, tokens, cache
        return model.apply(*args, method="decode")[0]

    np.testing.assert_array_equal(jax.jit(step)(lost), jax.jit(step)(tiny.params))


def test_an_anchor_leads_all_of_them(tiny):
    plan = tiny.plan(
        tiny.strategy("flashsloth", window=2, queries=2, layer=3, anchor=5)
    )
    batch = tiny.batch(plan)
    batch["tokens"][batch["tokens"] == 5] = 6  # nobody says it
    moved = jax.tree.map(np.copy, tiny.params)
    moved["language"]["embed"]["table"][5] += 1.0
    ours, theirs = tiny.logits(plan, batch), tiny.logits(plan, batch, moved)
    differs = np.abs(ours - theirs).max(-1) > 1e-4
    asks = batch["role"] == Role.QUERY
    assert not differs[:, : np.argmax(asks, 1).min() + 1].any()
    assert differs[asks].any(0)


COMPOSED = {
    "queries over stacked tokens": {
        "deepstack": {"start": 1, "interval": 1},
        "flashsloth": {"pool": "none", "queries": 2, "layer": 3},
    },
    "queries that read behind a cut": {
        "fastv": {"layer": 2, "keep": 9},
        "flashsloth": {"pool": "none", "queries": 2, "layer": 4},
    },
    "pooled, then cut": {
        "flashsloth": {"window": 2, "queries": 0},
        "fastv": {"layer": 2, "keep": 9},
    },
    "all": {
        "flashsloth": {"window": 2, "queries": 2, "layer": 3},
        "fastv": {"layer": 3, "keep": 9},
    },
}


@pytest.mark.parametrize("name", COMPOSED)
def test_they_compose(name, tiny):
    """Hiding equals dropping, decoding equals the whole pass, and both parts act."""
    edits = strategies.build(COMPOSED[name], tiny.geometry)
    plan, hidden = tiny.plan(edits), tiny.plan(edits, mode="mask")
    batch = tiny.batch(plan)
    ours = tiny.logits(plan, batch)
    np.testing.assert_allclose(tiny.logits(hidden, batch), ours, **CLOSE)
    decoded, slots = tiny.decoded(plan, batch, 4)
    whole = np.take_along_axis(ours, slots[..., None], 1)
    np.testing.assert_allclose(decoded, whole, rtol=0, atol=5e-5)
    pooled = {"flashsloth": COMPOSED[name]["flashsloth"]}
    alone = tiny.plan(strategies.build(pooled, tiny.geometry))
    assert np.abs(tiny.logits(alone, batch) - ours)[0].max() > 1e-3
    if plan.queries:
        quiet = tiny.logits(plan, batch, silent(tiny.params))
        assert np.abs(quiet - ours)[0].max() > 1e-3
