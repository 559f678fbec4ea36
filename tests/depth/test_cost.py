"""Costs against hand counts and published figures."""

from __future__ import annotations

import dataclasses

import jax
import pytest

from lmm_jax import strategies
from lmm_jax.depth import make_plan
from lmm_jax.depth.cost import cost, kv_bytes, layer_flops
from lmm_jax.depth.table import table
from lmm_jax.models import lmm
from lmm_jax.models.specs import LMMSpec, named
from tests.tiny import SPEC, Tiny


def plan(language="vicuna-7b", crops=0, text=64, **chosen):
    spec = LMMSpec(named("vision", "clip-l-336"), named("language", language))
    g = lmm.geometry(spec, images=1, crops=crops, prefix=0, suffix=text)
    return make_plan(g, strategies.build(chosen, g))


def test_parameters_to_the_unit():
    """Llama-2 7B and 13B, CLIP-L/336 and LLaVA's projectors, as published."""
    parts = {
        "vicuna-7b": (6_738_415_616, 20_979_712),
        "vicuna-13b": (13_015_864_320, 31_467_520),
    }
    for language, (decoder, projector) in parts.items():
        model = lmm.LMM(
            LMMSpec(named("vision", "clip-l-336"), named("language", language)),
            plan(language),
        )
        tree = jax.eval_shape(lambda k, m=model: lmm.init(m, k), jax.random.key(0))
        counts = {
            name: sum(x.size for x in jax.tree.leaves(part))
            for name, part in tree.items()
        }
        assert counts == {
            "vision": 303_507_456,
            "connector": projector,
            "language": decoder,
        }


@pytest.mark.parametrize(
    ("language", "visual", "tflops"),
    [
        ("vicuna-7b", 576, 8.4),
        ("vicuna-7b", 2880, 40.4),
        ("vicuna-13b", 576, 16.4),
        ("vicuna-13b", 2880, 78.3),
    ],
)
def test_prefill_flops(language, visual, tflops):
    """arXiv:2406.04334's context lengths with 64 text tokens, causal pairs once."""
    chosen = {"llava_hires": {}} if visual == 2880 else {}
    this = plan(language, crops=4, **chosen)
    assert this.entrance.count("visual") == visual
    assert cost(this).language / 1e12 == pytest.approx(tflops, rel=0.01)


def test_vision_flops():
    """CLIP-L/336: 23 blocks cost 0.365 TFLOP a view."""
    assert cost(plan()).vision / 1e12 == pytest.approx(0.365, rel=0.01)
    assert cost(plan(crops=4)).vision / 1e12 == pytest.approx(1.83, rel=0.01)


@pytest.mark.parametrize("start", [0, 8, 20])
def test_vision_flops_of_deepstack_v(start):
    """arXiv:2406.04334, DeepStack-V: five views up to `start`, one from there on."""
    one, five = (cost(plan(crops=crops)).vision for crops in (0, 4))
    g = plan().geometry
    embedded = 2 * g.patches * g.patch * g.vision.width
    layer = (one - embedded) / g.vision_layers
    stacked = cost(plan(crops=4, deepstack_v=dict(start=start)))
    assert stacked.vision == pytest.approx(five - 4 * (23 - start) * layer)
    assert stacked.language == cost(plan()).language
    if start == 20:
        assert stacked.vision / 1e12 == pytest.approx(1.64, rel=0.01)


def test_cache_bytes():
    """288 MiB for 576 visual tokens at 7B in bfloat16."""
    this = plan(text=0)
    assert cost(this).kv_bytes == 288 * 2**20
    assert kv_bytes(this.geometry.language, 576, 2) * 32 == 288 * 2**20


