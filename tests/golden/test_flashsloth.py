"""The whole tiny FlashSloth against the reference's numbers."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest

from lmm_jax import losses, strategies
from lmm_jax.checkpoint.params import from_published, to_published
from lmm_jax.decode import Generator
from lmm_jax.depth import Role, make_plan
from lmm_jax.hub.families import llava_original
from lmm_jax.models import lmm, specs
from lmm_jax.nn.query import EmbeddedQuery
from lmm_jax.nn.rope import RopeSpec
from lmm_jax.strategies.flashsloth import AttentionPool
from tests.golden import reference

MODELS = (
    "single_b1",
    "train_batch",
    "multiturn_infer_b1",
    "plain_rule_b20",
    "hd_5tiles",
    "hd_greedy_b1",
    "published_constants_b1",
)
CLOSE = dict(rtol=1e-5, atol=5e-5)
IMAGE, MARKER = -200, 50295


def rows(spec):
    """Of the model and of its strategy, in the reference's keys."""
    pool, read = "strategy_flashsloth_pool/", "strategy_flashsloth_query/"
    return (
        *llava_original.rows(spec),
        *(row.under(pool, "model.pooling.") for row in AttentionPool.params()),
        *(row.under(read, "model.") for row in EmbeddedQuery.params()),
    )


def load(name: str):
    """A fixture, its model and parameters, and the batch."""
    f = reference.load(f"flashsloth/model_{name}")
    c = f.meta["config"]
    v, w, q = c["vision"], c["llm"], c["embq"]
    tower = specs.VisionSpec(
        v["image_size"],
        v["patch_size"],
        specs.vit_block(
            v["hidden_size"],
            v["num_attention_heads"],
            v["intermediate_size"],
            "gelu_tanh",
            norm_eps=v["layer_norm_eps"],
        ),
        depth=v["blocks_used"],
        run=v["blocks_used"],
        class_token=False,
        pre_norm=False,
        post_norm=False,
        patch_bias=True,
    )
    block = dataclasses.replace(
        specs.PHI_2,
        width=w["hidden_size"],
        heads=w["num_attention_heads"],
        kv_heads=w["num_key_value_heads"],
        head_dim=w["head_dim"],
        hidden=w["intermediate_size"],
        rope=RopeSpec(w["rope_theta"], fraction=w["partial_rotary_factor"]),
    )
    language = specs.LanguageSpec(
        w["vocab_size"], block, w["num_hidden_layers"], head_bias=True, kind="phi"
    )
    spec = specs.LMMSpec(tower, language)
    ids = f["in/input_ids"]
    sizes = lmm.geometry(
        spec,
        images=1,
        crops=c["tiles"] - 1,
        prefix=0,
        suffix=ids.shape[1] + (q["num_queries"] - 1) * f["out/group_starts"].shape[1],
    )
    arguments = dict(
        window=c["sap"]["window"],
        queries=q["num_queries"],
        layer=q["before_layer_index"],
        heads=q["num_heads"],
        bottleneck=q["d_bottleneck"],
        anchor=c["dot_token_id"],
    )
    plan = make_plan(sizes, strategies.build({"flashsloth": arguments}, sizes))
    model = lmm.LMM(spec, plan)
    abstract = jax.eval_shape(lambda k: lmm.init(model, k), jax.random.key(0))
    params = from_published(f.params, rows(spec), abstract)
    return f, model, params, place(f, plan)


