"""Programs grow with the number of cuts, not of layers."""

from __future__ import annotations

import dataclasses

import jax
import pytest

from lmm_jax import strategies
from lmm_jax.depth import make_plan
from lmm_jax.models import lmm
from tests.tiny import BUDGETS, CROPS, PREFIX, SPEC, SUFFIX

DEPTHS = (6, 32)


def size(name: str, depth: int) -> int:
    """Characters of the program that makes gradients, before it is compiled."""
    language = dataclasses.replace(SPEC.language, depth=depth)
    spec = dataclasses.replace(SPEC, language=language)
    geometry = lmm.geometry(spec, images=1, crops=CROPS, prefix=PREFIX, suffix=SUFFIX)
    plan = make_plan(geometry, strategies.build({name: BUDGETS[name]}, geometry))
    model = lmm.LMM(spec, plan)
    params = jax.eval_shape(lambda key: lmm.init(model, key), jax.random.key(0))

    def loss(params, batch):
        return model.apply({"params": params}, batch, method="score")[0].sum()

    batch = lmm.abstract_batch(model, 1)
    return len(jax.jit(jax.grad(loss)).lower(params, batch).as_text())


@pytest.mark.parametrize("name", ["llava", "deepstack", "fastv", "flashsloth"])
def test_depth_costs_no_program(name):
    few, many = (size(name, depth) for depth in DEPTHS)
    assert few < many < 1.1 * few  # a loop over one layer is none
