"""PuMer beyond the laws of all strategies: each part on its own, order, and refusals."""

from __future__ import annotations

import dataclasses
import re

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmm_jax.depth import Context, Keep, Layout, Mix, Observation, make_plan
from lmm_jax.depth.cost import cost
from lmm_jax.depth.reduce import reduce_span
from lmm_jax.strategies import pumer
from tests.golden.test_pumer_ops import state

TEXT, VISUAL, WIDTH = 9, 17, 6
FEW = settings(max_examples=10, deadline=None, derandomize=True)


def encoder(tiny, **changes):
    """An encoder: text in front, one image with a [CLS] token."""
    language = dataclasses.replace(tiny.geometry.language, causal=False)
    sizes = dict(images=1, crops=0, prefix=TEXT, suffix=0, image_class=True)
    return dataclasses.replace(tiny.geometry, language=language, **sizes | changes)


def example(seed: int, rows: int = 2):
    """Random tokens and what attention shows of them."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.normal(size=(rows, *shape)).astype(np.float32)

    mask = np.arange(TEXT) < rng.integers(3, TEXT + 1, rows)[:, None]
    tokens = state(TEXT, VISUAL, draw(TEXT + VISUAL, WIDTH), mask)
    seen = Observation(
        text_attention=np.abs(draw(4, TEXT, VISUAL)),
        keys=draw(TEXT + VISUAL, WIDTH),
        queries=draw(TEXT + VISUAL, WIDTH),
    )
    return tokens.replace(gate=None), jax.tree.map(jnp.asarray, seen)


def ops(tiny, layers=(1,), **shares):
    found = pumer.edits(encoder(tiny), layers=layers, **shares)
    return {edit.span: edit.op for edit in found}


def test_each_part_works_on_its_own(tiny):
    off = dict(prune=0.0, merge=0.0, text=0.0)
    assert not ops(tiny, **off)
    pruned = ops(tiny, **off | dict(prune=0.3))
    merged = ops(tiny, **off | dict(merge=0.3))
    words = ops(tiny, **off | dict(text=0.3))
    assert [set(x) for x in (pruned, merged, words)] == [
        {"visual"},
        {"visual"},
        {"prefix"},
    ]
    tokens, seen = example(0)
    assert isinstance(pruned["visual"](tokens, seen, Context()), Keep)
    mix = merged["visual"](tokens, seen, Context())
    assert isinstance(mix, Mix) and (mix.weights.sum(1) > 0).all(), "none is dropped"


def test_lengths_of_the_plan(tiny):
    """Text and image shrink at the same layers, and the cost follows both."""
    sizes = encoder(tiny, patches=144, prefix=32)
    arguments = pumer.RELEASED["vilt_vqav2"] | {"layers": (1, 2, 4)}
    plan = make_plan(sizes, pumer.edits(sizes, **arguments))
    found = [(s.visual, s.text) for s in cost(plan).steps]
    assert list(dict.fromkeys(found)) == [(145, 32), (87, 26), (52, 21), (31, 17)]
    assert plan.layouts[-1].length == 31 + 17


@pytest.mark.parametrize("score", pumer.SCORES)
@FEW
@given(seed=st.integers(0, 2**16))
def test_order_before_a_cut_means_nothing(score, tiny, seed):
    """The rows that are left are those of the ranks; ties aside."""
    tokens, seen = example(seed)
    op = pumer.Visual(14, 9, score, safe=False, leads=False)
    order = np.random.default_rng(seed).permutation(VISUAL)
    rows = np.r_[np.arange(TEXT), TEXT + order]
    moved = tokens.replace(hidden=tokens.hidden[:, rows])
    shown = Observation(
        seen.last_attention,
        seen.mean_attention,
        seen.text_attention[..., order],
        seen.keys[:, rows],
        seen.queries,
    )
    left = [
        reduce_span(x, Context(), "visual", op(x, s, Context()))[0].hidden
        for x, s in ((tokens, seen), (moved, shown))
    ]
    np.testing.assert_allclose(*left, rtol=0, atol=1e-6)


@FEW
@given(seed=st.integers(0, 2**16), scale=st.floats(0.1, 9))
def test_the_highest_are_kept_in_falling_order(tiny, seed, scale):
    """Whatever the mask is multiplied by, and whatever other examples hold."""
    tokens, seen = example(seed)
    op = pumer.Visual(7, 7, "attention", safe=False, leads=False)
    scores = np.asarray(op.scores(tokens, seen))
    index = np.asarray(op(tokens, seen, Context()).index)
    np.testing.assert_array_equal(index, np.argsort(-scores, axis=1)[:, :7])
    scaled = tokens.replace(gate=jnp.full(tokens.valid.shape, scale))
    np.testing.assert_array_equal(op(scaled, seen, Context()).index, index)
    alone = jax.tree.map(lambda x: x[:1], (tokens, seen))
    np.testing.assert_array_equal(op(*alone, Context()).index, index[:1])


def test_the_first_token_of_the_image_stays_first(tiny):
    tokens, seen = example(3)
    seen = seen.replace(text_attention=seen.text_attention.at[..., 0].set(0.0))
    op = ops(tiny, prune=0.4, merge=0.4)["visual"]
    mix = op(tokens, seen, Context())
    np.testing.assert_array_equal(mix.weights[:, 0], np.eye(VISUAL)[[0, 0]])
    careless = dataclasses.replace(op, leads=False)(tokens, seen, Context())
    assert not careless.weights[:, :, 0].any()


@FEW
@given(seed=st.integers(0, 2**16))
def test_padding_asks_for_nothing_in_safe_mode_only(tiny, seed):
    tokens, seen = example(seed)
    tokens = tokens.replace(valid=tokens.valid.at[:, 4:TEXT].set(False))
    noisy = seen.replace(
        text_attention=seen.text_attention.at[:, :, 4:].mul(9.0),
        keys=seen.keys.at[:, 4:TEXT].mul(-1.0),
    )
    op = ops(tiny, prune=0.3, merge=0.3, text=0.4)
    for safe in (True, False):
        same = []
        for part in op.values():
            part = dataclasses.replace(part, safe=safe)
            mixes = [part(tokens, s, Context()) for s in (seen, noisy)]
            valid = np.asarray(mixes[0].valid)
            rows = [np.asarray(mix.weights)[valid] for mix in mixes]
            same.append(np.array_equal(*rows))
        assert all(same) == safe


def test_gradients_reach_what_is_kept_and_nothing_that_was_compared(tiny):
    tokens, seen = example(1)
    op = pumer.Visual(12, 8, "attention", safe=True, leads=True)

    @jax.jit
    def total(hidden, seen):
        before = tokens.replace(hidden=hidden)
        after = reduce_span(before, Context(), "visual", op(before, seen, Context()))[0]
        return after.hidden[:, TEXT:].sum()

    to_hidden, to_seen = jax.grad(total, (0, 1))(tokens.hidden, seen)
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(to_seen))
    weights = op(tokens, seen, Context()).weights
    np.testing.assert_allclose(
        to_hidden[:, TEXT:, 0], np.asarray(weights).sum(1), rtol=1e-5
    )
    assert not np.asarray(to_hidden[:, :TEXT]).any()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(layers=()), "one or more layers in 0..5"),
        (dict(layers=(2, 6)), "layers=[2, 6]: use one or more layers in 0..5"),
        (dict(layers=(4, 2)), "ascending"),
        (dict(layers=(2, 2)), "each once"),
        (dict(prune=1.0), "pumer.prune=1.0: use a share in [0, 1)"),
        (dict(merge=-0.1), "pumer.merge=-0.1"),
        (dict(text=1.5), "pumer.text=1.5"),
        (dict(prune=0.98), "drops all of the 17 visual tokens that reach layer 1"),
        (dict(score="last"), "use one of attention, first_head"),
        (dict(preset="exact"), "use 'safe' or 'reference'"),
    ],
)
def test_refusals(arguments, says, tiny):
    with pytest.raises(ValueError, match=re.escape(says)):
        pumer.edits(encoder(tiny), **{"layers": (1,)} | arguments)


def test_text_of_a_decoder_is_not_merged(tiny):
    with pytest.raises(ValueError, match="causal"):
        pumer.edits(tiny.geometry, layers=(1,), text=0.2)


def test_the_layout_of_an_image_with_a_class_token(tiny):
    layout = encoder(tiny).layout(encoder(tiny).visual_tokens)
    assert layout == Layout.of({"prefix": TEXT, "visual": VISUAL, "suffix": 0})
