"""ViLT folders against `transformers`, and in the keys of its own code."""

from __future__ import annotations

import dataclasses
import functools

from hypothesis import given
from hypothesis import strategies as st
import jax
import numpy as np
import pytest
import torch
import transformers

from lmm_jax import hub
from lmm_jax.checkpoint.params import check_rows
from lmm_jax.depth import make_plan
from lmm_jax.hub.families import vilt as family
from lmm_jax.hub.families import vilt_original
from lmm_jax.hub.folder import write
from lmm_jax.models import encoders, heads, vilt
from lmm_jax.strategies import Chosen
from tests.golden import reference
from tests.golden import vilt as golden
from tests.hub.test_language import FEW
from tests.hub.test_vision import scramble

PATCH = 4
CANVAS = (3, 4)  # rows and columns of patches
SHAPES = ((3, 2), (1, 4), (2, 1))  # of the images on it
CLASSES = {
    "answers": transformers.ViltForQuestionAnswering,
    "images": transformers.ViltForImagesAndTextClassification,
    "ranks": transformers.ViltForImageAndTextRetrieval,
}


@st.composite
def sizes(draw):
    count = draw(st.integers(1, 3))
    return {
        "hidden_size": count * draw(st.sampled_from([8, 12])),
        "intermediate_size": draw(st.integers(9, 40)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": count,
        "image_size": draw(st.integers(1, 5)) * PATCH,
        "patch_size": PATCH,
        "vocab_size": draw(st.integers(20, 60)),
        "max_position_embeddings": draw(st.integers(7, 12)),
        "layer_norm_eps": draw(st.sampled_from([1e-12, 1e-6])),
        "pad_token_id": None,
    }


def made(task: str, fields, folder):
    fields = dict(fields)
    if task == "images":
        fields |= dict(num_images=2, modality_type_vocab_size=3)
    if task == "answers":
        fields["num_labels"] = 5
    model = CLASSES[task](transformers.ViltConfig(**fields))
    scramble(model).save_pretrained(folder)
    return model


def opened(path):
    folder = hub.Folder(path)
    spec = hub.read_spec(folder.config, path)
    g = vilt.geometry(spec, text=7, canvas=CANVAS)
    model = vilt.Vilt(spec, make_plan(g, ()))
    abstract = jax.eval_shape(lambda k: encoders.init(model, k), jax.random.key(0))
    check_rows((family if spec.kind == "vilt" else vilt_original).rows(spec), abstract)
    return model, hub.load(folder, spec, abstract)


def inputs(images: int):
    """What `transformers` reads: ragged text, images of different size on one canvas."""
    rng = np.random.default_rng(0)
    height, width = (side * PATCH for side in CANVAS)
    mask = np.zeros((3, images, height, width), np.int64)
    for row, (down, across) in enumerate(SHAPES):
        for i in range(images):
            mask[row, i, : down * PATCH, : (across - i or 1) * PATCH] = 1
    pixels = rng.normal(size=(3, images, 3, height, width)) * mask[:, :, None]
    words = np.arange(7) < np.array([7, 4, 2])[:, None]
    return dict(
        input_ids=rng.integers(0, 20, (3, 7)),
        attention_mask=words.astype(np.int64),
        pixel_values=pixels.astype(np.float32),
        pixel_mask=mask,
    )


def logits(model, params, given):
    arrays = {f"in/{name}": value for name, value in given.items()}
    batch = golden.batch(reference.Fixture(arrays, {}), PATCH)
    score = jax.jit(functools.partial(model.apply, method="score"))
    return score({"params": params}, batch)[0]["logits"]


@pytest.mark.parametrize("task", CLASSES)
def test_logits_equal_transformers_and_tensors_go_there_and_back(
    task, tmp_path_factory
):
    @FEW
    @given(fields=sizes())
    def check(fields):
        folder = tmp_path_factory.mktemp("vilt")
        theirs = made(task, fields, folder)
        model, params = opened(folder)
        images = model.spec.head.images
        given = inputs(images)
        tensors = {k: torch.tensor(v) for k, v in given.items()}
        if images == 1:
            tensors |= {k: tensors[k][:, 0] for k in ("pixel_values", "pixel_mask")}
        with torch.no_grad():
            expected = theirs(**tensors).logits.numpy()
        bound = 1e-5 * np.abs(expected).max()
        ours = logits(model, params, given)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=bound)

        saved = hub.save(folder / "back", model.spec, params, kind="vilt")
        again = CLASSES[task].from_pretrained(saved).state_dict()
        assert again.keys() == theirs.state_dict().keys()
        for name, value in theirs.state_dict().items():
            assert torch.equal(again[name], value), name
        fields = hub.Folder(saved).config
        assert hub.read_spec(fields, saved) == model.spec

    check()


