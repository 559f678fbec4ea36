"""A stack in chunks against the whole one, on tokens that stand anywhere."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmm_jax.depth import Context, Layer, Layout, Scan, TokenState
from lmm_jax.models import specs
from lmm_jax.nn.lora import Lora
from lmm_jax.nn.rope import Interleaved, RopeSpec
from lmm_jax.nn.stack import LayerStack

B, T, D, DEPTH = 2, 23, 16, 3
BLOCK = specs.llama_block(D, 4, 24, kv_heads=2)
BLOCKS = {
    "plain": BLOCK,
    "window": dataclasses.replace(BLOCK, window=5),
    "bidirectional": dataclasses.replace(BLOCK, causal=False),
    "parallel": dataclasses.replace(BLOCK, parallel=True, norm="layer"),
    "adapters": dataclasses.replace(BLOCK, lora=Lora(2, 4.0, 0.0, ("q", "v", "up"))),
    "coordinates": dataclasses.replace(
        BLOCK, qk_norm=True, rope=RopeSpec(axes=Interleaved(1, 1))
    ),
}
STEPS = (Layer(0, observe=("last_attention",)), Scan(1, DEPTH))


def anywhere(length: int = T, seed: int = 0) -> TokenState:
    """Two packed examples a row: equal positions, empty slots, shares, in no order."""
    rng = np.random.default_rng(seed)
    shape = (B, length)
    return TokenState(
        hidden=rng.normal(size=(*shape, D)).astype(np.float32),
        positions=rng.integers(0, length, shape, np.int32),
        valid=rng.random(shape) < 0.8,
        segment=rng.integers(0, 2, shape, np.int32),
        role=np.zeros(shape, np.int8),
        turn=np.zeros(shape, np.int32),
        size=np.ones(shape, np.float32),
        gate=rng.uniform(0.2, 1, shape).astype(np.float32),
        coords=rng.integers(0, length, (*shape, 3), np.int32),
        layout=Layout.of({"suffix": length}),
    )


def run(stack, params, state, chunk):
    out = stack.apply(
        {"params": params},
        state,
        STEPS,
        Context(),
        collect=True,
        chunk=chunk,
        method="run",
    )
    return out.state.hidden, out.runs


def fresh(stack):
    """Parameters none of which is a zero or a one: adapters and norms start as such."""
    init = functools.partial(stack.init, method="run")
    key, state = jax.random.key(0), anywhere()
    abstract = jax.eval_shape(lambda: init(key, state, STEPS, Context()))["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: 0.3 * rng.normal(size=x.shape).astype(np.float32), abstract
    )


@pytest.mark.parametrize(
    ("block", "chunk"),
    [*((name, 6) for name in BLOCKS), *(("plain", n) for n in (1, T - 1, T))],
)
def test_any_tokens(block, chunk):
    stack = LayerStack(BLOCKS[block], DEPTH)
    both = jax.jit(lambda p, s: [run(stack, p, s, size) for size in (0, chunk)])
    whole, found = both(fresh(stack), anywhere())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, whole)


def test_gradients():
    stack = LayerStack(BLOCK, DEPTH, remat="full")

    def loss(params, chunk):
        return jnp.square(run(stack, params, anywhere(), chunk)[0]).mean()

    both = jax.jit(lambda p: [jax.grad(loss)(p, size) for size in (0, 6)])
    whole, found = both(fresh(stack))
    assert max(np.abs(x).max() for x in jax.tree.leaves(whole)) > 1e-2
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, whole)


def test_memory_falls_with_the_chunk():
    stack, state = LayerStack(BLOCK, DEPTH), anywhere(256)
    params = fresh(stack)

    def temporary(chunk):
        compiled = jax.jit(lambda p, s: run(stack, p, s, chunk)).lower(params, state)
        return compiled.compile().memory_analysis().temp_size_in_bytes

    whole, half, little = (temporary(chunk) for chunk in (0, 128, 16))
    assert whole > 1.5 * half > 8 * little
