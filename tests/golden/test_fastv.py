"""FastV against the reference implementations: drop with cache, mask, selection."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmm_jax import strategies
from lmm_jax.depth import (
    Context,
    Geometry,
    Layout,
    Observation,
    Role,
    TokenState,
    make_plan,
)
from lmm_jax.models import decoder
from lmm_jax.models.specs import LanguageSpec, named
from lmm_jax.nn.cache import Cache, empty_tail
from lmm_jax.strategies.fastv import MostAttended
from tests.golden import reference

CLOSE = dict(rtol=1e-4, atol=1e-4)


def language(c) -> LanguageSpec:
    return reference.language_spec(
        {
            "hidden_size": c["hidden"],
            "num_attention_heads": c["heads"],
            "num_key_value_heads": c["kv_heads"],
            "intermediate_size": c["ffn"],
            "num_hidden_layers": c["layers"],
            "vocab_size": c["vocab"],
            "rms_norm_eps": c["rms_eps"],
            "rope_theta": c["rope_theta"],
        }
    )


def plan_of(spec, c, keep: int, mode="drop"):
    vision = named("vision", "tiny-vit")
    text = max(c["text_lens"])
    geometry = Geometry(
        vision=vision.block.geometry(vision.depth),
        language=spec.block.geometry(spec.depth),
        vision_layers=vision.run,
        class_token=True,
        patches=c["N"],
        fixed_grid=(1, c["N"]),
        patch=3,
        connector=0,
        images=1,
        crops=0,
        prefix=c["S"],
        suffix=text,
        vocab=spec.vocab,
    )
    chosen = {"fastv": dict(layer=c["K"], keep=keep)}
    return make_plan(geometry, strategies.build(chosen, geometry), mode=mode)


def entrance(embeds, valid, c) -> TokenState:
    batch, length = valid.shape
    zero = jnp.zeros((batch, length), jnp.int32)
    return TokenState(
        hidden=jnp.asarray(embeds),
        positions=jnp.broadcast_to(jnp.arange(length), zero.shape),
        valid=jnp.asarray(valid),
        segment=zero,
        role=jnp.full_like(zero, Role.USER, jnp.int8),
        turn=zero,
        size=jnp.ones((batch, length)),
        layout=Layout.of(
            {"prefix": c["S"], "visual": c["N"], "suffix": length - c["S"] - c["N"]}
        ),
    )


def run(module, embeds, valid, plan, c):
    def forward(module, embeds):
        state = entrance(embeds, valid, c)
        out = module.stack.run(
            state, plan.language, Context(), mode=plan.mode, collect=True
        )
        return out, module.logits(out.state.hidden)

    return functools.partial(module.apply, method=forward), embeds


@pytest.mark.parametrize("case", ["fastv_drop_cache", "fastv_drop_cache_gqa"])
def test_drop_with_cache(case):
    f = reference.load(f"reductions/{case}")
    c = f.meta["config"]
    spec = language(c)
    module = decoder.Decoder(spec)
    params = {"params": reference.decoder_params(f, spec)}
    embeds, valid = f["in/inputs_embeds"], f["in/valid"]
    for ratio, keep in zip(c["R"], c["keep"]):
        tag = f"out/R{round(100 * ratio)}"
        plan = plan_of(spec, c, keep)
        forward, _ = run(module, embeds, valid, plan, c)
        out, logits = jax.jit(forward)(params, embeds)
        check_rows(out.state, logits, f, tag, valid)
        where = out.state.layout.slice("visual")
        kept = np.asarray(out.state.positions)[:, where] - c["S"]
        np.testing.assert_array_equal(kept, f[f"{tag}/kept_visual"])
        lengths = [r.keys.k.shape[2] for r in out.runs for _ in range(len(r.keys.k))]
        longest = np.asarray(f[f"{tag}/cache_len"]).max(axis=0)
        np.testing.assert_array_equal(lengths, longest)
        check_decoding(module, params, out, plan, f, tag, valid)


def check_rows(state, logits, f, tag, valid):
    for row, ours in enumerate(reference.in_order(logits, state)):
        positions = f[f"{tag}/position_ids"][row]
        theirs = f[f"{tag}/logits"][row][positions >= 0]
        np.testing.assert_allclose(ours, theirs, **CLOSE)
        alive = np.asarray(state.valid)[row]
        np.testing.assert_array_equal(
            np.sort(np.asarray(state.positions)[row][alive]), positions[positions >= 0]
        )


def check_decoding(module, params, out, plan, f, tag, valid):
    ids = f["in/decode_ids"]
    spec = module.spec
    start = jnp.asarray(valid.sum(1), jnp.int32)
    tail = empty_tail(spec.block, spec.depth, len(ids), ids.shape[1])
    cache = Cache(out.runs, tail, start, jnp.zeros((), jnp.int32))

    def step(module, tokens, cache):
        hidden = module.embed(tokens[:, None])
        hidden, cache = module.stack.decode(hidden, cache, plan.language)
        return module.logits(hidden[:, 0]), cache

    decode = jax.jit(functools.partial(module.apply, method=step))
    for t in range(ids.shape[1]):
        logits, cache = decode(params, ids[:, t], cache)
        theirs = f[f"{tag}/decode_logits"][:, t]
        np.testing.assert_allclose(logits, theirs, **CLOSE)


@pytest.mark.parametrize("mode", ["mask", "drop"])
def test_mask_and_drop_without_cache(mode):
    f = reference.load("reductions/fastv_mask_and_rerank")
    c = f.meta["config"]
    spec = language(c)
    module = decoder.Decoder(spec)
    params = {"params": reference.decoder_params(f, spec)}
    embeds, valid = f["in/inputs_embeds"], f["in/valid"]
    plan = plan_of(spec, c, c["keep"], mode)
    forward, _ = run(module, embeds, valid, plan, c)
    out, logits = jax.jit(forward)(params, embeds)
    ours = reference.in_order(logits, out.state)
    kept = f["out/kept_visual"][:, 0]
    for row, length in enumerate(valid.sum(1)):
        rows = [*range(c["S"]), *(c["S"] + kept[row]), *range(c["S"] + c["N"], length)]
        theirs = f["out/logits_mask"][row][rows]
        np.testing.assert_allclose(ours[row], theirs, **CLOSE)
        dropped = f["out/logits_drop"][row][: len(rows)]
        np.testing.assert_allclose(ours[row], dropped, **CLOSE)


@pytest.mark.parametrize("score", ["last_row", "mean_rows"])
def test_selection_from_a_given_attention(score):
    f = reference.load("reductions/fastv_select_rows")
    c = f.meta["config"]
    attention = f["in/attention"]
    length = attention.shape[-1]
    valid = np.ones((len(attention), length), bool)
    state = entrance(np.zeros((len(attention), length, 1), "f"), valid, c)
    row = attention.mean(1)[:, -1] if score == "last_row" else attention.mean((1, 2))
    visual = state.layout.slice("visual")
    np.testing.assert_allclose(row[:, visual], f[f"out/{score}/score"], **CLOSE)
    for ratio, count in zip(c["ratios"], c["counts"]):
        name = "last_attention" if score == "last_row" else "mean_attention"
        op = MostAttended(count, name)
        keep = op(state, Observation(**{name: jnp.asarray(row)}), Context())
        expected = f[f"out/{score}/keep{round(100 * ratio)}"]
        for b in range(len(attention)):
            rows = [*range(c["S"]), *(c["S"] + np.asarray(keep.index[b]))]
            rows += [*range(c["S"] + c["N"], length)]
            np.testing.assert_array_equal(rows, expected[b])
