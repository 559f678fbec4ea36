"""LLaVA's and Bunny's own layout, made from what `transformers` writes.

The renaming is that of the original's conversion script, stated here once more.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from lmm_jax import hub
from lmm_jax.hub import folder as folders
from lmm_jax.hub.families import llava_original
from tests.hub.test_llava import PAIRS, folder, ours  # noqa: F401

RENAMED = (
    ("vision_tower.", "model.vision_tower.vision_tower.vision_model."),
    ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
    ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)
KINDS = {"llama": "llava_llama", "qwen2": "bunny-qwen2", "phi3": "bunny-phi3"}
TOWER = "some/tiny-tower"


@pytest.fixture
def original(folder, tmp_path, monkeypatch):  # noqa: F811
    """The same model in the other layout, and what the first one holds."""
    path, _ = folder
    source = hub.Folder(path)
    spec = hub.lmm_spec(path)
    config = dict(source.config["text_config"])
    config |= {
        "model_type": KINDS[spec.language.kind],
        "mm_vision_tower": TOWER,
        "mm_hidden_size": spec.vision.block.width,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "pad",
        "tokenizer_model_max_length": 2048,
    }
    tower = dataclasses.replace(spec.vision, run=spec.vision.depth)
    monkeypatch.setitem(llava_original.TOWERS, "tiny-tower", tower)

    def tensors(tower: bool):
        for name in source:
            for theirs, mine in RENAMED:
                if name.startswith(theirs):
                    if tower or "vision_tower" not in name:
                        yield mine + name.removeprefix(theirs), source[name][:]
                    break

    def write(name: str, *, tower: bool = True, **fields):
        return folders.write(tmp_path / name, config | fields, tensors(tower))

    return write, ours(path)


def read(path, abstract, **options):
    return hub.load(hub.Folder(path), hub.lmm_spec(path), abstract, **options)


def same(one, two) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_both_layouts_hold_the_same_model(original):
    write, (model, params, _) = original
    path = write("whole")
    assert hub.lmm_spec(path) == model.spec
    same(read(path, params), params)


def test_a_tower_that_was_not_tuned_is_not_stored(original):
    write, (_, params, _) = original
    path = write("part", tower=False)
    with pytest.raises(ValueError, match=r"init\.vision"):
        read(path, params)
    found = read(path, params, without=["vision"])
    same(found, {name: params[name] for name in ("connector", "language")})


def test_round_trip(original, tmp_path):
    write, (_, params, _) = original
    path = write("whole")
    spec = hub.lmm_spec(path)
    kind = hub.Folder(path).config["model_type"]
    saved = hub.save(tmp_path / "back", spec, params, kind=kind)
    one, two = hub.Folder(path), hub.Folder(saved)
    unread = [name for name in one if ".head." in name]
    assert set(one) - set(unread) == set(two)
    for name in two:
        np.testing.assert_array_equal(one[name][:], two[name][:])
    assert hub.lmm_spec(saved) == spec


def test_a_tower_that_reads_at_three_scales(original):
    """Bunny v1.1; its sizes are kept in this layout, which alone has a place for them."""
    write, (model, _, _) = original
    width = model.spec.vision.block.width
    spec = hub.lmm_spec(write("s2", use_s2=True, mm_hidden_size=3 * width))
    assert spec.vision.scales == (12, 24, 36) and spec.vision.view == 36
    typed = spec.replaced(
        dtype="bfloat16", param_dtype="bfloat16", remat="none", unroll=1
    )
    assert (
        hub.read_spec(hub.model_config(typed, spec.kind), "kept").vision == spec.vision
    )
    with pytest.raises(ValueError, match="no place for a tower that reads at"):
        hub.model_config(spec, "llava")


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("mm_projector_type", "linear", "mm_projector_type='linear'"),
        ("use_s2", True, "mm_hidden_size=24"),  # three times as many with S2
        ("mm_vision_tower", "other", "mm_vision_tower='other' is not known by name"),
        ("mm_resampler_type", "perceiver", "does not know .* mm_resampler_type"),
    ],
)
def test_what_we_cannot_compute(original, field, value, says):
    write, _ = original
    path = write("odd", tower=False, **{field: value})
    with pytest.raises(ValueError, match=says):
        hub.lmm_spec(path)


@pytest.mark.parametrize("folder", PAIRS[:1], indirect=True, ids="-".join)
def test_the_first_releases_used_the_other_name(folder, original):  # noqa: F811
    write, (model, _, _) = original
    assert hub.lmm_spec(write("old", tower=False, model_type="llava")) == model.spec
