"""DeepStack-V against the reference implementation."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest

from lmm_jax import strategies
from lmm_jax.depth import make_plan
from lmm_jax.models import lmm
from tests.golden import reference

CLOSE = dict(rtol=1e-4, atol=1e-4)
FILES = ("deepstack_v", "deepstack_v_post")


@functools.cache
def load(name):
    """Blocks that the reference appends to the tower are the last of a deeper one here."""
    f = reference.load(f"deepstack/{name}")
    published = f.meta["config"]["vision"]["num_hidden_layers"]

    def key(found):
        layer = published + int(found[1])
        return f"vision_tower.vision_model.encoder.layers.{layer}."

    arrays = {re.sub(r"post_encoder\.(\d+)\.", key, k): x for k, x in f.arrays.items()}
    return dataclasses.replace(f, arrays=arrays)


def build(f, start, run=None):
    """The model; its tower reads up to layer `run`, or up to the reference's."""
    spec = reference.lmm_spec(f.meta["config"])
    if run is not None:
        spec = dataclasses.replace(
            spec, vision=dataclasses.replace(spec.vision, run=run)
        )
    crops, width = f.meta["config"]["ds"]["num_crops"], f["in/input_ids"].shape[1]
    geometry = lmm.geometry(spec, images=1, crops=crops, prefix=0, suffix=width)
    edits = strategies.build({"deepstack_v": dict(start=start)}, geometry)
    return lmm.LMM(spec, make_plan(geometry, edits))


def given(f, model):
    batch = reference.batch(f, model.plan, f["in/input_ids"], f["in/attention_mask"])
    return {"params": reference.lmm_params(f, model)}, batch


def cases():
    starts = {name: load(name).meta["config"]["start_layers"] for name in FILES}
    return [(name, start) for name in FILES for start in starts[name]]


@pytest.mark.parametrize(("name", "start"), cases())
def test_features_and_logits(name, start):
    f = load(name)
    model = build(f, start)
    params, batch = given(f, model)

    @jax.jit
    def features(params, batch):
        found = model.apply(params, batch, method="features").hidden
        return found, model.apply(params, found, method=lambda m, x: m.connector(x))

    tower, image = features(params, batch)
    assert tower.shape[1:3] == (1, 1)  # one image, and one view is left of it
    np.testing.assert_allclose(
        tower[:, 0, 0], f[f"out/tower_features_N{start}"], **CLOSE
    )
    np.testing.assert_allclose(
        image[:, 0, 0], f[f"out/image_features_N{start}"], **CLOSE
    )

    state, logits = reference.run(model, params["params"], batch)
    for ours, theirs in zip(
        reference.in_order(logits, state), f[f"out/logits_N{start}"]
    ):
        np.testing.assert_allclose(ours, theirs[: len(ours)], **CLOSE)


@pytest.mark.parametrize("name", FILES)
def test_hidden_states(name):
    """What enters every layer of the view of the whole image, and what leaves the last."""
    f = load(name)
    start = f.meta["config"]["start_layers"][0]
    depth = build(f, start).spec.vision.depth
    for layer in range(depth + 1):
        model = build(f, start, run=layer)
        params, batch = given(f, model)
        found = jax.jit(functools.partial(model.apply, method="features"))(
            params, batch
        )
        theirs = f[f"out/hidden_{layer}_N{start}"][:, 1:]  # without [CLS]
        ours = found.hidden[:, 0, 0]
        np.testing.assert_allclose(ours, theirs, **CLOSE, err_msg=f"layer {layer}")


@pytest.mark.parametrize(("name", "start"), cases())
def test_the_last_layer(name, start):
    f = load(name)
    model = build(f, start, run=build(f, start).spec.vision.depth)
    params, batch = given(f, model)
    found = jax.jit(functools.partial(model.apply, method="features"))(params, batch)
    theirs = f[f"out/last_hidden_state_N{start}"][:, 1:]
    np.testing.assert_allclose(found.hidden[:, 0, 0], theirs, **CLOSE)