@pytest.mark.parametrize(
    ("layer", "ratio", "published"),
    [
        (2, 0.5, 55.2), (2, 0.75, 33.2), (2, 0.9, 20.2), (3, 0.5, 56.7),
        (3, 0.75, 35.4), (3, 0.9, 22.9), (5, 0.5, 59.6), (5, 0.75, 39.9),
        (5, 0.9, 28.2),
    ],
)  # fmt: skip
def test_fastv_flops_as_published(layer, ratio, published):
    """arXiv:2403.06764, Table 1: 36 text tokens, its own formula on our token counts."""
    keep = round(576 * (1 - ratio))
    this = plan(text=36, fastv=dict(layer=layer, keep=keep))
    lengths = [36 + visual for visual in cost(this).visual_per_layer]

    def paper(n, d=4096, m=11_008):  # two MLP matrices, all query-key pairs
        return 4 * n * d * d + 2 * n * n * d + 2 * n * d * m

    percent = 100 * sum(map(paper, lengths)) / (32 * paper(612))
    assert percent == pytest.approx(published, rel=0.01)
    # Three MLP matrices and all pairs: what a plain implementation executes.
    ours = cost(this, pairs="all").language / cost(plan(text=36), pairs="all").language
    assert 100 * ours == pytest.approx(published, rel=0.02)


@pytest.mark.parametrize("language", ["vicuna-7b", "vicuna-13b"])
def test_deepstack_is_free_for_the_language_model(language):
    stacked, baseline = plan(language, crops=4, deepstack={}), plan(language)
    assert cost(stacked).language == cost(baseline).language
    assert cost(stacked).kv_bytes == cost(baseline).kv_bytes
    assert cost(stacked).vision == pytest.approx(5 * cost(baseline).vision)
    # The additions themselves, which are not counted: one per stacked value.
    added = 4 * 576 * stacked.geometry.language.width
    assert added < 1e-5 * cost(baseline).language
    strung = cost(plan(language, crops=4, llava_hires={}))
    line = next(row for row in table(stacked).splitlines() if "in context" in row)
    assert f"{strung.language / 1e9:,.1f}" in line
    assert f"{strung.kv_bytes / 2**20:,.1f}" in line
    assert strung.language > 4 * cost(stacked).language


def test_projectors_of_a_strategy_count_their_own_weights():
    """Patches of CLIP-L, 1024 wide, for Vicuna-7B."""
    width, out = 1024, 4096
    four, sixteen = 4 * width, 16 * width
    merged = four * four + four * out
    by_hand = {
        "slimm_v1": 144 * merged + 576 * (width * width + width * out),
        "slimm_e": 144 * merged + 36 * (sixteen * out + out * out),
        "slimm_m": 144 * merged * 3,
    }
    for name, count in by_hand.items():
        arguments = dict(taps=(5, 11)) if name == "slimm_m" else {}
        assert cost(plan(**{name: arguments})).connector == 2 * count


def test_a_layer_by_hand():
    stack = plan().geometry.language
    t, d, f = 10, 4096, 11_008
    by_hand = 2 * t * (4 * d * d + 3 * d * f) + 4 * d * t * (t + 1) / 2
    assert layer_flops(stack, t) == by_hand
    assert layer_flops(stack, t, "all") == by_hand + 4 * d * t * (t - 1) / 2


def test_the_compiler_agrees_on_one_layer():
    """XLA counts a loop's body once, so unrolling adds all layers but the first."""
    tiny = Tiny.make()
    this = tiny.plan(images=1)
    g = this.geometry
    rolled, unrolled = (_compiled_flops(tiny, this, n) for n in (1, 0))
    language = layer_flops(g.language, this.entrance.length, "all")
    vision = layer_flops(g.vision, g.patches + 1, "all") * g.views
    expected = (g.language.depth - 1) * language + (g.vision_layers - 1) * vision
    # Norms, softmax and rotary embedding come on top of the matrix products.
    assert 1.0 < (unrolled - rolled) / expected < 1.2


def test_the_compiler_agrees_that_views_end_where_they_are_stacked():
    tiny = Tiny.make()
    early, late = (
        tiny.plan(tiny.strategy("deepstack_v", start=start), images=1)
        for start in (0, 2)
    )
    g = late.geometry
    expected = 2 * g.crops * layer_flops(g.vision, g.patches + 1, "all")
    saved = _compiled_flops(tiny, late, 0) - _compiled_flops(tiny, early, 0)
    assert 1.0 < saved / expected < 1.2
    assert cost(late).vision - cost(early).vision == pytest.approx(expected)


def _compiled_flops(tiny, this, unroll):
    model = lmm.LMM(dataclasses.replace(SPEC, unroll=unroll), this)
    batch = lmm.abstract_batch(model, 1)
    run = jax.jit(lambda p, b: model.apply({"params": p}, b).state.hidden)
    return run.lower(tiny.params, batch).compile().cost_analysis()["flops"]
