"""PuMer's operators against the reference implementation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmm_jax.depth import Context, Layout, Observation, Place, Role, TokenState
from lmm_jax.depth.reduce import reduce_span
from lmm_jax.nn import attention
from lmm_jax.ops.merge import averages, matched
from lmm_jax.strategies import pumer
from tests.golden import reference

CLOSE = dict(rtol=1e-5, atol=1e-5)
ONE_STAGE = (
    "merge_image_t13_r4",
    "merge_image_t16_r5",
    "merge_image_t11_r9_capped",
    "merge_image_t20_r1",
    "merge_text_t12_r2",
    "merge_text_t9_r3",
    "merge_text_t8_r7_capped",
)
SCORES = {"mean_head": "attention", "first_head": "first_head"}
SCORES |= {"k_metric": "keys", "qk": "queries"}


def state(text: int, visual: int, hidden=None, mask=None) -> TokenState:
    """Text in front; `mask` is that of the text, perhaps fractional."""
    rows = len(mask) if hidden is None else len(hidden)
    shape = (rows, text + visual)
    gate = np.ones(shape, np.float32)
    if mask is not None:
        gate[:, :text] = mask
    zero = jnp.zeros(shape, jnp.int32)
    return TokenState(
        hidden=jnp.zeros((*shape, 1)) if hidden is None else jnp.asarray(hidden),
        positions=jnp.broadcast_to(jnp.arange(text + visual), shape),
        valid=jnp.asarray(gate > 0),
        segment=zero,
        role=jnp.full(shape, Role.USER, jnp.int8),
        turn=zero,
        size=jnp.ones(shape),
        gate=jnp.where(gate > 0, gate, 1.0),
        layout=Layout.of({"prefix": text, "visual": visual, "suffix": 0}),
    )


def merge_text(f, metric, x, mask, left):
    """One merge of text tokens, as the strategy carries it out."""
    before = state(x.shape[1], 0, x, mask)
    op = pumer.Text(x.shape[1], left, safe=False)
    seen = Observation(keys=jnp.asarray(metric))
    after, _ = reduce_span(before, Context(), "prefix", op(before, seen, Context()))
    return after


@pytest.mark.parametrize("case", ONE_STAGE)
def test_matching(case):
    f = reference.load(f"pumer/{case}")
    left = f["out/merged"].shape[1]
    metric, x = f["in/metric"], f["in/x"]
    slots = matched(metric, x.shape[1] - left)
    np.testing.assert_array_equal(slots, f["out/assign"])
    weights = averages(slots, left, np.ones(slots.shape))
    np.testing.assert_allclose(weights @ x, f["out/merged"], **CLOSE)
    np.testing.assert_array_equal((weights > 0).sum(-1), f["out/size"])


@pytest.mark.parametrize("case", [c for c in ONE_STAGE if "text" in c])
def test_text_and_its_mask(case):
    f = reference.load(f"pumer/{case}")
    left = f["out/merged"].shape[1]
    after = merge_text(f, f["in/metric"], f["in/x"], f["in/mask"], left)
    np.testing.assert_allclose(after.hidden, f["out/merged"], **CLOSE)
    np.testing.assert_array_equal(after.size, f["out/size"])
    np.testing.assert_allclose(after.place.share, f["out/mask"], **CLOSE)


def test_text_twice_on_a_fractional_mask():
    f = reference.load("pumer/merge_text_t14_r3_then_r2")
    first = merge_text(f, f["in/metric"], f["in/x"], f["in/mask"], 11)
    second = merge_text(f, f["in/metric_stage2"], first.hidden, first.place.share, 9)
    np.testing.assert_allclose(second.hidden, f["out/merged_stage2"], **CLOSE)
    np.testing.assert_allclose(second.place.share, f["out/mask_stage2"], **CLOSE)


def test_means_of_tokens_that_stand_for_several():
    f = reference.load("pumer/merge_tracked_sizes_t17")
    x, size = f["in/x"], np.ones(f["in/x"].shape[:2])
    for stage in ("", "_stage2"):
        merged = f[f"out/merged{stage}"]
        left = merged.shape[1]
        slots = matched(f[f"in/metric{stage}"], x.shape[1] - left)
        np.testing.assert_array_equal(slots, f[f"out/assign{stage}"])
        weights = np.asarray(averages(slots, left, size))
        x, size = weights @ x, np.einsum("bmt,bt->bm", weights > 0, size)
        np.testing.assert_allclose(x, merged, **CLOSE)
        np.testing.assert_allclose(size, f[f"out/size{stage}"], **CLOSE)


@pytest.mark.parametrize("shape", ["9x9", "12x7", "5x11"])
@pytest.mark.parametrize("kind", ["", "_int"])
def test_softmax_with_soft_masks(shape, kind):
    f = reference.load(f"pumer/masked_softmax_{shape}")
    logits, mask = f["in/logits"], f[f"in/mask{kind}"]
    queries, keys = logits.shape[2:]
    zero = jnp.zeros((len(mask), queries), jnp.int32)
    asks = Place(zero, zero == 0, zero)
    zero = jnp.zeros((len(mask), keys), jnp.int32)
    shows = Place(zero, mask > 0, zero, jnp.where(mask > 0, mask, 1.0))
    seen = attention.sight(asks, shows, causal=False, soft=True)
    shares, total = attention._shares(logits[:, None], seen.visible, seen.share)
    probs = (shares / total)[:, 0]
    np.testing.assert_allclose(probs, f[f"out/probs{kind}"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "case",
    [
        "tip_vilt_mean_head_li25",
        "tip_vilt_first_head_li26",
        "tip_vilt_k_metric_li15",
        "tip_vilt_qk_li17",
        "tip_meter_li26",
    ],
)
def test_ranking(case):
    f = reference.load(f"pumer/{case}")
    mask, keys = f["in/text_mask"], f["in/image_keys"]
    text, visual = mask.shape[1], keys.shape[1]
    words = np.zeros((len(mask), text, keys.shape[2]), np.float32)
    seen = Observation(
        text_attention=f.arrays.get("in/attn_text_to_image"),
        keys=np.concatenate([f.arrays.get("in/text_keys", words), keys], axis=1),
        queries=f.arrays.get("in/text_queries"),
    )
    kept = f["out/top_idx"].shape[1]
    score = SCORES[f.meta["config"].get("score", "mean_head")]
    op = pumer.Visual(kept, kept, score, safe=False, leads=False)
    before = state(text, visual, mask=mask)
    np.testing.assert_allclose(op.scores(before, seen), f["out/saliency"], **CLOSE)
    keep = op(before, seen, Context())
    np.testing.assert_array_equal(keep.index, f["out/top_idx"])


def test_counts():
    """-1 marks what the reference fails at; where a part is off its other parts are off
    too, or undone, and ours are not."""
    f = reference.load("pumer/counts")
    checked = 0
    for row, config in enumerate(f.meta["config"]["configs"]):
        shares = [config[name] for name in ("prune", "merge_image", "merge_text")]
        here = f["in/config_index"] == row
        for visual, words, left, said in zip(
            f["in/image_len"][here],
            f["in/text_len"][here],
            f["out/image_len_next"][here],
            f["out/text_len_next"][here],
        ):
            pruned, merged = (round(share * visual) for share in shares[:2])
            if left < 0 or not pruned or (config["model"] == "meter" and not merged):
                continue
            ours = pumer.counts(int(visual), int(words), *shares)
            assert ours[1:] == (left, said), (config, visual, words)
            checked += 1
    assert checked > 3000


@pytest.mark.parametrize("name", pumer.RELEASED)
def test_released_cascades(name):
    f = reference.load("pumer/counts")
    theirs = f[f"out/cascade_{name.replace('vqav2', 'vqa2').replace('snli_', '')}"]
    arguments = pumer.RELEASED[name]
    shares = [arguments[part] for part in ("prune", "merge", "text")]
    lengths = [tuple(map(int, theirs[0]))]
    for _ in arguments["layers"]:
        lengths.append(pumer.counts(*lengths[-1], *shares)[1:])
    np.testing.assert_array_equal(lengths, theirs)


def test_gradients_of_a_merge():
    """1 / size for each member of a group, nothing for what was compared."""
    f = reference.load("pumer/merge_image_t13_r4")
    metric, x = jnp.asarray(f["in/metric"]), jnp.asarray(f["in/x"])

    def merged(metric, x):
        slots = matched(metric, 4)
        return (averages(slots, 9, jnp.ones(slots.shape)) @ x).sum()

    to_metric, to_x = jax.grad(merged, (0, 1))(metric, x)
    assert not np.asarray(to_metric).any()
    sizes = np.take_along_axis(f["out/size"], f["out/assign"], 1)
    np.testing.assert_allclose(to_x[..., 0], 1 / sizes, **CLOSE)
