"""Products of compiled programs, beside hand counts and XLA's own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from lmm_jax.eval import products

X, W = jnp.ones((32, 64)), jnp.ones((6, 64, 64))
ONE = 2 * 32 * 64 * 64


def stack(w, x, unroll=1):
    step = lambda h, w: (jnp.tanh(h @ w), None)  # noqa: E731
    return jax.lax.scan(step, x, w, unroll=unroll)[0].sum()


def compiled(function, *args):
    return jax.jit(function).lower(*args).compile()


@pytest.mark.parametrize(
    ("function", "count"),
    [
        (stack, 6),
        (jax.grad(stack), 6 * 3),
        (lambda w, x: stack(w, x, unroll=3), 6),
        (lambda w, x: stack(jnp.concatenate([w] * 2), x) + (x @ w[0]).sum(), 13),
        (lambda w, x: jax.lax.map(lambda x: stack(w, x), jnp.stack([x] * 4)), 24),
    ],
)
def test_loops_count_as_often_as_they_run(function, count):
    assert products.flops(compiled(function, W, X).as_text()) == count * ONE


def test_without_loops_xla_agrees():
    program = compiled(lambda w, x: stack(w, x, unroll=6), W, X)
    ours = products.flops(program.as_text())
    assert ours == pytest.approx(program.cost_analysis()["flops"], rel=0.02)


def test_patches_are_products_too():
    images, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((4, 4, 3, 10))

    def embed(images, kernel):
        form = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            images, kernel, (4, 4), "VALID", dimension_numbers=form
        )

    text = compiled(embed, images, kernel).as_text()
    assert products.flops(text) == 2 * (2 * 2 * 2 * 10) * (4 * 4 * 3)


def test_what_cannot_be_counted_is_not_guessed():
    def until(x):
        return jax.lax.while_loop(lambda x: x.sum() < 1e9, lambda x: x @ W[0], x)

    assert products.flops(compiled(until, X).as_text()) is None
    library = (
        'ENTRY %main {\n  %a = f32[2] custom-call(), custom_call_target="__x$gemm"'
    )
    assert products.flops(library) is None
