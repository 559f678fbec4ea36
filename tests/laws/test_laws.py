"""The laws: what holds for every strategy, found by its file."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmm_jax import strategies
from lmm_jax.depth import Cut, Keep, Layer, Reduce, Role, Tune
from lmm_jax.depth.cost import cost
from lmm_jax.depth.layout import Layout
from lmm_jax.models import lmm
from lmm_jax.nn.block import Block
from tests.tiny import BUDGETS, SPEC, strategy

NAMES = strategies.names()
SELECTING = ("fastv", "random", "uniform")
# Where nothing is reduced, hiding is dropping (law 11): one and the same program.
REDUCING = [n for n in NAMES if any(isinstance(e, Reduce) for e in strategy(n))]
MODES = [(n, "drop") for n in NAMES] + [(n, "mask") for n in REDUCING]
TOLERANCE = dict(rtol=0, atol=2e-5)


def test_every_strategy_is_under_the_laws():
    assert set(NAMES) == set(BUDGETS)


@pytest.mark.parametrize(
    "name", [n for n in NAMES if hasattr(strategies.module(n), "lossless")]
)
def test_1_keeping_everything_is_the_baseline(name, tiny):
    tokens = tiny.geometry.images * tiny.geometry.patches
    arguments = strategies.module(name).lossless(tiny.geometry, tokens)
    plan = tiny.plan(tiny.strategy(name, **arguments))
    baseline = tiny.plan()
    batch = tiny.batch(baseline)
    np.testing.assert_allclose(
        tiny.logits(plan, batch), tiny.logits(baseline, batch), **TOLERANCE
    )


@pytest.mark.parametrize("name", [n for n in NAMES if n != "llava"])
def test_1_the_budgets_of_these_tests_change_something(name, tiny):
    plan, baseline = tiny.plan(tiny.strategy(name)), tiny.plan()
    ours = tiny.logits(plan, tiny.batch(plan))
    theirs = tiny.logits(baseline, tiny.batch(baseline))
    assert np.abs(ours - theirs)[:2].max() > 1e-3  # rows with images
    if not plan.queries:  # they stand after questions without an image too
        np.testing.assert_allclose(ours[2], theirs[2], **TOLERANCE)  # the one without


@pytest.mark.parametrize("name", NAMES)
def test_2_arrays_have_the_lengths_of_the_table(name, tiny):
    plan = tiny.plan(tiny.strategy(name))
    model, batch = tiny.model(plan), tiny.batch(plan)
    out = jax.eval_shape(
        lambda p, b: model.apply({"params": p}, b, collect=True), tiny.params, batch
    )
    assert out.state.hidden.shape[1] == plan.layouts[-1].length
    runs = [step for step in plan.language if not isinstance(step, Cut)]
    counts = [s for s in cost(plan).steps if not isinstance(s.step, Cut)]
    assert len(out.runs) == len(runs)
    for step, run, count in zip(runs, out.runs, counts):
        layers, _, keys = run.keys.k.shape[:3]
        assert layers == step.stop - step.start
        assert keys == count.visual + count.text
    assert sum(r.keys.k.shape[0] for r in out.runs) == SPEC.language.depth


@pytest.mark.parametrize(("name", "mode"), MODES)
def test_3_text_is_sacred(name, mode, tiny):
    plan = tiny.plan(tiny.strategy(name), mode=mode)
    batch = tiny.batch(plan)
    state = tiny.run(plan, batch)
    prefix = tiny.geometry.prefix
    for field in ("positions", "valid", "segment", "role", "turn"):
        kept = np.asarray(getattr(state, field))
        for span, rows in (
            ("prefix", slice(0, prefix)),
            ("suffix", slice(prefix, None)),
        ):
            where = state.layout.slice(span)
            np.testing.assert_array_equal(kept[:, where], batch[field][:, rows])


@pytest.mark.parametrize("name", SELECTING)
def test_4_a_selection_returns_existing_rows_once_in_order(name, tiny):
    plan = tiny.plan(tiny.strategy(name))
    batch = tiny.batch(plan)
    state = tiny.run(plan, batch)
    where = state.layout.slice("visual")
    positions = np.asarray(state.positions)[:, where]
    valid = np.asarray(state.valid)[:, where]
    for row in range(len(valid)):
        kept = positions[row][valid[row]]
        assert (np.diff(kept) > 0).all()
        known = batch["visual_positions"][row][batch["visual_valid"][row]]
        assert set(kept) <= set(known)
    assert (np.asarray(state.size).sum(1) <= plan.entrance.length).all()


@pytest.mark.parametrize("name", NAMES)
def test_5_padding_changes_nothing(name, tiny):
    plan = tiny.plan(tiny.strategy(name))
    batch = tiny.batch(plan)
    rng = np.random.default_rng(9)
    noisy = dict(batch)
    noise = rng.integers(0, 256, batch["images"].shape, dtype=np.uint8)
    unseen = ~batch["views"][..., :1]  # a slot without image
    noisy["images"] = np.where(unseen[..., None, None, None], noise, batch["images"])
    words = rng.integers(3, SPEC.language.vocab, batch["tokens"].shape, np.int32)
    noisy["tokens"] = np.where(batch["valid"], batch["tokens"], words)
    np.testing.assert_allclose(
        tiny.logits(plan, noisy), tiny.logits(plan, batch), **TOLERANCE
    )


@pytest.mark.parametrize("name", NAMES)
def test_6_storage_order_means_nothing(name, tiny):
    """All text behind the pictures instead of around them."""
    edits = tiny.strategy(name)
    plan = tiny.plan(edits)
    moved = tiny.plan(
        edits, prefix=0, suffix=tiny.geometry.prefix + tiny.geometry.suffix
    )
    batch = tiny.batch(plan)
    np.testing.assert_allclose(
        tiny.logits(moved, batch), tiny.logits(plan, batch), **TOLERANCE
    )


@pytest.mark.parametrize("name", [n for n in NAMES if n != "pumer"])  # fixtures do
def test_7_the_plan_equals_a_loop_over_layers(name, tiny):
    """One Python loop that knows what edits do, and nothing of plans."""
    edits = tiny.strategy(name)
    plan = tiny.plan(edits)
    model, batch = tiny.model(plan), tiny.batch(plan)
    enter = functools.partial(model.apply, rng=None, method="_enter")
    state, ctx = jax.jit(enter)({"params": tiny.params}, batch)
    stack = tiny.params["language"]["stack"]["layers"]
    block = Block(SPEC.language.block, parent=None)
    visual = np.asarray(state.layout.slice("visual").indices(10**6)[:2])
    hidden, alive = np.asarray(state.hidden), np.asarray(state.valid).copy()
    buffers = {name: np.array(x) for name, x in ctx.aligned.items()}
    cuts = {e.at.layer: e for e in edits if isinstance(e, Reduce) and e.at.layer}
    previous = None
    for layer in range(SPEC.language.depth):
        if layer in cuts:
            scores = _last_row_attention(block, previous, state, alive)
            for row in range(len(alive)):
                span = np.arange(*visual)
                span = span[alive[row, span]]
                order = span[np.argsort(-scores[row, span], kind="stable")]
                alive[row, order[cuts[layer].to :]] = False
        for inject in plan.injects:
            if layer in inject.layers:
                group = buffers[inject.name][inject.layers.index(layer)]
                hidden = hidden.copy()
                hidden[:, slice(*visual)] += group
        for query in plan.queries:
            if layer == query.at.layer:
                now = state.replace(hidden=hidden, valid=jnp.asarray(alive))
                ours = {"params": tiny.params[f"strategy_{query.name}"]}
                hidden = np.asarray(query.op.apply(ours, now, ctx).hidden)
        params = jax.tree.map(lambda p, layer=layer: p[layer], stack)
        previous = (params, hidden)
        hidden = np.asarray(_layer(block, params, hidden, state, alive))
    order = np.asarray(plan.layouts[-1].slice("suffix").indices(10**6)[:2])
    out = np.asarray(tiny.run(plan, batch).hidden)[:, slice(*order)]
    loop = hidden[:, state.layout.slice("suffix")]
    valid = batch["valid"][:, tiny.geometry.prefix :]
    np.testing.assert_allclose(out[valid], loop[valid], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "mode"), MODES)
def test_8_decoding_equals_the_whole_pass(name, mode, tiny):
    plan = tiny.plan(tiny.strategy(name), mode=mode)
    batch = tiny.batch(plan)
    logits, slots = tiny.decoded(plan, batch, 4)
    whole = np.take_along_axis(tiny.logits(plan, batch), slots[..., None], 1)
    np.testing.assert_allclose(logits, whole, rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", NAMES)
def test_9_the_past_does_not_see_the_future(name, tiny):
    plan = tiny.plan(tiny.strategy(name))
    batch = tiny.batch(plan)
    later = {k: v.copy() for k, v in batch.items()}
    slot = plan.geometry.prefix + plan.geometry.suffix - 4  # inside every answer
    words = np.random.default_rng(3).integers(3, 100, batch["tokens"].shape)
    later["tokens"][:, slot:] = words[:, slot:]
    before, after = tiny.logits(plan, batch), tiny.logits(plan, later)
    np.testing.assert_array_equal(before[:, : slot + 1], after[:, : slot + 1])
    assert np.abs(before - after)[0, slot + 1 :].max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_10_what_learns_gets_gradients(name, tiny):
    """Everything that runs: connector, encoder, and what a strategy brings along."""
    plan = tiny.plan(tiny.strategy(name))
    model, batch = tiny.model(plan), tiny.batch(plan)

    def loss(params):
        logits, _ = model.apply({"params": params}, batch, method="score")
        picked = jnp.take_along_axis(
            jax.nn.log_softmax(logits), batch["tokens"][..., None], -1
        )
        return -(picked[..., 0] * batch["loss_mask"]).sum()

    abstract = jax.eval_shape(lambda k: lmm.init(model, k), jax.random.key(0))
    params = {branch: tiny.params[branch] for branch in abstract}
    assert jax.tree.structure(params) == jax.tree.structure(abstract)
    grads = jax.jit(jax.grad(loss))(params)
    flat = {
        "/".join(k.key for k in path): np.asarray(x)
        for path, x in jax.tree_util.tree_flatten_with_path(grads)[0]
    }
    for path, grad in flat.items():
        assert np.isfinite(grad).all(), path
        if path.startswith("vision/post_norm"):
            continue  # never applied
        if path.endswith(("k/bias", "pool/second/bias")):
            continue  # a bias on all keys, or all scores, cancels in the softmax
        if path.startswith("vision/stack"):
            grad = grad[: SPEC.vision.run]
        assert np.abs(grad).max() > 0, path


@pytest.mark.parametrize("name", REDUCING)
def test_11_hiding_equals_dropping(name, tiny):
    edits = tiny.strategy(name)
    drop, mask = tiny.plan(edits), tiny.plan(edits, mode="mask")
    batch = tiny.batch(drop)
    np.testing.assert_allclose(
        tiny.logits(mask, batch), tiny.logits(drop, batch), **TOLERANCE
    )


@pytest.mark.parametrize("name", [n for n in NAMES if n not in REDUCING])
def test_11_without_reductions_there_is_nothing_to_hide(name, tiny):
    drop, mask = (tiny.plan(tiny.strategy(name), mode=m) for m in ("drop", "mask"))
    assert dataclasses.replace(mask, mode="drop") == drop


@pytest.mark.parametrize("name", NAMES)
def test_12_an_answer_does_not_depend_on_its_neighbours(name, tiny):
    plan = tiny.plan(tiny.strategy(name))
    batch = tiny.batch(plan)
    together = tiny.logits(plan, batch)
    for row in range(3):
        alone = {k: v[row : row + 1] for k, v in batch.items()}
        np.testing.assert_allclose(
            tiny.logits(plan, alone)[0], together[row], **TOLERANCE
        )


@pytest.mark.parametrize("name", NAMES)
def test_13_an_answer_does_not_depend_on_its_row(name, tiny):
    """Three samples a row, each a segment of its own; but for cuts that choose among all
    tokens of a row, which the plan must know."""
    edits, count = tiny.strategy(name), 3
    plan = tiny.plan(edits)
    text = plan.geometry.prefix + plan.geometry.suffix
    wide = dict(prefix=0, suffix=count * text, images=count * plan.geometry.images)
    batch, order = tiny.batch(plan, rows=count), np.array([[0, 1, 2], [2, 0, 1]])
    packed = {k: x[order].reshape(2, -1, *x.shape[2:]) for k, x in batch.items()}
    for key in ("segment", "visual_segment"):
        numbers = np.repeat(np.arange(count, dtype=np.int32), batch[key].shape[1])
        packed[key] = np.tile(numbers, (2, 1))
    ours = tiny.logits(tiny.plan(edits, **wide), packed)
    alone = tiny.logits(plan, batch)[order]
    difference = np.abs(ours.reshape(alone.shape) - alone).max()
    assert difference > 1e-3 if plan.row_wide else difference < 2e-5


@pytest.mark.parametrize("interval", [1, 2, 3])
@pytest.mark.parametrize("start", [0, 1, 4])
def test_strategies_compose(start, interval, tiny):
    """Injection follows the cut: stacked rows of dropped tokens are dropped too."""
    edits = (
        *tiny.strategy("deepstack", start=start, interval=interval),
        *tiny.strategy("fastv", layer=3, keep=7),
    )
    drop, mask = tiny.plan(edits), tiny.plan(edits, mode="mask")
    assert any(isinstance(step, Layer) for step in drop.language)
    batch = tiny.batch(drop)
    np.testing.assert_allclose(
        tiny.logits(mask, batch), tiny.logits(drop, batch), **TOLERANCE
    )


def test_a_cut_at_the_connector_is_followed_by_the_stack(tiny):
    """uniform + deepstack: kept tokens get the hi-res rows of their own places."""
    edits = (*tiny.strategy("uniform", keep=4), *tiny.strategy("deepstack"))
    plan, mask = tiny.plan(edits), tiny.plan(edits, mode="mask")
    batch = tiny.batch(plan)
    np.testing.assert_allclose(
        tiny.logits(mask, batch), tiny.logits(plan, batch), **TOLERANCE
    )
    plain = tiny.plan(tiny.strategy("uniform", keep=4))
    assert np.abs(tiny.logits(plan, batch) - tiny.logits(plain, batch)).max() > 1e-3


@pytest.mark.parametrize(
    "other", [dict(uniform={"keep": 30}), dict(random={"keep": 80})]
)
def test_a_cut_keeps_no_tokens_that_an_image_lacks(other, tiny):
    """The any-resolution images here have 61 and 87 of 88 tokens."""
    edits = strategies.build({"anyres": {}, **other}, tiny.geometry)
    plan, mask = tiny.plan(edits), tiny.plan(edits, mode="mask")
    batch = tiny.batch(plan)
    np.testing.assert_allclose(
        tiny.logits(mask, batch), tiny.logits(plan, batch), **TOLERANCE
    )
    lacking = dict(batch)
    lacking["visual_rows"] = np.where(batch["visual_rows"] < 0, 5, batch["visual_rows"])
    assert np.abs(tiny.logits(plan, batch) - tiny.logits(plan, lacking))[0].max() > 1e-3


def test_frozen_layers_get_no_weight_gradients_and_the_others_the_same(tiny):
    tuned, plain = tiny.plan((Tune("language", (1, 4)),)), tiny.plan()
    batch = tiny.batch(plain)

    def gradients(plan):
        model = tiny.model(plan)

        def loss(params):
            logits, _ = model.apply({"params": params}, batch, method="score")
            return (logits * batch["loss_mask"][..., None]).sum()

        return jax.jit(jax.grad(loss))

    few, all_ = (gradients(plan) for plan in (tuned, plain))
    ours, theirs = few(tiny.params), all_(tiny.params)
    for name in ("q", "down"):
        part = [
            g["language"]["stack"]["layers"][name]["kernel"] for g in (ours, theirs)
        ]
        for layer in range(SPEC.language.depth):
            if layer in (1, 4):
                np.testing.assert_allclose(part[0][layer], part[1][layer], rtol=1e-4)
            else:
                assert not part[0][layer].any()


def test_a_learned_reduction_gets_parameters_and_gradients(tiny):
    """What law 10 asks of strategies with parameters, on one made for this test."""
    from flax import linen as nn

    from lmm_jax.depth import before
    from lmm_jax.ops.select import top_k_keep

    class Scored(nn.Module):
        keep: int

        @nn.compact
        def __call__(self, state, seen, ctx):
            where = state.layout.slice("visual")
            score = nn.Dense(1, name="score")(state.hidden[:, where])[..., 0]
            kept = top_k_keep(score, state.valid[:, where], self.keep)
            share = jnp.take_along_axis(nn.sigmoid(score), kept.index, 1)
            return Keep(kept.index, kept.valid, gate=share)

    edits = (Reduce("scored", before(2), 5, Scored(5)),)
    plan = tiny.plan(edits)
    model, batch = tiny.model(plan), tiny.batch(plan)
    fresh = jax.jit(lambda key: lmm.init(model, key))(jax.random.key(1))
    params = {**tiny.params, "strategy_scored": fresh["strategy_scored"]}

    @jax.jit
    @jax.grad
    def gradient(params):
        logits, _ = model.apply({"params": params}, batch, method="score")
        return jnp.square(logits).sum()

    grads = gradient(params)["strategy_scored"]["score"]
    assert np.abs(grads["kernel"]).max() > 0
    masked = tiny.plan(edits, mode="mask")
    np.testing.assert_allclose(
        tiny.logits(masked, batch, params),
        tiny.logits(plan, batch, params),
        **TOLERANCE,
    )


def _sights(block, state, alive):
    from lmm_jax.nn.attention import sight
    from lmm_jax.nn.rope import rotation

    place = dataclasses.replace(state.place, valid=jnp.asarray(alive))
    spec = block.spec
    angles = rotation(place, spec.rope, spec.head_dim)
    return angles, sight(place, place, causal=True)


@functools.partial(jax.jit, static_argnums=0)
def _layer(block, params, hidden, state, alive):
    angles, own = _sights(block, state, alive)
    return block.apply({"params": params}, hidden, angles, own)[0]


def _last_row_attention(block, previous, state, alive):
    """Probabilities of the last prompt token, by the textbook."""
    params, hidden = previous
    angles, own = _sights(block, state, alive)
    _, keys, q = block.apply({"params": params}, hidden, angles, own, method="attend")
    q, k = np.asarray(q, np.float64), np.asarray(keys.k, np.float64)
    k = np.repeat(k, q.shape[2] // k.shape[2], axis=2)
    scores = np.zeros(alive.shape)
    asks = alive & (np.asarray(state.role) != Role.ASSISTANT)
    positions = np.asarray(state.positions)
    for row in range(len(alive)):
        last = np.where(asks[row], positions[row], -1).argmax()
        seen = alive[row] & (positions[row] <= positions[row, last])
        logits = np.einsum("nh,snh->ns", q[row, last], k[row]) / q.shape[-1] ** 0.5
        logits = np.where(seen, logits, -np.inf)
        probs = np.exp(logits - logits.max(1, keepdims=True))
        scores[row] = (probs / probs.sum(1, keepdims=True)).mean(0)
    return scores


def test_layout_slices():
    layout = Layout.of({"prefix": 3, "visual": 5, "suffix": 2})
    assert layout.slice("visual") == slice(3, 8)
    assert layout.resized("visual", 1).slice("suffix") == slice(4, 6)
    with pytest.raises(KeyError, match="no span 'cls'"):
        layout.slice("cls")
