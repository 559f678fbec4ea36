"""METER, with and without PuMer's reducers, against the reference's numbers."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest

from lmm_jax.checkpoint.params import from_published
from lmm_jax.depth import Context, Mix, Plan, TokenState, make_plan
from lmm_jax.depth.planner import Scan
from lmm_jax.hub.families.meter import co_layers
from lmm_jax.hub.positions import Interpolated
from lmm_jax.models import heads, meter
from lmm_jax.nn import coattention
from lmm_jax.nn.coattention import CoAttentionStack
from lmm_jax.strategies import pumer
from tests.golden import meter as golden
from tests.golden import reference
from tests.golden.reference import Fixture

STREAMS = ("meter_coattn_a", "meter_coattn_b", "meter_coattn_merge_off")
WHOLE = ("meter_vqa_a", "meter_vqa_pads", "meter_nlvr2_a")
CLOSE = dict(rtol=0, atol=2e-5)
VARIANTS = {
    "plain_sequential": ("sequential", False),
    "plain_parallel": ("parallel", False),
    "pumer": ("sequential", True),
}


def edits(f: Fixture, sizes):
    """The reducers of a fixture; the reference drops nothing where it merges nothing."""
    r = f.meta["config"]["reduce"]
    return pumer.edits(
        sizes,
        layers=co_layers(r["layers"]),
        prune=r["prune"] if r["merge_image"] else 0.0,
        merge=r["merge_image"],
        text=r["merge_text"],
        preset="reference",
    )


def streams(f: Fixture, order: str, reduced: bool):
    """The layers alone: stack, parameters, state at the entrance, plan."""
    c, block = f.meta["config"], golden.block(f, order)
    stack = CoAttentionStack(block, c["coattn_layers"], order)
    sizes = dataclasses.replace(
        meter.geometry(meter.b_16(), text=c["text_len"]),
        language=block.geometry(stack.depth),
        patches=c["image_len"] - 1,
    )
    plan = make_plan(sizes, edits(f, sizes) if reduced else ())
    rows = coattention.params(block, meter.LAYERS, meter.BLOCK)
    mask = f["in/text_mask"] > 0
    state = heads.entrance(f["in/text"], f["in/image"], mask)
    run = functools.partial(stack.init, steps=(), ctx=Context(), method="run")
    abstract = jax.eval_shape(run, jax.random.key(0), state)["params"]
    return stack, from_published(f.params, rows, abstract), state, plan


def layer_by_layer(run, state: TokenState, plan: Plan):
    """The state after each layer, and what every cut saw and decided, by its name."""
    told, states = {}, []

    def telling(edit):
        def op(state, seen, ctx):
            told[edit.name] = state, seen, edit.op(state, seen, ctx)
            return told[edit.name][-1]

        return op

    ops = {edit.name: telling(edit) for edit in plan.edits}
    for step in plan.language:
        for layer in range(step.start, step.stop):
            scan = Scan(layer, layer + 1)
            state = run(state, scan if isinstance(step, Scan) else step, ops)
            states.append(state)
    return states, told


def check_layers(f: Fixture, prefix: str, stack, params, state, plan: Plan) -> None:
    """Both streams, the text's mask and every decision, layer by layer."""

    @jax.jit
    def run(params, state):
        bound = stack.bind({"params": params})

        def one(state, step, ops):
            return bound.run(state, (step,), Context(), ops=ops).state

        return layer_by_layer(one, state, plan)

    states, told = run(params, state)
    for layer, state in enumerate(states):
        text, image = (state.layout.slice(span) for span in meter.SPANS)
        right = f[f"out/{prefix}.text{layer}"], f[f"out/{prefix}.image{layer}"]
        np.testing.assert_allclose(state.hidden[:, text], right[0], **CLOSE)
        np.testing.assert_allclose(state.hidden[:, image], right[1], **CLOSE)
        if (mask := f.arrays.get(f"out/{prefix}.text_mask{layer}")) is not None:
            np.testing.assert_allclose(state.place.share[:, text], mask, **CLOSE)
        check_decisions(f, f"out/{prefix}.layer{layer}", layer, told)


