"""Schedule values, decay mask, rates per part, clipping and accumulation."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmm_jax import optim
from lmm_jax.optim import OptimConfig


def parameters() -> dict:
    tree = {
        "connector": {"kernel": [[1.0, -2.0]], "bias": [3.0]},
        "embed": {"table": [[0.5], [1.5]]},
        "layers": {
            "norm": {"scale": [[1.0], [1.0]]},
            "q": {"kernel": [[2.0], [2.0]], "bias": [[1.0], [1.0]]},
        },
    }
    is_leaf = lambda x: isinstance(x, list)  # noqa: E731
    return jax.tree.map(lambda x: np.array(x, np.float32), tree, is_leaf=is_leaf)


def first_update(config: OptimConfig, params: dict, gradient: dict) -> tuple:
    """(updates, state) of the first step."""
    transformation, _ = optim.make(config, 10, params)

    @jax.jit
    def run(params, gradient):
        return transformation.update(gradient, transformation.init(params), params)

    return run(params, gradient)


def test_cosine_schedule_of_the_llava_recipe():
    steps = 5198
    schedule = optim.make_schedule(OptimConfig(lr=2e-5, warmup_ratio=0.03), steps)
    warmup = 156  # ceil(155.94)
    half = warmup + (steps - warmup) // 2
    expected = {
        0: 0.0,
        1: 2e-5 / warmup,
        warmup: 2e-5,
        half: 1e-5,
        steps - 1: 1e-5 * (1 + math.cos(math.pi * (1 - 1 / (steps - warmup)))),
        steps: 0.0,
    }
    for step, value in expected.items():
        np.testing.assert_allclose(schedule(step), value, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "middle", "end"),
    [("cosine", 0.6, 0.2), ("linear", 0.6, 0.2), ("constant", 1.0, 1.0)],
)
def test_schedules_end_at_the_final_ratio(name, middle, end):
    config = OptimConfig(lr=1.0, warmup_steps=4, schedule=name, final_lr_ratio=0.2)
    schedule = optim.make_schedule(config, 24)
    values = [float(schedule(step)) for step in (0, 2, 4, 14, 24)]
    np.testing.assert_allclose(values, [0, 0.5, 1, middle, end], atol=1e-6)


def test_without_warm_up_the_first_step_has_the_full_rate():
    assert optim.make_schedule(OptimConfig(lr=0.3), 1)(0) == pytest.approx(0.3)


def test_decay_mask_spares_biases_norms_and_embeddings():
    assert optim.decay_mask(OptimConfig(lr=1.0), parameters()) == {
        "connector": {"kernel": True, "bias": False},
        "embed": {"table": False},
        "layers": {
            "norm": {"scale": False},
            "q": {"kernel": True, "bias": False},
        },
    }


def test_decay_shrinks_only_what_the_mask_says():
    params = parameters()
    config = OptimConfig(lr=0.1, weight_decay=0.5, schedule="constant")
    updates, _ = first_update(config, params, jax.tree.map(np.zeros_like, params))
    np.testing.assert_allclose(
        updates["layers"]["q"]["kernel"], -0.05 * params["layers"]["q"]["kernel"]
    )
    for spared in (updates["embed"], updates["layers"]["norm"]):
        assert all(not np.any(leaf) for leaf in jax.tree.leaves(spared))


def test_rates_per_part():
    params = parameters()
    config = OptimConfig(lr=0.1, schedule="constant", lr_scale={"layers": 0.01})
    updates, _ = first_update(config, params, jax.tree.map(np.ones_like, params))
    np.testing.assert_allclose(updates["connector"]["kernel"], -0.1, rtol=1e-5)
    np.testing.assert_allclose(updates["layers"]["q"]["kernel"], -0.001, rtol=1e-5)


def test_clipping_rescales_to_the_norm():
    params = parameters()
    huge = jax.tree.map(lambda x: np.full_like(x, 1e3), params)
    count = sum(x.size for x in jax.tree.leaves(params))
    small = jax.tree.map(lambda x: np.full_like(x, 0.5 / math.sqrt(count)), params)
    moments = []
    for clip, gradient in ((0.5, huge), (None, small)):
        _, state = first_update(OptimConfig(lr=0.1, clip=clip), params, gradient)
        moments.append(optax.tree.get(state, "mu")["connector"]["kernel"])
    np.testing.assert_allclose(*moments, rtol=1e-6)


def test_first_moment_dtype():
    params = parameters()
    transformation, _ = optim.make(OptimConfig(lr=1.0, mu_dtype="bfloat16"), 9, params)
    state = jax.eval_shape(transformation.init, params)
    moments = [optax.tree.get(state, name)["connector"] for name in ("mu", "nu")]
    assert [m["kernel"].dtype for m in moments] == [jnp.bfloat16, jnp.float32]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"warmup_ratio": 0.1, "warmup_steps": 5}, "give one of them"),
        ({"warmup_ratio": 1.0}, r"\[0, 1\)"),
        ({"clip": 0.0}, "None turns it off"),
        ({"schedule": "cosin"}, "'cosin'"),
        ({"warmup_steps": 10}, "10 warm-up steps leave nothing of 10"),
        ({"lr_scale": {"vision": 0.1}}, "'vision' matches no parameter"),
        ({"lr_scale": {"layers": 0.1, ".*/bias": 1.0}}, "both match"),
    ],
)
def test_bad_configs_are_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        optim.make(OptimConfig(lr=1.0, **fields), 10, parameters())


def test_nothing_to_learn_is_refused():
    with pytest.raises(ValueError, match="no parameter learns"):
        optim.make(OptimConfig(lr=1.0), 10, {})
