"""Laws of learned tokens that read question and image once (`depth.Query`)."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from lmm_jax.depth import Role
from tests.tiny import PREFIX

CLOSE = dict(rtol=0, atol=2e-5)
NAME = "flashsloth_query"


@pytest.fixture(scope="module")
def plan(tiny):
    return tiny.plan(tiny.strategy("flashsloth"))


def silent(params):
    """Queries that add nothing."""
    up = jax.tree.map(np.zeros_like, params[NAME_OF]["up"])
    return {**params, NAME_OF: {**params[NAME_OF], "up": up}}


NAME_OF = f"strategy_{NAME}"


def changed(tiny, plan, batch, others) -> np.ndarray:
    """Where logits of one batch differ from those of another, bool [B, T]."""
    one, two = tiny.logits(plan, batch), tiny.logits(plan, others)
    return np.abs(one - two).max(-1) > 2e-5


def test_they_act_from_their_place_on_and_only_with_an_image(plan, tiny):
    batch = tiny.batch(plan)
    with_them, without = (
        tiny.logits(plan, batch, params)
        for params in (tiny.params, silent(tiny.params))
    )
    acts = np.abs(with_them - without).max(-1) > 1e-4
    first = np.argmax(batch["role"] == Role.QUERY, axis=1)
    for row, start in enumerate(first):
        # The logits of slot t are read just before it.
        assert not acts[row, : start + 1].any()
        assert acts[row, start + 1 :].any() == batch["views"][row].any()
    text_only = ~batch["views"].any((1, 2))
    np.testing.assert_array_equal(with_them[text_only], without[text_only])


def test_a_text_only_row_gives_no_gradient(plan, tiny):
    batch = {k: x[2:] for k, x in tiny.batch(plan).items()}
    assert not batch["views"].any()
    model = tiny.model(plan)

    @jax.jit
    @jax.grad
    def gradient(params):
        logits, _ = model.apply({"params": params}, batch, method="score")
        return (logits * batch["loss_mask"][..., None]).sum()

    ours = gradient(tiny.params)[NAME_OF]
    tokens = ours.pop("tokens")
    assert np.abs(tokens).max() > 0  # they are tokens like any other
    assert not any(np.any(x) for x in jax.tree.leaves(ours))


def test_they_read_features_that_pooling_hides(plan, tiny):
    """Opposite changes of two patches of a window, with a scorer that weighs all alike."""
    pool = tiny.params["strategy_flashsloth"]
    params = {**tiny.params, "strategy_flashsloth": jax.tree.map(np.zeros_like, pool)}
    model, batch = tiny.model(plan), tiny.batch(plan)

    def run(params, shift):
        def both(model):
            vision = model.features(batch)
            hidden = vision.hidden.at[:, :, 0, 0].add(shift).at[:, :, 0, 1].add(-shift)
            vision = vision.replace(hidden=hidden)
            return model.connect(vision), model.memory(vision, batch).hidden

        return model.apply({"params": params}, method=both)

    visual, memory = jax.jit(run)(params, 0.0)
    same, other = jax.jit(run)(params, 0.5)
    np.testing.assert_allclose(same, visual, **CLOSE)
    assert np.abs(np.asarray(other) - np.asarray(memory)).max() > 0.4


def test_each_group_has_a_question_of_its_own(plan, tiny):
    """Two turns in a row: what the second asks is nothing to the first group, and the
    second group does not read what the first turn asked, except through attention."""
    batch = two_turns(tiny.batch(plan), plan)
    tiny_module = tiny.model(plan)
    state = tiny.run(plan, batch)
    assert np.isfinite(state.hidden).all() and tiny_module
    other = dict(batch, tokens=batch["tokens"].copy())
    second = (batch["role"] == Role.QUESTION) & (batch["turn"] == 1)
    other["tokens"][second] = (other["tokens"][second] + 1) % 100 + 3
    differs = changed(tiny, plan, batch, other)
    later = np.argmax(batch["turn"] == 1, axis=1)
    for row, at in enumerate(later):
        assert not differs[row, :at].any() and differs[row, at:].any()


def two_turns(batch, plan):
    """The suffix's first tokens are a turn: one question token, its queries, a token."""
    out = {k: x.copy() for k, x in batch.items()}
    count = plan.queries[0].count
    out["role"][:, PREFIX] = Role.QUESTION
    out["role"][:, PREFIX + 1 : PREFIX + 1 + count] = Role.QUERY
    out["tokens"][:, PREFIX + 1 : PREFIX + 1 + count] = np.arange(count)
    out["role"][:, PREFIX + 1 + count] = Role.ASSISTANT
    out["turn"][:, PREFIX + 2 + count :] = 1
    return out
