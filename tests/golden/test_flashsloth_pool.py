"""FlashSloth's spatial attention pooling: against the reference, and what must hold."""

from __future__ import annotations

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmm_jax.checkpoint.params import from_published, to_published
from lmm_jax.depth import VisionFeatures
from lmm_jax.strategies import flashsloth
from lmm_jax.strategies.average_pool import PooledViews
from lmm_jax.strategies.flashsloth import AttentionPool
from tests.golden import reference

FILES = ["sap_g6_w2", "sap_g6_w3", "sap_g7_w3_edges", "sap_g9_w3"]
ROWS = AttentionPool.params()


def pooled(params, x, grid: int, window: int):
    """[B, C, P, E] -> [B, C * V, E]; the projection is left out."""
    grids = jnp.zeros((len(x), 1, 2), jnp.int32)
    vision = VisionFeatures(jnp.asarray(x)[:, None], grids)
    op = AttentionPool((grid, grid), window)
    return op.apply({"params": params}, vision, lambda features: features)[:, 0]


def abstract(width: int):
    vision = VisionFeatures(jnp.zeros((1, 1, 1, 9, width)), jnp.zeros((1, 1, 2), int))
    op = AttentionPool((3, 3), 3)
    return jax.eval_shape(
        lambda key: op.init(key, vision, lambda x: x)["params"], jax.random.key(0)
    )


def random(seed: int, width: int, patches: int, views: int = 1):
    """Parameters and features."""
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda p: rng.normal(size=p.shape).astype(np.float32), abstract(width)
    )
    return params, rng.normal(size=(1, views, patches, width)).astype(np.float32)


