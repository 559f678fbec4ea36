"""Qwen3-VL against the reference implementation: its images keep their own size."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from PIL import Image
import pytest

from lmm_jax import hub, losses
from lmm_jax.checkpoint.params import check_rows, published
from lmm_jax.data.coordinates import coordinates
from lmm_jax.data.native import NativeSpec, patches
from lmm_jax.depth import Place, make_plan
from lmm_jax.hub import folder as folders
from lmm_jax.hub.families import qwen3_vl
from lmm_jax.hub.fused import joined
from lmm_jax.models import lmm, native_vit
from lmm_jax.nn.rope import Axial, Interleaved, RopeSpec, rotation
from lmm_jax.ops.resize import between_corners
from tests.golden import native, reference

CLOSE = dict(rtol=1e-4, atol=1e-4)
CASES = ("image", "two_images", "video", "left_pad")
CASES += ("taps_unsorted", "taps_more_than_layers")
LEARNING = ("image", "two_images", "video")


@dataclasses.dataclass(frozen=True)
class Case:
    """A fixture, its model and parameters, and its inputs as our batch."""

    fixture: reference.Fixture
    model: lmm.LMM
    params: dict
    batch: dict[str, np.ndarray]


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory) -> Case:
    return read(request.param, tmp_path_factory.mktemp("folder"))


def read(name: str, folder) -> Case:
    """The fixture as a folder of the hub, loaded as any other."""
    f = reference.load(f"deepstack/qwen3vl_{name}")
    c = f.meta["config"]
    config = {
        "model_type": "qwen3_vl",
        "text_config": {"model_type": "qwen3_vl_text", **c["text"]},
        "vision_config": {"model_type": "qwen3_vl_vision", **c["vision"]},
        "tie_word_embeddings": c["tie_word_embeddings"],
    }
    folders.write(folder, config, f.params.items())
    spec = hub.lmm_spec(folder)
    patches = max(int(h * w) for _, h, w in native.frames(f))
    spec = dataclasses.replace(
        spec, vision=dataclasses.replace(spec.vision, native=patches)
    )
    ids = f["in/input_ids"]
    count = max(len(native.marks(f, row)) for row in range(len(ids)))
    geometry = lmm.geometry(spec, images=count, crops=0, prefix=0, suffix=ids.shape[1])
    model = lmm.LMM(spec, make_plan(geometry, lmm.own_edits(spec, geometry)))
    abstract = jax.eval_shape(lambda k: lmm.init(model, k), jax.random.key(0))
    params = hub.load(hub.Folder(folder), spec, abstract)
    return Case(f, model, params, native.batch(f, model))


def real(f) -> np.ndarray:
    return f["in/attention_mask"] > 0


def close_rows(state, ours, theirs, mask) -> None:
    for row, expected, valid in zip(reference.in_order(ours, state), theirs, mask):
        np.testing.assert_allclose(row, expected[valid], **CLOSE)


def test_logits(case):
    state, logits = reference.run(case.model, case.params, case.batch)
    close_rows(state, logits, case.fixture["out/logits"], real(case.fixture))


def test_logits_without_the_injection(case):
    params = jax.tree.map(np.copy, case.params)
    for leaf in params["strategy_taps"]["mergers"]["second"].values():
        leaf[...] = 0
    state, logits = reference.run(case.model, params, case.batch)
    theirs = case.fixture["out/logits_zeroed_deepstack_mergers"]
    close_rows(state, logits, theirs, real(case.fixture))


def test_features_and_what_is_injected(case):
    f, model = case.fixture, case.model

    def enter(model, batch):
        return model._enter(batch, None)

    state, ctx = model.apply({"params": case.params}, case.batch, method=enter)
    visual = np.asarray(state.hidden)[:, state.layout.slice("visual")]
    taken = np.asarray(case.batch["visual_valid"])
    kind = {"image": 1, "video": 2}
    for name in [n for n in kind if f"out/{n}_merged" in f.arrays]:
        mine = taken & of_kind(f, model, kind[name])
        np.testing.assert_allclose(visual[mine], f[f"out/{name}_merged"], **CLOSE)
        rows = np.asarray(ctx.aligned["taps"])
        expected = f[f"out/{name}_deepstack"][: len(rows)]
        np.testing.assert_allclose(rows[:, mine], expected, **CLOSE)


def of_kind(f, model, kind: int) -> np.ndarray:
    """Which visual slots [B, I * V] belong to images (1) or to video frames (2)."""
    g, rows = model.plan.geometry, len(f["in/input_ids"])
    found = np.zeros((rows, g.images, g.visual_tokens), bool)
    for row in range(rows):
        for i, (other, _) in enumerate(native.marks(f, row)):
            found[row, i] = other == kind
    return found.reshape(rows, -1)


def test_positions(case):
    """The rotary coordinates of the batch are the reference's position ids."""
    f, b = case.fixture, case.batch
    state, _ = reference.run(case.model, case.params, b)
    ours = reference.in_order(state.coords, state)
    for row, valid in enumerate(real(f)):
        theirs = f["out/position_ids"][:, row, valid].T
        np.testing.assert_array_equal(ours[row], theirs)


