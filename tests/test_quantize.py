"""Eight bits: what they cost in accuracy and save in bytes."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from lmm_jax import quantize
from lmm_jax.decode import Generator
from lmm_jax.models import lmm
from lmm_jax.nn.linear import FEW, Int8
from lmm_jax.weights import prepared
from tests.tiny import SPEC


@pytest.fixture(scope="module", params=[False, True], ids=["head", "tied"])
def spec(request):
    language = dataclasses.replace(SPEC.language, tied=request.param)
    return dataclasses.replace(SPEC, language=language)


def test_logits_and_greedy_tokens_stay(spec, tiny):
    plan = tiny.plan()
    model, batch = tiny.model(plan, spec), tiny.batch(plan)
    params = jax.jit(lambda key: lmm.init(model, key))(jax.random.key(0))
    params = jax.device_put(params, jax.devices()[0])
    rounded = quantize.int8(params, spec)
    part = [quantize.size(p["language"]["stack"]) for p in (params, rounded)]
    assert part[1] < 0.3 * part[0]
    run = jax.jit(lambda p, b: model.apply({"params": p}, b, method="score")[0])
    exact, near = run(params, batch), run(rounded, batch)
    error = np.linalg.norm(near - exact) / np.linalg.norm(exact)
    assert 0 < error < 0.02
    generator = Generator(model, 6, end=-1)
    answers = generator(params, batch), generator(prepared(rounded), batch)
    assert (answers[0] == answers[1]).mean() > 0.8


@pytest.mark.parametrize("rows", [1, FEW, FEW + 1])
def test_the_product_is_that_of_the_rounded_matrix(rows):
    rng = np.random.default_rng(0)
    values = rng.integers(-127, 128, (5, 7)).astype(np.int8)
    scale = rng.random(5).astype(np.float32)
    x = rng.normal(size=(rows, 7)).astype(np.float32)
    expected = x @ (values * scale[:, None]).T
    np.testing.assert_allclose(Int8(values, scale).product(x), expected, rtol=1e-5)
