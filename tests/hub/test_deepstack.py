"""DeepStack's own layout: the golden models, written as it stores them."""

from __future__ import annotations

import dataclasses
import math

import jax
import ml_collections
import numpy as np
import pytest

from lmm_jax import convert, experiment, hub, weights
from lmm_jax.checkpoint.params import names
from lmm_jax.data.images import candidates
from lmm_jax.hub import folder as folders
from lmm_jax.hub.families import deepstack, llava_original
from tests.golden import reference, test_deepstack_hd
from tests.small import small_config
from tests.test_full_size import ONE, build

FORMS = ["deepstack_l", "deepstack_hd"]
# Of the two published config.json, what is about the model.
RELEASED = {
    "model_type": "deepstack_llama",
    "architectures": ["DeepstackLlamaForCausalLM"],
    "image_aspect_ratio": "deepstack",
    "num_crops": 4,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_hidden_size": 1024,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_patch_merge_type": "flat",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "tokenizer_model_max_length": 2048,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
HD = {
    "is_anyres_deepstack": True,
    "deepstack_sampling": "2d",
    "mm_vision_tower_lr": 2e-6,
    "unfreeze_mm_vision_tower": True,
    # Of the LLaVA-NeXT that it was made from; its own code does not read them.
    "image_grid_pinpoints": [[336, 672], [672, 336]],
    "image_crop_resolution": 224,
    "image_split_resolution": 224,
    "model_max_length": 4096,
}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a golden model in the layout; fields are added to its config."""

    def made(form: str, name: str = "published", **fields):
        f = reference.load(f"deepstack/{form}")
        tower = reference.lmm_spec(f.meta["config"]).vision
        tower = dataclasses.replace(tower, run=tower.depth)
        monkeypatch.setitem(llava_original.TOWERS, "tiny-tower", tower)
        config = {
            **RELEASED,
            **f.meta["config"]["llm"],
            "mm_vision_tower": "tiny-tower",
        }
        config |= dict(mm_hidden_size=tower.block.width) | fields
        del config["family"]
        config |= HD if form == "deepstack_hd" else {}
        return folders.write(tmp_path / name, config, f.params.items())

    return made


def loaded(path, tmp_path, **views):
    """The experiment of a config that names the folder and no strategy."""
    config = small_config(tmp_path, "llava")
    config.strategy = ml_collections.ConfigDict()
    config.text.images = 1
    config.image.update(mode="auto", **views)
    config.init = dict(load=str(path))
    return experiment.build(config, ONE)


@pytest.mark.parametrize(("start", "interval"), [(1, 1), (0, 2)])
@pytest.mark.parametrize("form", FORMS)
def test_a_folder_brings_model_strategy_and_views(
    form, start, interval, write, tmp_path
):
    f = reference.load(f"deepstack/{form}")
    said = dict(deepstack_start_id=start, deepstack_interval=interval)
    exp = loaded(write(form, **said), tmp_path)
    assert (exp.images.cells, exp.images.fine) == (4, 2 * (form == "deepstack_hd"))
    ids, mask = f["in/input_ids"], f["in/attention_mask"]
    model = exp.model(train=False, suffix=ids.shape[1])
    if form == "deepstack_hd":
        batch = test_deepstack_hd.batch(model.plan)
    else:
        batch = reference.batch(f, model.plan, ids, mask)
    params = weights.initial(exp, model)
    state, logits = reference.run(model, params, batch)
    expected = f[f"out/logits_s{start}_i{interval}"]
    real = f["out/expanded_attention_mask"] > 0
    ours = reference.in_order(logits, state)
    for mine, theirs, valid in zip(ours, expected, real, strict=True):
        np.testing.assert_allclose(mine, theirs[valid], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_round_trip_is_bit_equal(form, write, tmp_path):
    path = write(form, deepstack_start_id=2)
    convert.from_hub(path, tmp_path / "kept")
    saved = tmp_path / "back"
    convert.to_hub(tmp_path / "kept", saved)
    assert hub.lmm_spec(saved) == hub.lmm_spec(path)
    one, two = hub.Folder(path), hub.Folder(saved)
    assert set(one) == set(two)
    for name in one:
        np.testing.assert_array_equal(one[name][:], two[name][:])
    same = ("model_type", "architectures", "mm_use_im_patch_token")
    assert all(two.config[name] == RELEASED[name] for name in same)
    assert two.config["unfreeze_mm_vision_tower"]


@pytest.mark.parametrize(("fields", "keys"), [({}, 686), (HD, 687)])
def test_keys_and_bytes_of_the_published_files(fields, keys):
    spec = hub.read_spec(RELEASED | fields, "published")
    typed = spec.replaced(
        dtype="bfloat16", param_dtype="bfloat16", remat="none", unroll=1
    )
    abstract = convert.placed(typed)
    assert len(names(deepstack.rows(spec), abstract)) == keys
    entries = sum(math.prod(x.shape) for x in jax.tree.leaves(abstract))
    assert 2 * entries == 14_125_805_568 + 2 * 4096 * (keys - 686)


@pytest.mark.parametrize("form", ["l", "hd"])
def test_what_our_recipes_train_is_written_in_the_layout(form):
    spec = build("deepstack", f"form={form},start=2,interval=3").whole
    fields = hub.model_config(spec, "deepstack_llama")
    assert (fields["deepstack_start_id"], fields["deepstack_interval"]) == (2, 3)
    assert fields["num_crops"] == 4
    assert fields["is_anyres_deepstack"] == (form == "hd")
    again = hub.read_spec(fields, "written")
    assert (again.own, again.pinpoints) == (spec.own, spec.pinpoints)


@pytest.mark.parametrize(
    "changes",
    [
        dict(own=()),
        dict(mode="pad"),
        dict(fine=2, crops=0, pinpoints=((2, 2), (1, 3))),
    ],
)
def test_what_the_layout_has_no_name_for(changes):
    spec = dataclasses.replace(hub.read_spec(RELEASED, "published"), **changes)
    with pytest.raises(ValueError, match="layout knows deepstack and deepstack_hd"):
        hub.model_config(spec, "deepstack_llama")


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("image_aspect_ratio", None, "lacks 'image_aspect_ratio'"),
        ("image_aspect_ratio", "pad", "image_aspect_ratio='pad'"),
        ("num_crops", None, "lacks 'num_crops'"),
        ("deepstack_args_for_ablation", "dummy_local", "'dummy_local'"),
        ("twoviews_unshare", True, "twoviews_unshare=True"),
        ("deepstack_sampling", "3d", "deepstack_sampling='3d'"),
    ],
)
def test_what_we_cannot_compute(field, value, says):
    with pytest.raises(ValueError, match=says):
        hub.read_spec(RELEASED | {field: value}, "odd")


def test_budgets_and_orders():
    spec = hub.read_spec(RELEASED | HD | {"num_crops": 9}, "large")
    assert (spec.pinpoints, spec.fine, spec.crops) == (candidates(9), 3, 0)
    spec = hub.read_spec(RELEASED | {"deepstack_sampling": "1d"}, "other")
    assert dict(spec.own[0].arguments)["order"] == "1d"
