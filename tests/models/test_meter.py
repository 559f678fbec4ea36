"""METER with and without cuts: what must hold whatever the weights are."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmm_jax import weights
from lmm_jax.depth import Connect, Context, make_plan
from lmm_jax.depth.cost import cost
from lmm_jax.models import encoders, meter
from lmm_jax.models.heads import HeadSpec
from lmm_jax.models.meter import Meter, MeterSpec, co_block
from lmm_jax.models.roberta import TextSpec
from lmm_jax.models.specs import VisionSpec, vit_block
from lmm_jax.strategies import fastv, pumer

ORDERS = ("sequential", "parallel")
TEXT = 11
VALID = np.arange(TEXT) < np.array([TEXT, 6, 3])[:, None]
CUTS = dict(layers=(0, 1), prune=0.2, merge=0.3, text=0.2)


def tiny(order: str, *, soft: bool = False, unroll: int = 0) -> MeterSpec:
    words = dataclasses.replace(vit_block(16, 2, 24, "gelu"), post_norm=True)
    return MeterSpec(
        VisionSpec(20, 4, vit_block(16, 2, 24, "quick_gelu"), 1, 1),
        TextSpec(40, TEXT + 2, words, 1),
        co_block(16, 2, 32, soft_mask=soft),
        3,
        order,
        head=HeadSpec("vqav2", 5, 16),
        unroll=unroll,
    )


def planned(spec: MeterSpec, mode: str = "drop", **cuts) -> Meter:
    sizes = meter.geometry(spec, text=TEXT)
    edits = pumer.edits(sizes, **cuts) if cuts else ()
    return Meter(spec, make_plan(sizes, edits, mode=mode))


@functools.cache
def params():
    """Random in every entry: zeros and ones would hide mistakes."""
    model = planned(tiny("parallel"))
    shapes = jax.eval_shape(lambda key: encoders.init(model, key), jax.random.key(0))
    rng = np.random.default_rng(0)

    def draw(path, x):
        one = path[-1].key == "scale"
        return jnp.asarray(one + 0.3 * rng.normal(size=x.shape), x.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def batch(seed: int = 0, pads: int | None = None):
    """Three examples of different length; `pads` is what empty slots hold."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(2, 40, VALID.shape)
    return {
        "images": rng.normal(size=(3, 1, 20, 20, 3)).astype(np.float32),
        "tokens": np.where(VALID, tokens, tokens if pads is None else pads),
        "valid": VALID,
    }


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params, batch):
    return model.apply({"params": params}, batch, method="score")[0]["logits"]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("cuts", [{}, CUTS])
def test_layers_apart_give_the_same_logits(order, cuts):
    model = planned(tiny(order), **cuts)
    apart = weights.prepared(jax.device_put(params(), jax.devices()[0]))
    for stack in (
        apart["vision"]["stack"],
        apart["text"]["stack"],
        apart["stack"]["text"],
    ):
        assert isinstance(stack["layers"], tuple)
    found = [logits(model, each, batch(pads=1)) for each in (params(), apart)]
    np.testing.assert_allclose(*found, rtol=0, atol=1e-5)


@pytest.mark.parametrize("order", ORDERS)
def test_what_stands_in_empty_slots_decides_nothing(order):
    model = planned(tiny(order), **CUTS)
    one, other = batch(pads=1), batch(pads=7)
    assert (one["tokens"] != other["tokens"]).any()
    found = [logits(model, params(), each) for each in (one, other)]
    np.testing.assert_allclose(*found, rtol=0, atol=1e-5)


