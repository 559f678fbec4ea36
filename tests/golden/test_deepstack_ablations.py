"""The ablations of DeepStack that are options or compositions of strategies here."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from lmm_jax import strategies
from lmm_jax.depth import make_plan
from lmm_jax.models import lmm
from tests.golden import reference

CLOSE = dict(rtol=1e-4, atol=1e-4)


def fixture():
    return reference.load("deepstack/ablations")


def chosen(flag, sampling, start):
    """The reference's switch in our words."""
    late = dict(start=start, inputs=False)
    return {
        "": dict(deepstack=dict(start=start, order=sampling)),
        "dummy_local": dict(deepstack_whole=dict(start=start, groups=4)),
        "only_global_features": dict(deepstack_whole=late),
        "global_and_local": dict(deepstack_whole=late, deepstack=dict(start=start + 1)),
        "string_woglobal": dict(llava_hires=dict(whole=False)),
        "string_withglobal": dict(llava_hires={}),
    }[flag]


@pytest.mark.parametrize(
    "variant", fixture().meta["config"]["variants"], ids=lambda variant: variant["key"]
)
def test_logits(variant):
    f, key = fixture(), variant["key"]
    spec = reference.lmm_spec(f.meta["config"])
    crops, width = f.meta["config"]["ds"]["num_crops"], f["in/input_ids"].shape[1]
    geometry = lmm.geometry(spec, images=1, crops=crops, prefix=0, suffix=width)
    named = chosen(variant["flag"], variant["sampling"], variant["start"])
    model = lmm.LMM(spec, make_plan(geometry, strategies.build(named, geometry)))
    params = reference.lmm_params(f, model)
    batch = reference.batch(f, model.plan, f["in/input_ids"], f["in/attention_mask"])
    state, logits = reference.run(model, params, batch)
    for ours, theirs in zip(reference.in_order(logits, state), f[f"out/logits_{key}"]):
        np.testing.assert_allclose(ours, theirs[: len(ours)], **CLOSE)
    if variant["flag"].startswith("string"):
        enter = jax.jit(lambda p, b: model.apply(p, b, None, method="_enter")[0])
        state = enter({"params": params}, batch)
        visual = state.hidden[:, state.layout.slice("visual")]
        np.testing.assert_allclose(visual, f[f"out/image_features_{key}"], **CLOSE)
