"""ViLT: what padding, order and reducers may and may not do to what it predicts."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmm_jax import weights
from lmm_jax.depth import make_plan
from lmm_jax.depth.cost import cost
from lmm_jax.depth.table import table
from lmm_jax.models import encoders, vilt
from lmm_jax.models.heads import HeadSpec
from lmm_jax.models.specs import vit_block
from lmm_jax.strategies import pumer

TEXT, PATCH = 10, 4
BLOCK = vit_block(24, 3, 40, "gelu", norm_eps=1e-6)
SPEC = vilt.ViltSpec(
    vision=vilt.patches(4 * PATCH, PATCH, BLOCK),
    block=BLOCK,
    depth=3,
    vocab=40,
    places=12,
    head=HeadSpec("vqav2", 7, 16),
)
PAIRS = dataclasses.replace(SPEC, types=3, head=HeadSpec("nlvr2", 2, 48, images=2))
SHARES = dict(layers=(0, 1), prune=0.2, merge=0.3, text=0.3)


def build(spec=SPEC, canvas=(5, 4), mode="drop", **arguments) -> vilt.Vilt:
    sizes = vilt.geometry(spec, text=TEXT, canvas=canvas)
    edits = pumer.edits(sizes, **arguments) if arguments else ()
    return vilt.Vilt(spec, make_plan(sizes, edits, mode=mode))


@functools.cache
def params(spec=SPEC):
    """Random, biases and norms too."""
    abstract = jax.eval_shape(
        lambda k: encoders.init(build(spec), k), jax.random.key(0)
    )
    rng = np.random.default_rng(0)

    def draw(path, x):
        scale = path[-1].key == "scale"
        return (0.3 * rng.normal(size=x.shape) + scale).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract)


def example(images: int = 1, rows: int = 4, canvas=(5, 4)):
    rng = np.random.default_rng(1)
    height, width = (side * PATCH for side in canvas)
    lengths = rng.integers(3, TEXT + 1, rows)
    return dict(
        images=rng.normal(size=(rows, images, height, width, 3)).astype(np.float32),
        tokens=rng.integers(0, 40, (rows, TEXT)),
        valid=np.arange(TEXT) < lengths[:, None],
    )


def logits(model, batch, tree=None):
    score = jax.jit(functools.partial(model.apply, method="score"))
    tree = params(model.spec) if tree is None else tree
    return np.asarray(score({"params": tree}, batch)[0]["logits"])


def noisy(batch):
    """Other words, where there is none."""
    words = np.random.default_rng(2).integers(0, 40, batch["tokens"].shape)
    return dict(batch, tokens=np.where(batch["valid"], batch["tokens"], words))


@pytest.mark.parametrize("cuts", [{}, SHARES])
def test_layers_apart_give_the_same_logits(cuts):
    apart = weights.prepared(jax.device_put(params(), jax.devices()[0]))
    assert isinstance(apart["stack"]["layers"], tuple)
    found = [logits(build(**cuts), example(), tree) for tree in (params(), apart)]
    np.testing.assert_allclose(*found, rtol=0, atol=1e-5)


def test_no_reduction_is_the_baseline_bit_by_bit():
    off = build(layers=(1,), prune=0.0, merge=0.0, text=0.0)
    np.testing.assert_array_equal(logits(off, example()), logits(build(), example()))


@pytest.mark.parametrize("preset", ["safe", "reference"])
def test_what_stands_in_padding_means_nothing_in_safe_mode(preset):
    """In the reference it merges with words, and masks become fractions."""
    batch = example()
    model = build(**SHARES, preset=preset)
    difference = np.abs(logits(model, noisy(batch)) - logits(model, batch)).max()
    if preset == "safe":
        assert difference < 1e-5
    else:
        assert difference > 1e-3
        state = jax.jit(model.apply)({"params": params()}, batch).state
        share = np.asarray(state.place.share)
        assert ((share > 0) & (share < 1)).any()


def test_the_order_of_padding_means_nothing():
    batch = example()
    tables = dict(params())
    positions = np.array(tables["text"]["positions"])
    first = int(batch["valid"].sum(1).max())
    batch["valid"][:, first - 3 :] = False
    moved = positions.copy()
    moved[first - 3 : TEXT] = positions[first - 3 : TEXT][::-1]
    tables["text"] = dict(tables["text"], positions=moved)
    model = build(**SHARES)
    np.testing.assert_allclose(
        logits(model, batch, tables), logits(model, batch), rtol=0, atol=1e-5
    )


def test_hiding_equals_dropping():
    """In three layers, and with an image that does not fill its canvas."""
    cuts = SHARES | dict(layers=(0, 1, 2))
    batch = noisy(example())
    batch["grid"] = np.array([[4, 5], [3, 5], [4, 5], [4, 3]], np.int32)[:, None]
    found = [logits(build(mode=mode, **cuts), batch) for mode in ("drop", "mask")]
    np.testing.assert_allclose(*found, rtol=0, atol=1e-5)


@pytest.mark.parametrize("arguments", [{}, SHARES], ids=["plain", "reduced"])
def test_images_of_a_batch_are_as_if_alone(arguments):
    """Those that do not fill their canvas, whatever stands beside them on it."""
    model, batch = build(**arguments), example()
    batch["grid"] = np.array([[4, 5], [3, 5], [1, 4], [2, 2]], np.int32)[:, None]
    together = logits(model, batch)
    for row in range(4):
        alone = {k: v[row : row + 1].copy() for k, v in batch.items()}
        columns, rows = alone["grid"][0, 0] * PATCH
        alone["images"][:, :, rows:] = 3.0
        alone["images"][:, :, :, columns:] = -5.0
        np.testing.assert_allclose(
            logits(model, alone)[0], together[row], rtol=0, atol=2e-5
        )


def test_a_grid_that_fills_the_canvas_is_no_grid():
    batch = example()
    full = dict(batch, grid=np.full((4, 1, 2), (4, 5), np.int32))
    np.testing.assert_allclose(
        logits(build(), full), logits(build(), batch), rtol=0, atol=1e-6
    )


def test_swapping_two_images_with_all_that_knows_of_them():
    model, batch = build(PAIRS, **SHARES), example(images=2)
    tree, width = params(PAIRS), BLOCK.width
    first = np.asarray(tree["head"]["first"]["kernel"])
    halves = np.concatenate([first[width:], first[:width]])
    first = dict(tree["head"]["first"], kernel=halves)
    swapped = dict(
        tree,
        types=tree["types"][np.array([0, 2, 1])],
        head=dict(tree["head"], first=first),
    )
    turned = dict(batch, images=batch["images"][:, ::-1])
    ours = logits(model, batch)
    np.testing.assert_allclose(logits(model, turned, swapped), ours, rtol=0, atol=1e-5)
    assert np.abs(logits(model, turned) - ours).max() > 1e-3


@pytest.mark.parametrize("part", ["prune", "merge", "text"])
def test_each_part_alone_changes_what_it_says(part):
    model = build(layers=(1,), **dict(prune=0.0, merge=0.0, text=0.0) | {part: 0.3})
    state = jax.eval_shape(model.apply, {"params": params()}, example()).state
    visual, words = state.layout.count("visual"), state.layout.count("prefix")
    assert (visual, words) == ((21, 7) if part == "text" else (15, TEXT))
    assert np.abs(logits(model, example()) - logits(build(), example())).max() > 1e-3


def test_gradients_with_bfloat16_and_one_program_for_all_values():
    block = dataclasses.replace(BLOCK, dtype="bfloat16")
    model = build(dataclasses.replace(SPEC, block=block), **SHARES)

    @jax.jit
    def loss(tree, batch):
        out, _ = model.apply({"params": tree}, batch, method="score")
        return jnp.square(out["logits"]).sum()

    gradient = jax.jit(jax.grad(loss))
    for batch in (example(), noisy(example())):
        grads = gradient(params(), batch)
    assert gradient._cache_size() == 1
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(np.asarray(grad, np.float32)).all(), path


@pytest.mark.parametrize(
    ("task", "giga"), [("vqav2", 8.70), ("nlvr2", 17.39), ("snli_ve", 7.64)]
)
def test_multiply_adds_of_the_released_models(task, giga):
    """As published (8.7, 17.4 and 7.7), at 32 text tokens."""
    spec = vilt.b_32(task)
    sizes = vilt.geometry(spec, text=32)
    plan = make_plan(sizes, pumer.edits(sizes, **pumer.RELEASED[f"vilt_{task}"]))
    assert cost(plan).prefill / 2e9 == pytest.approx(giga, rel=0.005)
    base, rows = cost(make_plan(sizes, ())), sizes.rows
    assert base.prefill / 2e9 == pytest.approx(15.95 * rows, rel=0.005)
    assert base.decode == base.kv_bytes == 0


def test_the_table_of_an_encoder():
    sizes = vilt.geometry(vilt.b_32("vqav2"), text=32)
    plan = make_plan(sizes, pumer.edits(sizes, **pumer.RELEASED["vilt_vqav2"]))
    text = table(plan)
    assert "pumer_5: keep 52 visual, pumer_5_text: keep 21 prefix" in text
    assert "17.4 GFLOP in all, 0.545 x of the baseline" in text
    assert "KV MiB" not in text and "decoded" not in text


def test_parameters_of_the_published_size():
    """ViltForQuestionAnswering with 3129 answers."""
    model = vilt.Vilt(
        spec := vilt.b_32("vqav2"), make_plan(vilt.geometry(spec, text=40), ())
    )
    tree = jax.eval_shape(lambda k: encoders.init(model, k), jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(tree)) == 117_588_537


def test_fresh_parameters_run():
    model = build(**SHARES)
    fresh = jax.jit(functools.partial(encoders.init, model))(jax.random.key(0))
    assert np.isfinite(logits(model, example(), fresh)).all()


def test_texts_beyond_the_table_are_refused():
    with pytest.raises(ValueError, match="places for 12 tokens"):
        vilt.geometry(SPEC, text=13)