def test_greedy_decoding_with_cache(tmp_path):
    case = read("left_pad", tmp_path)
    f, model, params = case.fixture, case.model, case.params
    tokens, c = f["out/tokens"], f.meta["config"]
    steps = tokens.shape[1]
    prefill = jax.jit(
        lambda b: model.apply({"params": params}, b, slots=steps, method="prefill")
    )
    decode = jax.jit(
        lambda t, c: model.apply({"params": params}, t, c, method="decode")
    )
    logits, cache = prefill(case.batch)
    np.testing.assert_array_equal(cache.shift[:, None], f["out/rope_deltas"])
    for step in range(steps):
        np.testing.assert_allclose(logits, f["out/step_logits"][:, step], **CLOSE)
        allowed = np.array(logits)
        allowed[:, c["suppress_tokens"]] = -np.inf
        np.testing.assert_array_equal(allowed.argmax(-1), tokens[:, step])
        logits, cache = decode(tokens[:, step], cache)


@pytest.mark.parametrize("name", LEARNING)
def test_loss_and_gradients(name, tmp_path):
    case = read(name, tmp_path)
    f, batch = case.fixture, labelled(case)

    def loss(params):
        logits, _ = case.model.apply({"params": params}, batch, method="score")
        return losses.next_token(logits, batch["tokens"], batch["loss_mask"])[0]

    value, grads = jax.jit(jax.value_and_grad(loss))(case.params)
    np.testing.assert_allclose(value, f["out/loss"], **CLOSE)
    spec = case.model.spec
    rows = published(jax.device_get(grads), qwen3_vl.rows(spec))
    ours = dict(joined(rows, qwen3_vl.fused(spec)))
    names = [k.removeprefix("grad/") for k in f.arrays if k.startswith("grad/")]
    assert names
    for key in names:
        theirs = f[f"grad/{key}"]
        atol = 3e-4 * np.abs(theirs).max()
        np.testing.assert_allclose(ours[key], theirs, rtol=0, atol=atol, err_msg=key)


def labelled(case: Case) -> dict[str, np.ndarray]:
    """The reference's labels as our mask; -100 is unsupervised."""
    f, out = case.fixture, dict(case.batch)
    out["loss_mask"] = np.zeros_like(out["loss_mask"])
    for row, labels in enumerate(f["in/labels"]):
        kept = labels[real(f)[row] & (f["in/mm_token_type_ids"][row] == 0)]
        out["loss_mask"][row, : len(kept)] = kept != -100
    out["loss_mask"] *= out["positions"] > 0  # nothing predicts the first token
    return out


def test_parameter_rows_are_complete_and_invertible(case):
    abstract = jax.eval_shape(lambda k: lmm.init(case.model, k), jax.random.key(0))
    spec = case.model.spec
    for rows in (lmm.params(spec), qwen3_vl.rows(spec)):
        check_rows(rows, abstract)
    rows = published(case.params, qwen3_vl.rows(spec))
    back = dict(joined(rows, qwen3_vl.fused(spec)))
    assert set(back) == set(case.fixture.params)
    for name, value in back.items():
        np.testing.assert_array_equal(value, case.fixture.params[name], err_msg=name)


def test_rotary_angles():
    f = reference.load("deepstack/qwen3vl_positions")
    at = f["in/mrope_positions"].transpose(1, 2, 0)
    for entry in f.meta["config"]["mrope"]:
        _, *axes = entry["mrope_section"]
        spec = RopeSpec(entry["rope_theta"], axes=Interleaved(*axes))
        compare_angles(f, "mrope", f"_{entry['key']}", at, spec, entry["head_dim"])