def test_both_layouts_hold_the_same_model(tmp_path):
    """The fused tensors of the one, and the names of the other."""
    fields = dict(hidden_size=16, intermediate_size=32, num_attention_heads=2)
    fields |= dict(num_hidden_layers=2, image_size=8, patch_size=PATCH, vocab_size=30)
    made("answers", fields, tmp_path / "theirs")
    model, params = opened(tmp_path / "theirs")
    own = (Chosen.of("pumer", dict(layers=(0, 1), preset="reference")),)
    block = dataclasses.replace(model.spec.block, soft_mask=True, norm_eps=1e-6)
    spec = dataclasses.replace(
        model.spec,
        block=block,
        vision=vilt.patches(8, PATCH, block),
        own=own,
        kind="vilt_original",
    )
    saved = hub.save(tmp_path / "own", spec, params, kind="vilt_original")
    assert "vilt.transformer.blocks.1.attn.qkv.weight" in hub.Folder(saved)
    again, read = opened(saved)
    assert again.spec == spec
    jax.tree.map(np.testing.assert_array_equal, read, params)


@pytest.mark.parametrize("prefix", ["vilt.", ""])
def test_a_checkpoint_of_their_own_code(prefix, tmp_path):
    """With the buffer of PuMer's, and without the prefix of ViLT's."""
    f = reference.load("pumer/vilt_vqa_a")
    spec = dataclasses.replace(golden.spec(f), kind="vilt_original")
    tensors = {
        key.replace("vilt.", prefix): np.ascontiguousarray(value)
        for key, value in f.params.items()
    }
    folder = write(tmp_path / "model", vilt_original.config(spec), tensors.items())
    model, params = opened(folder)
    assert model.spec == spec
    jax.tree.map(np.testing.assert_array_equal, params, golden.params(f, model))


def test_the_backbone_alone(tmp_path):
    config = transformers.ViltConfig(
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        num_hidden_layers=1,
        image_size=8,
        patch_size=PATCH,
        vocab_size=30,
    )
    scramble(transformers.ViltModel(config)).save_pretrained(tmp_path / "base")
    model, params = opened(tmp_path / "base")
    assert model.spec.head is None and "head" not in params


@pytest.mark.parametrize("task", ["vqav2", "nlvr2", "snli_ve", "flickr30k"])
def test_rows_and_parameters_match_one_to_one(task):
    spec = vilt.b_32(task)
    model = vilt.Vilt(spec, make_plan(vilt.geometry(spec, text=40), ()))
    abstract = jax.eval_shape(lambda k: encoders.init(model, k), jax.random.key(0))
    for names in (vilt.HUB, vilt_original.NAMES):
        check_rows(vilt.params(spec, names), abstract)


def test_what_would_change_the_maths_is_refused():
    plain = family.config(dataclasses.replace(vilt.b_32("vqav2"), text_eps=1e-6))
    for name, value in dict(qkv_bias=False, max_image_length=200, window=3).items():
        with pytest.raises(ValueError, match=name):
            hub.read_spec({**plain, name: value}, "somewhere")
    with pytest.raises(ValueError, match="ViltForTokenClassification"):
        hub.read_spec(
            {**plain, "architectures": ["ViltForTokenClassification"]}, "somewhere"
        )
    theirs = {"model_type": "vilt", "max_text_len": 40}
    theirs["architectures"] = ["ViltForQuestionAnswering"]
    for name, value in dict(prune_layers=[3], merge_r=4, vit="resnet").items():
        with pytest.raises(ValueError, match=name):
            hub.read_spec({**theirs, name: value}, "somewhere")


def test_what_transformers_has_no_place_for_is_not_exported():
    spec = vilt.b_32("vqav2")
    soft = dataclasses.replace(
        spec, block=dataclasses.replace(spec.block, soft_mask=True), text_eps=1e-6
    )
    for model in (spec, soft):
        with pytest.raises(ValueError, match="export it as vilt_original"):
            family.config(model)
    ranks = dataclasses.replace(vilt.b_32("flickr30k"), text_eps=1e-6)
    assert hub.read_spec(family.config(ranks), "somewhere").head == ranks.head
    assert heads.head("snli_ve", 768).outputs == 3
    with pytest.raises(ValueError, match="use one of vqav2, nlvr2"):
        heads.head("gqa", 768)
