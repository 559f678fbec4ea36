"""Decoding: parameters apart or stacked, sampling, and where an answer stops."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from lmm_jax.decode import prepared

TOLERANCE = dict(rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["deepstack", "fastv"])
def test_layers_apart_give_the_same_logits(name, tiny):
    plan = tiny.plan(tiny.strategy(name))
    model, batch = tiny.model(plan), tiny.batch(plan)
    stacked = jax.device_put(tiny.params, jax.devices()[0])
    prefill = jax.jit(lambda p, b: model.apply(p, b, slots=2, method="prefill"))
    decode = jax.jit(lambda p, t, c: model.apply(p, t, c, method="decode"))
    both = []
    for params in (stacked, prepared(stacked)):
        first, cache = prefill({"params": params}, batch)
        logits = [first]
        for _ in range(2):
            tokens = logits[-1].argmax(-1)
            now, cache = decode({"params": params}, tokens, cache)
            logits.append(now)
        both.append(np.stack(logits))
    assert isinstance(params["language"]["stack"]["layers"], tuple)
    np.testing.assert_allclose(*both, **TOLERANCE)


def test_layers_apart_are_views(tiny):
    stacked = jax.device_put(tiny.params, jax.devices()[0])
    layers = prepared(stacked)["language"]["stack"]["layers"]
    kernel = stacked["language"]["stack"]["layers"]["up"]["kernel"]
    start = kernel.unsafe_buffer_pointer()
    offsets = [x["up"]["kernel"].unsafe_buffer_pointer() - start for x in layers]
    assert offsets == [i * kernel[0].nbytes for i in range(len(kernel))]
