"""What is to be computed again is not merged with what was computed first."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from lmm_jax.depth import Context, Layer, Scan
from lmm_jax.nn.stack import LayerStack
from tests.nn.test_chunk import BLOCK, DEPTH, anywhere, fresh

ONE_BY_ONE = tuple(Scan(layer, layer + 1) for layer in range(DEPTH))


def barrier(steps, remat: str, unroll: int = 1) -> bool:
    """Whether something keeps XLA from merging, in the gradient's program."""
    stack, state = LayerStack(BLOCK, DEPTH, remat=remat, unroll=unroll), anywhere()

    def loss(params):
        out = stack.apply({"params": params}, state, steps, Context(), method="run")
        return jnp.square(out.state.hidden).mean()

    text = jax.jit(jax.grad(loss)).lower(fresh(stack)).as_text()
    return "optimization_barrier" in text


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_only_what_stays_a_loop_needs_no_barrier(remat):
    assert not barrier((Scan(0, DEPTH),), remat)
    assert barrier((Scan(0, DEPTH),), remat, unroll=0)
    assert barrier(ONE_BY_ONE, remat)
    assert barrier((Layer(0, observe=("last_attention",)), Scan(1, DEPTH)), remat)


def test_what_keeps_all_needs_none():
    assert not barrier(ONE_BY_ONE, "none")