def test_as_the_authors_have_it_empty_slots_do_decide():
    model = planned(tiny("sequential", soft=True), **CUTS, preset="reference")
    found = [logits(model, params(), batch(pads=pads)) for pads in (1, 7)]
    assert np.abs(found[0] - found[1])[1:].max() > 1e-3
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("order", ORDERS)
def test_hiding_equals_dropping(order):
    dropped, hidden = (planned(tiny(order), mode, **CUTS) for mode in ("drop", "mask"))
    found = [logits(model, params(), batch(pads=1)) for model in (dropped, hidden)]
    np.testing.assert_allclose(*found, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_finite_and_reach_every_part(dtype):
    kinds = dict(dtype=dtype, param_dtype="float32", remat="full", unroll=1)
    model = planned(tiny("sequential").replaced(**kinds), **CUTS)
    loss = jax.jit(jax.grad(lambda p: logits(model, p, batch(pads=1)).sum()))
    for path, slope in jax.tree_util.tree_leaves_with_path(loss(params())):
        assert jnp.isfinite(slope).all(), path
        shifts_all_keys_alike = path[-1].key == "bias" and path[-2].key.endswith("k")
        assert shifts_all_keys_alike or jnp.abs(slope).max() > 0, path


@pytest.mark.parametrize("order", ORDERS)
def test_a_scan_equals_layers_on_their_own(order):
    model = planned(tiny(order, unroll=1))
    alone = make_plan(model.plan.geometry, ())
    steps = tuple(
        dataclasses.replace(alone.language[0], start=i, stop=i + 1) for i in range(3)
    )
    apart = Meter(model.spec, dataclasses.replace(alone, language=steps))
    found = [logits(each, params(), batch(pads=1)) for each in (model, apart)]
    np.testing.assert_allclose(*found, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "cuts, visual, text",
    [
        (dict(prune=0.3), 18, 11),
        (dict(merge=0.3), 18, 11),
        (dict(text=0.2), 26, 9),
        (dict(prune=0.3, merge=0.3, text=0.2), 10, 9),
    ],
)
def test_each_part_works_without_the_others(cuts, visual, text):
    cuts = dict(prune=0.0, merge=0.0, text=0.0) | cuts
    model = planned(tiny("sequential"), layers=(1,), **cuts)
    run = jax.jit(lambda params, batch: model.apply({"params": params}, batch).state)
    state = run(params(), batch(pads=1))
    assert (state.layout.count("visual"), state.layout.count("prefix")) == (
        visual,
        text,
    )
    assert state.layout == model.plan.layouts[-1]
    assert jnp.isfinite(state.hidden).all()


@pytest.mark.parametrize("preset", ["safe", "reference"])
def test_what_the_image_pooler_reads(preset):
    """The image's [CLS] where it is safe; else the token the text asks for most."""
    model = planned(tiny("sequential"), **CUTS, preset=preset)

    @jax.jit
    def told(params, batch):
        """Of each cut: what its first row reads, and what the text asks for most."""
        found = []

        def telling(edit):
            def op(state, seen, ctx):
                mix = edit.op(state, seen, ctx)
                asked = edit.op.scores(state, seen).argmax(axis=1)
                found.append((mix.weights[:, 0], asked))
                return mix

            return op

        bound = model.bind({"params": params})
        ops = {e.name: telling(e) for e in model.plan.edits if e.span == "visual"}
        bound.stack.run(bound.enter(batch), model.plan.language, Context(), ops=ops)
        return found

    found = told(params(), batch(pads=1))
    assert len(found) == 2
    for read, asked in found:
        first = np.zeros_like(asked) if preset == "safe" else asked
        np.testing.assert_array_equal(read, np.eye(read.shape[1])[first])


@pytest.mark.parametrize("order", ORDERS)
def test_the_compiler_agrees_on_what_a_cut_spares(order):
    """In layers wide enough that masks, softmax and activations cost little beside."""
    spec = dataclasses.replace(tiny(order), block=co_block(128, 2, 512))

    def counted(**cuts):
        model = planned(spec, **cuts)
        shapes = jax.eval_shape(
            lambda key: encoders.init(model, key), jax.random.key(0)
        )
        run = jax.jit(lambda p, b: model.apply({"params": p}, b).state.hidden)
        compiled = run.lower(shapes, encoders.abstract_batch(model, 1)).compile()
        return np.array([compiled.cost_analysis()["flops"], cost(model.plan).language])

    compiled, planned_ = counted() - counted(layers=(0,), prune=0.6, merge=0.0)
    assert 0.95 < compiled / planned_ < 1.1


@pytest.mark.parametrize(
    "task, text, side, giga",
    [
        ("vqav2", 32, 384, (53.98, 37.90, 10.60, 64.58)),
        ("snli_ve", 32, 384, (53.98, 37.90, 4.99, 58.97)),
        ("nlvr2", 40, 288, (30.92, 21.90, 7.18, 38.10)),
    ],
)
def test_multiply_adds_of_the_full_size(task, text, side, giga):
    """Of one image with its text, without the head; counted from the published sizes."""
    spec = dataclasses.replace(meter.b_16(task), order="sequential")
    spec = dataclasses.replace(
        spec, vision=dataclasses.replace(spec.vision, image=side)
    )
    sizes = meter.geometry(spec, text=text)
    base, cut = (
        cost(make_plan(sizes, edits))
        for edits in ((), pumer.edits(sizes, **pumer.RELEASED[f"meter_{task}"]))
    )
    towers = (cut.vision + cut.connector) / sizes.rows + cut.words
    reduced = cut.language / sizes.rows
    found = towers, base.language / sizes.rows, reduced, towers + reduced
    np.testing.assert_allclose(np.array(found) / 2e9, giga, rtol=0.002)


def test_what_two_streams_cannot_do_is_refused():
    sizes = meter.geometry(tiny("parallel"), text=TEXT)
    with pytest.raises(ValueError, match="last_attention"):
        make_plan(sizes, fastv.edits(sizes, layer=1, keep=4))
    with pytest.raises(ValueError, match="pool acts on the one sequence"):
        make_plan(sizes, (Connect("pool", 4, None),))
    with pytest.raises(ValueError, match="14 text slots"):
        meter.geometry(tiny("parallel"), text=14)
    with pytest.raises(ValueError, match=r"use one or more layers in 0\.\.2"):
        pumer.edits(sizes, layers=(0, 3))
