"""What is to be computed again is not merged with what was computed first."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmm_jax.depth import Context, Layer, Scan
from lmm_jax.nn.stack import LayerStack
from tests.nn.test_chunk import BLOCK, DEPTH, anywhere, fresh

ONE_BY_ONE = tuple(Scan(layer, layer + 1) for layer in range(DEPTH))


def gradient(steps, remat: str, unroll: int = 1):
    """A function of the parameters, which come with it."""
    stack, state = LayerStack(BLOCK, DEPTH, remat=remat, unroll=unroll), anywhere()

    def loss(params):
        out = stack.apply({"params": params}, state, steps, Context(), method="run")
        return jnp.square(out.state.hidden).mean()

    return jax.jit(jax.grad(loss)), fresh(stack)


def barrier(steps, remat: str, unroll: int = 1) -> bool:
    """Whether something keeps XLA from merging, in the gradient's program."""
    run, params = gradient(steps, remat, unroll)
    return "optimization_barrier" in run.lower(params).as_text()


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_only_what_stays_a_loop_needs_no_barrier(remat):
    assert not barrier((Scan(0, DEPTH),), remat)
    assert barrier((Scan(0, DEPTH),), remat, unroll=0)
    assert barrier(ONE_BY_ONE, remat)
    assert barrier((Layer(0, observe=("last_attention",)), Scan(1, DEPTH)), remat)


def test_what_keeps_all_needs_none():
    assert not barrier(ONE_BY_ONE, "none")


def test_layers_one_by_one_have_the_gradients_of_a_loop():
    found, whole = (
        run(params)
        for run, params in (
            gradient(ONE_BY_ONE, "full"),
            gradient((Scan(0, DEPTH),), "none"),
        )
    )
    assert max(np.abs(x).max() for x in jax.tree.leaves(whole)) > 1e-2
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, whole)
