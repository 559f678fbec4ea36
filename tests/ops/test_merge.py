"""Bipartite soft matching against a loop, and what must hold of any merge."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmm_jax.ops import merge
from lmm_jax.ops.merge import mergeable

matched = jax.jit(merge.matched, static_argnums=1)
averages = jax.jit(merge.averages, static_argnums=1)

MANY = settings(max_examples=25, deadline=None, derandomize=True)
EXAMPLE = np.radians([0, 10, 100, 12, 60, 110, 200])  # angles of seven keys
MERGED = {
    1: ([1, 5, 7, 2, 4, 4.5], [1, 1, 1, 1, 1, 2]),
    2: ([1, 7, 2, 4.5, 4.5], [1, 1, 1, 2, 2]),
    3: ([1, 2, 4.5, 16 / 3], [1, 1, 2, 3]),
}


@st.composite
def merges(draw):
    """Keys [B, T, H], a count, and how many tokens of each row are real."""
    tokens = draw(st.sampled_from([3, 12, 23]))  # each is a program of its own
    count = draw(st.sampled_from([0, 1, mergeable(tokens)]))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    real = rng.integers(2, tokens + 1, 3)
    return rng.normal(size=(3, tokens, 4)).astype(np.float32), count, real


def by_hand(keys, count):
    """Slots of one row, as the paper tells it."""
    unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    even, odd = range(0, len(keys), 2), range(1, len(keys), 2)
    best = {a: max(odd, key=lambda b: unit[a] @ unit[b]) for a in even}
    order = sorted(list(even)[1:], key=lambda a: -(unit[a] @ unit[best[a]]))
    sources = set(order[:count])
    left = [a for a in even if a not in sources] + list(odd)
    return [left.index(best[i] if i in sources else i) for i in range(len(keys))]


@pytest.mark.parametrize("count", MERGED)
def test_the_example(count):
    keys = np.stack([np.cos(EXAMPLE), np.sin(EXAMPLE)], axis=-1)[None]
    slots = matched(keys, count)
    weights = averages(slots, 7 - count, jnp.ones((1, 7)))[0]
    states, sizes = MERGED[count]
    np.testing.assert_allclose(weights @ np.arange(1.0, 8.0), states, rtol=1e-6)
    np.testing.assert_array_equal((weights > 0).sum(-1), sizes)


@MANY
@given(merges())
def test_equals_a_loop(drawn):
    keys, count, _ = drawn
    slots = matched(keys, count)
    np.testing.assert_array_equal(slots, [by_hand(row, count) for row in keys])


@MANY
@given(merges())
def test_means_lose_nothing(drawn):
    keys, count, _ = drawn
    tokens = keys.shape[1]
    slots = matched(keys, count)
    weights = np.asarray(averages(slots, tokens - count, jnp.ones(slots.shape)))
    sizes = (weights > 0).sum(-1)
    assert (weights >= 0).all() and (sizes.sum(-1) == tokens).all()
    assert ((weights > 0).sum(1) == 1).all(), "each token is in one slot"
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
    total = (sizes[..., None] * (weights @ keys)).sum(1)
    np.testing.assert_allclose(total, keys.sum(1), rtol=1e-4, atol=1e-5)
    summed = jax.vmap(lambda x, at: jax.ops.segment_sum(x, at, tokens - count))
    np.testing.assert_allclose(
        weights @ keys, summed(keys, slots) / sizes[..., None], atol=1e-6
    )


@MANY
@given(merges())
def test_the_first_and_the_unmerged_do_not_change(drawn):
    keys, count, _ = drawn
    slots = np.asarray(matched(keys, count))
    weights = averages(slots, keys.shape[1] - count, jnp.ones(slots.shape))
    merged = np.asarray(jnp.matmul(weights, keys, precision="highest"))
    assert (slots[:, 0] == 0).all()
    np.testing.assert_array_equal(merged[:, 0], keys[:, 0])
    for row in range(len(keys)):
        alone = np.flatnonzero(np.bincount(slots[row])[slots[row]] == 1)
        np.testing.assert_array_equal(merged[row, slots[row, alone]], keys[row, alone])


def test_duplicates_merge_into_what_they_were():
    rng = np.random.default_rng(0)
    keys = np.repeat(rng.normal(size=(1, 5, 4)), 2, axis=1).astype(np.float32)
    slots = np.asarray(matched(keys, 4))
    weights = averages(slots, 6, jnp.ones((1, 10)))
    merged = np.asarray(jnp.matmul(weights, keys, precision="highest"))
    np.testing.assert_allclose(merged[0, slots[0]], keys[0], atol=1e-6)


@MANY
@given(merges(), st.integers(0, 2**16))
def test_padding_goes_first_and_what_it_holds_decides_nothing(drawn, seed):
    """Three merges in a row, of sequences that differ in their padding alone."""
    keys, _, real = drawn
    noise = np.random.default_rng(seed).normal(size=keys.shape).astype(np.float32)
    valid = np.arange(keys.shape[1]) < real[:, None]
    both = [keys, np.where(valid[..., None], keys, noise)]
    there = [valid, valid]
    for _ in range(3):
        tokens = both[0].shape[1]
        count = min(round(0.3 * tokens), mergeable(tokens))
        left, padding = tokens - count, (~there[0]).sum(1)
        for i, x in enumerate(both):
            weights = averages(matched(x, count, there[i]), left, there[i])
            both[i], there[i] = np.asarray(weights @ x), np.asarray(weights.any(-1))
        np.testing.assert_array_equal(*there)
        np.testing.assert_array_equal(*(x[there[0]] for x in both))
        assert ((~there[0]).sum(1) <= padding).all()


def test_padding_at_even_places_is_merged_before_real_tokens():
    keys = np.random.default_rng(0).normal(size=(1, 12, 4))
    valid = np.arange(12)[None] < 6  # evens 6, 8 and 10 are padding
    slots = np.asarray(matched(keys, 3, valid))[0]
    assert len(set(slots[:6])) == 6
    assert not set(slots[6::2]) & set(slots[:6])


def test_zero_keys_and_bfloat16_are_fine():
    keys = jnp.zeros((2, 8, 4), jnp.bfloat16).at[1].set(1.0)
    slots = matched(keys, 3)
    assert len(set(np.asarray(slots)[0])) == 5
    alone = jax.vmap(lambda row: matched(row[None], 3)[0])(keys)
    np.testing.assert_array_equal(slots, alone)