def test_rotary_angles_and_table_of_the_tower():
    f = reference.load("deepstack/qwen3vl_positions")
    v = f.meta["config"]["vision"]
    head_dim = v["hidden_size"] // v["num_heads"]
    grid, merge = f["in/pos_grid_thw"], v["spatial_merge_size"]
    frames = np.array([(w, h) for t, h, w in grid for _ in range(t)])
    slots = int(frames.prod(-1).max())
    places = native_vit.coordinates(frames, slots, merge)
    table = f["param/model.visual.pos_embed.weight"]
    side = int(len(table) ** 0.5)
    found = between_corners(table.reshape(side, side, -1), places, frames)
    valid = np.arange(slots) < frames.prod(-1)[:, None]
    theirs = f["out/pos_embed_interpolated"]
    np.testing.assert_allclose(np.asarray(found)[valid], theirs, **CLOSE)
    spec = RopeSpec(axes=Axial())
    packed = np.asarray(places)[valid][None]
    compare_angles(f, "vision_rope", "", packed, spec, head_dim)


def compare_angles(f, name, suffix, coords, spec, head_dim):
    none = np.zeros(coords.shape[:2], np.int32)
    ours = rotation(Place(none, none == 0, none, coords=coords), spec, head_dim)
    for kind in ("cos", "sin"):
        theirs = f[f"out/{name}_{kind}{suffix}"]
        theirs = theirs.reshape(*coords.shape[:2], 2, -1)
        for half in range(2):  # the reference writes both halves out
            np.testing.assert_allclose(
                getattr(ours, kind)[:, :, 0], theirs[:, :, half], **CLOSE
            )


def test_position_ids_of_long_batches():
    """Images and videos of several frames, as the reference walks over them."""
    f = reference.load("deepstack/qwen3vl_positions")
    c = f.meta["config"]
    for number in range(c["cases"]):
        for side in ("right", "left"):
            compare_position_ids(f, f"{number}", side, c["spatial_merge_size"])


def compare_position_ids(f, number: str, side: str, merge: int) -> None:
    one = {
        "in/mm_token_type_ids": f[f"in/mm_token_type_ids_{number}_{side}"],
        "in/attention_mask": f[f"in/attention_mask_{number}_{side}"],
    }
    for kind in ("image", "video"):
        key = f"in/{kind}_grid_thw_{number}"
        if key in f.arrays:
            one[f"in/{kind}_grid_thw"] = f[key]
    part = reference.Fixture(one, f.meta)
    left = {
        kind: iter(
            [(w // merge, h // merge) for k, h, w in native.frames(part) if k == kind]
        )
        for kind in (1, 2)
    }
    for row, kinds in enumerate(part["in/mm_token_type_ids"]):
        valid = real(part)[row]
        found = native.marks(part, row)
        grids = [next(left[kind]) for kind, _ in found]
        before = np.array([at for _, at in found], np.int32)
        slots = max((c * r for c, r in grids), default=0)
        length = int((kinds[valid] == 0).sum())
        text, visual = coordinates(length, before, grids, slots)
        walked = np.zeros((int(valid.sum()), 3), np.int32)
        walked[kinds[valid] == 0] = text
        used = [visual[i, : c * r] for i, (c, r) in enumerate(grids)]
        walked[kinds[valid] > 0] = np.concatenate([np.zeros((0, 3), np.int32), *used])
        theirs = f[f"out/position_ids_{number}_{side}"][:, row, valid].T
        np.testing.assert_array_equal(walked, theirs)
        delta = walked.max() + 1 - len(walked)
        assert delta == f[f"out/rope_deltas_{number}_{side}"][row, 0]


def test_sizes_of_images():
    f = reference.load("deepstack/qwen3vl_preprocess")
    for factor, least, most in f.meta["config"]["smart_resize_factor_min_max"]:
        spec = NativeSpec(factor, 1, least, most)
        theirs = f[f"out/smart_resize_f{factor}_{least}_{most}"]
        for (height, width), right in zip(f["in/sizes_hw"].tolist(), theirs):
            assert spec.size((width, height)) == tuple(right[::-1])


def test_patches_of_images():
    f = reference.load("deepstack/qwen3vl_preprocess")
    c = f.meta["config"]
    spec = NativeSpec(
        c["patch_size"], c["merge_size"], c["shortest_edge"], c["longest_edge"]
    )
    pictures = [key for key in f.arrays if key.startswith("in/image_")]
    assert pictures
    for key in pictures:
        picture, number = Image.fromarray(f[key]), key.removeprefix("in/image_")
        found, (columns, rows) = patches(picture, spec, Image.Resampling.BICUBIC)
        assert [1, rows, columns] == f[f"out/grid_thw_{number}"][0].tolist()
        ours = found[: columns * rows].astype(np.float32) / 255
        ours = (ours - np.float32(c["image_mean"])) / np.float32(c["image_std"])
        ours = np.repeat(ours, c["temporal_patch_size"], axis=1)
        ours = ours.transpose(0, 4, 1, 2, 3).reshape(columns * rows, -1)
        theirs = f[f"out/pixel_values_{number}"]
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