def check_decisions(f: Fixture, at: str, layer: int, told: dict) -> None:
    if f"{at}_image_assign" in f.arrays:
        state, seen, mix = told[f"pumer_{layer}"]
        op = pumer.Visual(1, 1, "attention", safe=False, leads=False)
        np.testing.assert_allclose(op.scores(state, seen), f[f"{at}_saliency"], **CLOSE)
        check_slots(mix, f[f"{at}_top_idx"], f[f"{at}_image_assign"])
    if f"{at}_text_assign" in f.arrays:
        *_, mix = told[f"pumer_{layer}_text"]
        slots = f[f"{at}_text_assign"]
        check_slots(mix, np.indices(slots.shape)[1], slots)


def check_slots(mix: Mix, tokens: np.ndarray, slots: np.ndarray) -> None:
    """`tokens` [B, K] end in `slots` [B, K], all others nowhere."""
    members = np.zeros(mix.weights.shape, bool)
    rows = np.arange(len(tokens))[:, None]
    members[rows, slots, tokens] = True
    np.testing.assert_array_equal(mix.weights > 0, members)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", STREAMS)
def test_layers(name, variant):
    f = reference.load(f"pumer/{name}")
    check_layers(f, variant, *streams(f, *VARIANTS[variant]))


@pytest.mark.parametrize("name", STREAMS)
def test_gradients(name):
    f = reference.load(f"pumer/{name}")
    stack, params, state, plan = streams(f, "sequential", True)
    text, image = f["in/cotangent_text"], f["in/cotangent_image"]

    @jax.jit
    @jax.grad
    def gradient(hidden):
        bound = stack.bind({"params": params})
        out = bound.run(state.replace(hidden=hidden), plan.language, Context()).state
        return (out.hidden * np.concatenate([text, image], axis=1)).sum()

    right = np.concatenate([f["grad/text"], f["grad/image"]], axis=1)
    bound = 1e-4 * np.abs(right).max()
    np.testing.assert_allclose(gradient(state.hidden), right, rtol=0, atol=bound)


@functools.cache
def whole(name: str, reduced: bool):
    f = reference.load(f"pumer/{name}")
    sizes = meter.geometry(golden.spec(f), text=f["in/input_ids"].shape[1])
    model = meter.Meter(
        golden.spec(f), make_plan(sizes, edits(f, sizes) if reduced else ())
    )
    return f, model, golden.params(f, model), golden.batch(f)


@functools.partial(jax.jit, static_argnums=0)
def entered(model, params, batch):
    return model.apply({"params": params}, batch, method="enter")


@pytest.mark.parametrize("name", WHOLE)
def test_what_enters_the_layers(name):
    f, model, params, batch = whole(name, False)
    found = entered(model, params, batch).hidden
    images = [""] if "out/cross_in_text" in f.arrays else ["image1.", "image2."]
    for i, image in enumerate(images):
        right = (f[f"out/{image}cross_in_{stream}"] for stream in ("text", "image"))
        right = np.concatenate(list(right), axis=1)
        np.testing.assert_allclose(found[i :: len(images)], right, **CLOSE)


@pytest.mark.parametrize("variant", ["plain", "pumer"])
@pytest.mark.parametrize("name", WHOLE)
def test_whole_models(name, variant):
    f, model, params, batch = whole(name, variant == "pumer")

    @jax.jit
    def run(params, batch):
        return model.apply({"params": params}, batch, method="score")[0]["logits"]

    right = f[f"out/{variant}.logits"]
    np.testing.assert_allclose(run(params, batch), right, **CLOSE)


@pytest.mark.parametrize("variant", ["plain", "pumer"])
@pytest.mark.parametrize("name", WHOLE)
def test_layers_of_whole_models(name, variant):
    f, model, params, batch = whole(name, variant == "pumer")
    before = entered(model, params, batch)
    images = batch["images"].shape[1]
    stack = CoAttentionStack(model.spec.block, model.spec.depth, model.spec.order)
    for i in range(images):
        of = variant if images == 1 else f"{variant}.image{i + 1}"
        if f"out/{of}.text0" in f.arrays:
            state = jax.tree.map(lambda x, i=i: x[i::images], before)
            check_layers(f, of, stack, params["stack"], state, model.plan)


@pytest.mark.parametrize("old, new", [(4, 7), (6, 4), (5, 8)])
def test_positions_of_another_size(old, new):
    f = reference.load("pumer/meter_pos_resize")
    table = Interpolated(f[f"in/pos_{old}to{new}"], old, new)
    np.testing.assert_allclose(table[:, :], f[f"out/pos_{old}to{new}"], **CLOSE)