def place(f, plan):
    """The batch; `turn` is what pairs the reference's query groups with its spans."""
    g, per_image, count = plan.geometry, plan.tokens_per_image, plan.queries[0].count
    ids, pixels = f["in/input_ids"], f["in/pixel_values"]
    mask = f.arrays.get("in/attention_mask", np.ones_like(ids)) > 0
    rows, text = len(ids), g.suffix
    pixels = pixels.reshape(rows, 1, g.views, *pixels.shape[-3:])
    spans = f["out/question_spans"]

    def zeros(dtype, *shape):
        return np.zeros((rows, *shape), dtype)

    out = {
        "images": np.moveaxis(pixels, 3, -1).astype(np.float32),
        "views": zeros(bool, 1, g.views),
        "grid": zeros(np.int32, 1, 2),
        "tokens": zeros(np.int32, text),
        "positions": zeros(np.int32, text),
        "valid": zeros(bool, text),
        "segment": zeros(np.int32, text),
        "role": zeros(np.int8, text),
        "turn": zeros(np.int32, text),
        "loss_mask": zeros(np.float32, text),
        "visual_positions": zeros(np.int32, per_image),
        "visual_valid": zeros(bool, per_image),
        "visual_segment": zeros(np.int32, per_image),
    }
    labels = f.arrays.get("in/labels", np.full_like(ids, -100))
    for row in range(rows):
        at = slot = group = 0
        for token, label in zip(ids[row][mask[row]], labels[row][mask[row]]):
            if token == IMAGE:
                out["views"][row] = True
                out["visual_positions"][row] = at + np.arange(per_image)
                out["visual_valid"][row] = True
                at += per_image
                continue
            queries = token == MARKER
            width = count if queries else 1
            there = slice(slot, slot + width)
            out["tokens"][row, there] = np.arange(count) if queries else token
            out["positions"][row, there] = at + np.arange(width)
            out["valid"][row, there] = True
            out["loss_mask"][row, there] = label >= 0
            if queries:
                assert at == f["out/group_starts"][row, group]
                out["role"][row, there] = Role.QUERY
                out["turn"][row, there] = spans[row, group, 0]
                group += 1
            at, slot = at + width, slot + width
        for start, stop in spans[row]:
            where = (out["positions"][row] >= start) & (out["positions"][row] < stop)
            where &= out["valid"][row]
            out["role"][row, where] = Role.QUESTION
            out["turn"][row, where] = start
    return out


def compare(f, values, state, key):
    """Real tokens in the order of positions; fixtures may hold the last ones only."""
    mask = f["out/attention_mask"] > 0
    chosen = f.meta.get("logit_rows", range(len(mask)))
    last = f.meta.get("logits_last_positions")
    for right, row in zip(f[key], chosen):
        ours = reference.in_order(values, state)[row]
        ours = ours[-last:] if last else ours
        np.testing.assert_allclose(
            ours, right[mask[row]] if not last else right, **CLOSE
        )


@pytest.mark.parametrize("name", MODELS)
def test_logits(name):
    f, model, params, batch = load(name)
    state, logits = reference.run(model, params, batch)
    compare(f, logits, state, "out/logits")


@pytest.mark.parametrize("name", MODELS)
def test_queries_that_add_nothing(name):
    f, model, params, batch = load(name)
    up = params["strategy_flashsloth_query"]["up"]
    params["strategy_flashsloth_query"]["up"] = jax.tree.map(np.zeros_like, up)
    state, logits = reference.run(model, params, batch)
    compare(f, logits, state, "out/logits_embq_off")


def test_sequence_before_the_first_layer():
    f, model, params, batch = load("train_batch")
    enter = functools.partial(model.apply, method="_enter")
    state, _ = jax.jit(lambda p, b: enter({"params": p}, b, None))(params, batch)
    compare(f, state.hidden, state, "out/input_embeds")
    compare(f, state.positions, state, "out/positions")


@pytest.mark.parametrize("name", ["train_batch", "hd_5tiles"])
def test_loss_and_gradients(name):
    f, model, params, batch = load(name)

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        logits, _ = model.apply({"params": params}, batch, method="score")
        return losses.next_token(logits, batch["tokens"], batch["loss_mask"])[0]

    value, grads = loss(params)
    np.testing.assert_allclose(value, f["out/loss"], rtol=1e-5)
    ours = to_published(grads, rows(model.spec))
    theirs = {k[11:]: v for k, v in f.arrays.items() if k.startswith("grad/param/")}
    assert len(theirs) == 13
    for key, right in theirs.items():
        bound = 1e-4 * np.abs(right).max()
        np.testing.assert_allclose(ours[key], right, rtol=0, atol=bound, err_msg=key)


GREEDY = [
    name
    for name in MODELS
    if name not in ("train_batch", "plain_rule_b20", "hd_5tiles")
]


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_tokens_with_cache(name):
    f, model, params, batch = load(name)
    theirs = f["out/greedy_tokens"]
    answers = Generator(model, theirs.shape[1], end=-1)(params, batch)
    np.testing.assert_array_equal(answers, theirs)
