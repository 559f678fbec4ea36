"""Vision towers against `transformers`."""

from __future__ import annotations

import dataclasses
import functools

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import numpy as np
import pytest
import torch
import transformers

from lmm_jax import hub
from lmm_jax.depth.planner import Scan
from lmm_jax.models.vit import VisionTransformer
from tests.hub.test_language import DTYPES, FEW


@st.composite
def sizes(draw):
    heads, patch = draw(st.integers(1, 3)), draw(st.sampled_from([4, 7]))
    spare = draw(st.integers(0, 3))  # pixels beyond the last whole patch
    return {
        "hidden_size": heads * draw(st.sampled_from([8, 12])),
        "intermediate_size": draw(st.integers(9, 40)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "image_size": draw(st.integers(1, 3)) * patch + spare,
        "patch_size": patch,
    }


TOWERS = {
    "clip": (transformers.CLIPVisionConfig, transformers.CLIPVisionModel),
    "siglip": (transformers.SiglipVisionConfig, transformers.SiglipVisionModel),
}


def scramble(model):
    """Weights that matter, biases and norms included."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model.eval()


@pytest.mark.parametrize("tower", TOWERS)
def test_features_of_every_layer_equal_transformers(tower, tmp_path_factory):
    @FEW
    @given(fields=sizes(), dtype=DTYPES)
    def check(fields, dtype):
        make_config, make_model = TOWERS[tower]
        folder = tmp_path_factory.mktemp(tower)
        model = scramble(make_model(make_config(**fields)))
        model.to(dtype).save_pretrained(folder)
        model.float()
        opened = hub.Folder(folder)
        spec = hub.read_spec(opened.config, opened.path)
        params = hub.load(opened, spec, abstract(spec))

        side = spec.image
        pixels = np.random.default_rng(0).normal(size=(2, 3, side, side))
        with torch.no_grad():
            states = model(torch.tensor(pixels).float(), output_hidden_states=True)
        images = pixels.transpose(0, 2, 3, 1).astype(np.float32)
        for run in range(1, spec.depth + 1):
            theirs = states.hidden_states[run][:, int(spec.class_token) :].numpy()
            ours = features(dataclasses.replace(spec, run=run), params, images)
            bound = 1e-5 * np.abs(theirs).max()
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=bound)

        saved = hub.save(folder / "back", spec, params, kind=spec.kind)
        again, whole = hub.Folder(saved), model.to(dtype).state_dict()
        written = {name.removeprefix("vision_model."): again[name] for name in again}
        for name, tensor in written.items():
            theirs = whole[name.removeprefix("vision_model.")].float().numpy()
            np.testing.assert_array_equal(tensor[:].astype(np.float32), theirs)
            assert str(tensor[:].dtype) == str(dtype).removeprefix("torch.")
        assert {n for n in whole if not n.startswith("head.")} == set(written)
        make_model.from_pretrained(saved)

    check()


def test_all_tokens_after_the_last_norm(tmp_path_factory):
    """What METER reads: [CLS] too, of CLIP without its last layer."""

    @FEW
    @given(fields=sizes())
    def check(fields):
        folder = tmp_path_factory.mktemp("clip")
        depth = fields["num_hidden_layers"] + 1
        config = transformers.CLIPVisionConfig(**fields | {"num_hidden_layers": depth})
        model = scramble(transformers.CLIPVisionModel(config))
        model.save_pretrained(folder)
        spec = hub.tower_spec(folder, -2)
        params = hub.load(hub.Folder(folder), spec, abstract(spec))
        pixels = np.random.default_rng(0).normal(size=(2, 3, spec.image, spec.image))
        with torch.no_grad():
            found = model(torch.tensor(pixels).float(), output_hidden_states=True)
            norm = getattr(model, "vision_model", model).post_layernorm
            theirs = norm(found.hidden_states[-2]).numpy()
        ours = VisionTransformer(spec).apply(
            {"params": params},
            pixels.transpose(0, 2, 3, 1).astype(np.float32),
            (Scan(0, spec.run),),
            method="tokens",
        )
        bound = 1e-5 * np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=bound)

    check()


WHOLE = {
    "clip": (transformers.CLIPConfig, transformers.CLIPModel),
    "siglip": (transformers.SiglipConfig, transformers.SiglipModel),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_the_tower_of_a_two_tower_folder(kind, tmp_path):
    """CLIP B/16, SigLIP and SigLIP2 of fixed resolution are published so."""
    tiny = dict(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1
    )
    make_config, make_model = WHOLE[kind]
    config = make_config(
        text_config=dict(tiny, vocab_size=9, max_position_embeddings=4),
        vision_config=dict(tiny, image_size=12, patch_size=4),
    )
    model = scramble(make_model(config))
    model.save_pretrained(tmp_path)
    spec = hub.tower_spec(tmp_path, -2)
    params = hub.load(hub.Folder(tmp_path), spec, abstract(spec))
    pixels = np.random.default_rng(0).normal(size=(2, 3, 12, 12)).astype(np.float32)
    with torch.no_grad():
        found = model.vision_model(torch.tensor(pixels), output_hidden_states=True)
    theirs = found.hidden_states[-2][:, int(spec.class_token) :].numpy()
    ours = features(spec, params, pixels.transpose(0, 2, 3, 1))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(sorted(TOWERS)),
    st.integers(1, 6),
    st.integers(1, 40),
    st.sampled_from(["float32", "bfloat16"]),
)
def test_other_image_sizes_equal_transformers(
    tmp_path_factory, tower, grid, side, kind
):
    make_config, make_model = TOWERS[tower]
    fields = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    fields |= dict(num_attention_heads=1, image_size=4 * grid, patch_size=4)
    folder = tmp_path_factory.mktemp(tower)
    model = scramble(make_model(make_config(**fields))).to(getattr(torch, kind))
    model.save_pretrained(folder)
    model = model.float()
    opened = hub.Folder(folder)
    spec = hub.read_spec(opened.config, opened.path)
    spec = dataclasses.replace(spec, image=4 * side + 1)
    params = hub.load(opened, spec, abstract(spec))

    pixels = np.random.default_rng(0).normal(size=(1, 3, spec.image, spec.image))
    with torch.no_grad():
        found = model(
            torch.tensor(pixels).float(),
            output_hidden_states=True,
            interpolate_pos_encoding=True,
        )
    theirs = found.hidden_states[1][:, int(spec.class_token) :].numpy()
    ours = features(spec, params, pixels.transpose(0, 2, 3, 1).astype(np.float32))
    bound = (1e-5 if kind == "float32" else 2e-2) * np.abs(theirs).max()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=bound)


@functools.partial(jax.jit, static_argnums=0)
def features(spec, params, images):
    model = VisionTransformer(spec)
    return model.apply({"params": params}, images, (Scan(0, spec.run),))[0]


def abstract(spec):
    shape = (1, spec.view, spec.view, 3)
    image = jax.ShapeDtypeStruct(shape, np.float32)
    steps = (Scan(0, spec.run),)

    def init(key, x):
        return VisionTransformer(spec).init(key, x, steps)["params"]

    return jax.eval_shape(init, jax.random.key(0), image)