@pytest.mark.parametrize("name", FILES)
def test_tokens_and_gradients(name):
    f = reference.load(f"flashsloth/{name}")
    c = f.meta["config"]
    params = from_published(f.params, ROWS, abstract(c["channels"]))

    def total(params, x):
        out = pooled(params, x[:, None], c["grid"], c["window"])
        return (out * f["in/cotangent"]).sum(), out

    values = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)
    (_, out), (grads, moved) = values(params, f["in/x"])
    np.testing.assert_allclose(out, f["out/pooled"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(moved, f["grad/in/x"], rtol=0, atol=1e-5)
    for key, grad in to_published(jax.tree.map(np.asarray, grads), ROWS).items():
        np.testing.assert_allclose(grad, f[f"grad/param/{key}"], rtol=0, atol=2e-5)


def filled(number: int, shape: tuple[int, ...], scale: float) -> np.ndarray:
    """The specification's deterministic filler."""
    i = np.arange(1, 1 + np.prod(shape), dtype=np.uint64) + np.uint64(1000003 * number)
    word = np.uint64(0xFFFFFFFF)
    x = i * np.uint64(2654435761) & word
    x ^= x >> np.uint64(15)
    x = x * np.uint64(2246822519) & word
    x ^= x >> np.uint64(13)
    return ((x / 2**32 - 0.5) * scale).astype(np.float32).reshape(shape)


def test_golden_vector():
    spread = 2 * 3**0.5
    tensors = {
        "mlp.0.weight": filled(0, (8, 8), spread / 8**0.5),
        "mlp.0.bias": filled(1, (8,), 0.2),
        "mlp.3.weight": filled(2, (1, 8), spread / 8**0.5),
        "mlp.3.bias": filled(3, (1,), 0.2),
    }
    params = from_published(tensors, ROWS, abstract(8))
    out = pooled(params, filled(103, (1, 1, 36, 8), spread), 6, 3)[0]
    first = (
        "0.059097 -0.601581 -0.517439 0.457924 -0.505859 0.030725 -0.147676 0.314129"
    )
    last = "0.792481 0.179736 0.950612 -0.541487 0.249713 -0.203533 0.173068 0.355335"
    np.testing.assert_allclose(out[0], np.float32(first.split()), atol=2e-6)
    np.testing.assert_allclose(out[3], np.float32(last.split()), atol=2e-6)
    assert out.sum() == pytest.approx(-1.33364, abs=2e-5)
    odd = filled(104, (1, 1, 49, 8), spread)
    out = pooled(params, odd, 7, 3)[0]
    edge = "-0.355956 -0.053830 -0.736094 0.007506 0.429044 -0.292693 0.609256 0.704450"
    np.testing.assert_allclose(out[2], np.float32(edge.split()), atol=2e-6)
    np.testing.assert_allclose(out[8], odd[0, 0, 48], atol=1e-6)


@pytest.mark.parametrize("layer", ["first", "second"])
def test_constant_scores_are_the_mean(layer):
    params, x = random(0, 6, 36)
    params[layer]["kernel"] = np.zeros_like(params[layer]["kernel"])
    means = x.reshape(2, 3, 2, 3, 6).mean((1, 3)).reshape(1, 4, 6)
    np.testing.assert_allclose(pooled(params, x, 6, 3), means, atol=1e-6)


def test_a_shift_of_all_scores_changes_nothing():
    params, x = random(1, 6, 36)
    before = pooled(params, x, 6, 3)
    params["second"]["bias"] += 7
    np.testing.assert_allclose(pooled(params, x, 6, 3), before, atol=1e-5)


SIZES = st.tuples(st.integers(1, 7), st.integers(1, 4), st.integers(0, 9))


@settings(max_examples=25, deadline=None)
@given(SIZES)
def test_a_token_lies_between_the_patches_of_its_window(sizes):
    grid, window, seed = sizes
    params, x = random(seed, 4, grid**2)
    out = np.asarray(pooled(params, x, grid, window))[0]
    side = -(-grid // window)
    assert len(out) == side**2
    maps = x[0, 0].reshape(grid, grid, 4)
    for number, token in enumerate(out):
        row, column = (n * window for n in divmod(number, side))
        inside = maps[row : row + window, column : column + window].reshape(-1, 4)
        assert (inside.min(0) - 1e-5 <= token).all()
        assert (token <= inside.max(0) + 1e-5).all()
    ones = np.ones_like(x)
    np.testing.assert_allclose(pooled(params, ones, grid, window), 1, atol=1e-6)


def test_a_token_depends_on_its_window_alone():
    params, x = random(2, 4, 49)
    moved = jax.jacrev(lambda x: pooled(params, x, 7, 3)[0].sum(-1))(x)
    seen = np.abs(moved[:, 0, 0]).max(-1) > 0  # [token, patch]
    row, column = np.divmod(np.arange(49), 7)
    window = row // 3 * 3 + column // 3
    np.testing.assert_array_equal(seen, window == np.arange(9)[:, None])


def test_a_scorer_that_wants_one_patch_returns_it():
    width = 4
    params = jax.tree.map(lambda p: np.zeros(p.shape, np.float32), abstract(width))
    params["first"]["kernel"][0, 0] = params["second"]["kernel"][0, 0] = 30.0
    _, x = random(3, width, 36)
    x[..., 0] = 0.0
    wanted = [7, 3, 30, 29]  # one patch of each window
    x[0, 0, wanted, 0] = 1.0
    np.testing.assert_allclose(pooled(params, x, 6, 3)[0], x[0, 0, wanted], atol=1e-6)


@pytest.mark.parametrize("pool", ["attention", "average"])
def test_tokens_come_row_by_row_and_view_by_view(pool):
    """Constant scores, and features that say where they come from."""
    row, column = np.divmod(np.arange(36), 6)
    place = np.stack([row, column], -1).astype(np.float32)
    views = np.stack([np.full((36, 1), view, np.float32) for view in range(5)])
    x = np.concatenate([np.broadcast_to(place, (5, 36, 2)), views], -1)[None]
    params = jax.tree.map(lambda p: np.zeros(p.shape, np.float32), abstract(3))
    if pool == "attention":
        out = pooled(params, x, 6, 3)[0]
    else:
        op = PooledViews((6, 6), 3, views=5)
        vision = VisionFeatures(jnp.asarray(x)[:, None], jnp.zeros((1, 1, 2), int))
        out = op(vision, lambda features: features)[0, 0]
    wanted = [
        (1 + 3 * i, 1 + 3 * j, view)
        for view in range(5)
        for i in range(2)
        for j in range(2)
    ]
    np.testing.assert_allclose(out, wanted, atol=1e-6)


@pytest.mark.parametrize("name", ["sap_g6_w2", "sap_g6_w3", "sap_g9_w3"])
def test_average_pooling(name):
    f = reference.load(f"flashsloth/{name}")
    c = f.meta["config"]
    op = PooledViews((c["grid"],) * 2, c["window"])
    vision = VisionFeatures(f["in/x"][:, None, None], jnp.zeros((2, 1, 2), int))
    out = op(vision, lambda features: features)
    np.testing.assert_allclose(out[:, 0], f["out/average_pooled"], atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "tokens"),
    [
        ({"window": 2}, 4),
        ({"window": 3}, 4),
        ({"window": 2, "pool": "average"}, 4),
        ({"window": 1, "pool": "average"}, 16),
    ],
)
@pytest.mark.parametrize("crops", [0, 4])
def test_tokens_of_an_image(arguments, tokens, crops, tiny):
    geometry = dataclasses.replace(tiny.geometry, crops=crops)
    (connect,) = flashsloth.edits(geometry, queries=0, **arguments)
    assert connect.to == (1 + crops) * tokens


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"window": 0}, r"window=0, pool='attention': use a window of 1"),
        ({"pool": "max"}, "pool='max'.* attention, average, none"),
        ({"window": 3, "pool": "average"}, "does not divide the 4 x 4 map"),
    ],
)
def test_refusals(arguments, says, tiny):
    with pytest.raises(ValueError, match=says):
        tiny.strategy("flashsloth", **arguments)
