"""FlashSloth's own layout: its published config, and what is read and written."""

from __future__ import annotations

import dataclasses
import math
import re

import jax
import numpy as np
import pytest

from lmm_jax import convert, hub
from lmm_jax.checkpoint.params import names
from lmm_jax.depth import make_plan
from lmm_jax.hub.families import flashsloth, llava_original
from lmm_jax.models import lmm, specs
from lmm_jax.strategies import Chosen
from tests.test_full_size import build

# The published config.json of the first stage; that of the second adds `image_hd`.
RELEASED = {
    "architectures": ["FlashSlothForCausalLM"],
    "model_type": "phi",
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "partial_rotary_factor": 0.4,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "max_position_embeddings": 2048,
    "layer_norm_eps": 1e-05,
    "hidden_act": "gelu_new",
    "vocab_size": 51200,
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.0,
    "attention_dropout": 0.0,
    "qk_layernorm": False,
    "tie_word_embeddings": False,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "torch_dtype": "float16",
    "transformers_version": "4.38.0",
    "use_cache": True,
    "mm_vision_tower": "checkpoints/base/siglip-so400m-patch14-384",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_hidden_size": 1152,
    "mm_projector_type": "mlp2x_gelu",
    "use_mm_proj": True,
    "mm_projector_lr": None,
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "tune_mm_mlp_adapter": False,
    "freeze_mm_mlp_adapter": False,
    "image_aspect_ratio": "square",
    "tokenizer_padding_side": "right",
    "tokenizer_model_max_length": 3072,
}
FORMS = {"stretch": {}, "quadrants": {"image_hd": True}}


@pytest.mark.parametrize("mode", FORMS)
def test_a_config_brings_model_strategy_and_views(mode):
    spec = hub.read_spec(RELEASED | FORMS[mode], "published")
    assert (spec.mode, spec.crops) == (mode, 4 * (mode == "quadrants"))
    assert spec.own == (Chosen.of("flashsloth", {"anchor": 764}),)
    v = spec.vision
    assert (v.depth, v.run, v.post_norm) == (26, 26, False)
    assert hub.read_spec(hub.model_config(spec, "flashsloth"), "written") == spec


def test_padded_images():
    spec = hub.read_spec(RELEASED | {"image_aspect_ratio": "pad"}, "padded")
    assert spec.mode == "pad"
    assert hub.model_config(spec, "flashsloth")["image_aspect_ratio"] == "pad"


@pytest.mark.parametrize("mode", FORMS)
def test_keys_and_parameters_of_the_published_files(mode):
    spec = hub.read_spec(RELEASED | FORMS[mode], "published")
    abstract = convert.placed(spec)
    assert len(names(flashsloth.rows(spec), abstract)) == 905
    counted = sum(math.prod(x.shape) for x in jax.tree.leaves(abstract))
    assert counted == 3_196_373_985


def test_round_trip_is_bit_equal(tmp_path, monkeypatch):
    block = specs.vit_block(16, 2, 24, "gelu_tanh")
    siglip = specs.VISION["siglip-so400m-384"]
    tower = dataclasses.replace(siglip, image=24, patch=4, block=block, depth=3, run=2)
    monkeypatch.setitem(llava_original.TOWERS, "tiny-tower", tower)
    small = dict(hidden_size=32, intermediate_size=48, vocab_size=800)
    small |= dict(num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=4)
    small |= dict(partial_rotary_factor=0.5)
    seen = dict(mm_vision_tower="tiny-tower", mm_hidden_size=16, image_hd=True)
    spec = hub.read_spec(RELEASED | small | seen, "tiny")
    views = dict(images=1, crops=spec.crops, prefix=0, suffix=16)
    sizes = lmm.geometry(spec, **views)
    model = lmm.LMM(spec, make_plan(sizes, lmm.own_edits(spec, sizes)))
    params = jax.jit(lambda key: lmm.init(model, key))(jax.random.key(0))
    hub.save(tmp_path, spec, params, kind="flashsloth")
    assert hub.lmm_spec(tmp_path) == spec
    again = hub.load(hub.Folder(tmp_path), spec, params)
    jax.tree.map(np.testing.assert_array_equal, again, dict(params))


@pytest.mark.parametrize("argument", ["", "hd=true"])
def test_what_our_recipes_train_is_written_in_the_layout(argument):
    """With the whole tower, whose last layer no reader misses."""
    spec = build("flashsloth", argument).whole
    fields = hub.model_config(spec, "flashsloth")
    again = hub.read_spec(fields, "written")
    assert (again.own, again.mode, again.crops) == (spec.own, spec.mode, spec.crops)
    more = names(flashsloth.rows(spec), convert.placed(spec))
    more -= names(flashsloth.rows(again), convert.placed(again))
    assert len(more) == 16 + 2
    assert all(any(re.search(p, key) for p in flashsloth.IGNORED) for key in more)


@pytest.mark.parametrize(
    "changes",
    [
        dict(own=()),
        dict(own=(Chosen.of("flashsloth", {"window": 9}),)),
        dict(mode="crop"),
    ],
)
def test_what_the_layout_has_no_name_for(changes):
    spec = dataclasses.replace(hub.read_spec(RELEASED, "published"), **changes)
    with pytest.raises(ValueError, match=r"knows flashsloth with .* alone"):
        hub.model_config(spec, "flashsloth")


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("architectures", ["OtherForCausalLM"], "architectures=.'OtherForCausalLM'"),
        ("mm_vision_select_layer", -1, "mm_vision_select_layer=-1"),
        ("image_aspect_ratio", "anyres", "image_aspect_ratio='anyres'"),
        ("qk_layernorm", True, "qk_layernorm=True"),
    ],
)
def test_what_we_cannot_compute(field, value, says):
    with pytest.raises(ValueError, match=says):
        hub.read_spec(RELEASED | {field: value}, "odd")
