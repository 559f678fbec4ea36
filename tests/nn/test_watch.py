"""What layers say of themselves, against the same computed from whole streams."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from lmm_jax.depth import Layer, Layout, Role
from lmm_jax.nn import watch
from lmm_jax.nn.apart import apart
from lmm_jax.nn.attention import observe, sight
from tests.nn.test_chunk import T, anywhere
from tests.tiny import SPEC

BLOCK = SPEC.language.block
ATTENTION = watch.ImageAttention(BLOCK, chunk=7)


def whole(state, after, keys, queries):
    """Everything, in the place of its sums."""
    return state, after


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def watched(model, params, batch, look, chunk=0):
    return model.apply({"params": params}, batch, watch=look, chunk=chunk).watched


def angle(x, y):
    return (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)


# A scan whose body holds two layers, one that reads rows, and a layer alone before a cut.
@pytest.mark.parametrize("strategy", ["deepstack_hd", "fastv"])
def test_a_change_is_that_of_the_whole_stream(tiny, strategy):
    plan = tiny.plan(tiny.strategy(strategy))
    assert any(isinstance(s, Layer) or s.feeds for s in plan.language)
    model, batch = tiny.model(plan), tiny.batch(plan)

    def look(state, after, keys, queries):
        small = watch.change(state, after, keys, queries)
        return small, last(state), last(state.replace(hidden=after))

    def last(state):
        text = state.hidden[:, -plan.geometry.suffix :]
        row = np.flatnonzero(batch["role"][0] != Role.ASSISTANT)[-1]
        return text[0, row - plan.geometry.prefix]

    small, entered, left = watched(model, tiny.params, batch, look)
    assert small.cosine.shape == (6, 3, 2) and small.entered.shape[:2] == (6, 3)
    np.testing.assert_array_equal(small.entered[:, 0], entered)
    np.testing.assert_array_equal(small.left[:, 0], left)
    np.testing.assert_array_equal(entered[1:], left[:-1])
    text = batch["valid"].sum(axis=1)
    np.testing.assert_array_equal(small.count[..., 1], np.tile(text, (6, 1)))
    assert not small.count[:, 2, 0].any(), "the third row has no image"


def test_sums_over_image_and_text(tiny):
    model, batch = tiny.model(tiny.plan()), tiny.batch(tiny.plan())
    state, after = watched(model, tiny.params, batch, whole)
    small = watched(model, tiny.params, batch, watch.change)
    found = angle(np.float64(state.hidden), np.float64(after))
    visual = np.zeros(found.shape[-1], bool)
    visual[state.layout.slice("visual")] = True
    for i, kind in enumerate((visual, ~visual)):
        real = state.valid[0] & kind
        np.testing.assert_allclose(
            small.cosine[..., i], np.where(real, found, 0).sum(-1), rtol=1e-5, atol=1e-5
        )
        np.testing.assert_array_equal(small.count[0, :, i], real.sum(-1))


def test_layers_apart_and_chunks_say_the_same(tiny):
    model, batch = tiny.model(tiny.plan()), tiny.batch(tiny.plan())
    language = tiny.params["language"]
    layers = {"layers": apart(language["stack"]["layers"])}
    params = tiny.params | {"language": language | {"stack": layers}}

    def both(*layer):
        return watch.change(*layer), ATTENTION(*layer)

    one = watched(model, tiny.params, batch, both)
    for other in (
        watched(model, params, batch, both),
        watched(model, tiny.params, batch, both, 9),
    ):
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
            *(one, other),
        )


def test_attention_to_images_is_that_of_the_softmax(tiny):
    """The last prompt token's share, which FastV observes, is one of those averaged."""
    plan = tiny.plan()
    model, batch = tiny.model(plan), tiny.batch(plan)
    visual = plan.entrance.slice("visual")
    found = watched(model, tiny.params, batch, ATTENTION)
    assert found.shape == (6, 3)
    assert np.isnan(found[:, 2]).all(), "the third row has no image"
    assert ((found[:, :2] > 0) & (found[:, :2] < 1)).all()
    # Only one text token is left to ask.
    alone = dict(batch, valid=batch["valid"].copy())
    alone["valid"][:, plan.geometry.prefix + 1 :] = False
    alone["role"] = np.full_like(alone["role"], Role.USER)
    found = watched(model, tiny.params, alone, ATTENTION)

    def last(state, after, keys, queries):
        seen = sight(state.place, state.place, causal=True)
        names = ("last_attention",)
        shown = observe(queries, keys, seen, state, names).last_attention
        return shown[:, visual].sum(-1)

    expected = watched(model, tiny.params, alone, last)
    np.testing.assert_allclose(found[:, :2], expected[:, :2], rtol=1e-5)


def test_a_layer_cut_half_way_has_no_score(tiny):
    plan = tiny.plan(tiny.strategy("pumer"))
    batch = tiny.batch(plan)
    with pytest.raises(ValueError, match=r"pumer.* cuts inside layer 1"):
        watched(tiny.model(plan), tiny.params, batch, watch.change)


def mixed():
    layout = Layout.of({"prefix": 5, "visual": 10, "suffix": T - 15})
    return anywhere().replace(layout=layout)


def compared(after):
    state = mixed()
    small = watch.change(state, after(state.hidden), None, None)
    return small.cosine.sum(-1) / small.count.sum(-1)


@pytest.mark.parametrize(
    ("after", "cosine"),
    [(lambda x: x, 1), (lambda x: 3 * x, 1), (lambda x: -x, -1)],
    ids=["identity", "scaled", "negated"],
)
def test_cosines_of_simple_layers(after, cosine):
    np.testing.assert_allclose(compared(after), cosine, atol=1e-6)


def test_zero_vectors_are_skipped():
    state = mixed()
    hidden = state.hidden.copy()
    hidden[:, ::2] = 0
    small = watch.change(state.replace(hidden=hidden), 2 * hidden, None, None)
    odd = state.valid[:, 1::2].sum(axis=1)
    np.testing.assert_array_equal(small.count.sum(axis=-1), odd)
    np.testing.assert_allclose(small.cosine.sum(axis=-1), odd, rtol=1e-5)
