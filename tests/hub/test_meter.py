"""METER in the keys of its own code and of PuMer's."""

from __future__ import annotations

import dataclasses
import math
import re

import jax
import numpy as np
import pytest
import torch
import transformers
from transformers.models.roberta.modeling_roberta import RobertaLayer

from lmm_jax import hub
from lmm_jax.checkpoint.params import check_rows, from_published, names, published
from lmm_jax.depth import make_plan
from lmm_jax.hub.families import meter as family
from lmm_jax.hub.fused import Split, joined
from lmm_jax.models import encoders, meter
from lmm_jax.strategies import Chosen
from tests.golden import meter as golden
from tests.golden import reference

# Of a config.json that PuMer's authors published; the fields of other tasks differ.
RELEASED = {
    "architectures": ["MeterForVisualReasoning"],
    "model_type": "meter",
    "tokenizer": "roberta-base",
    "vocab_size": 50265,
    "hidden_size": 768,
    "num_heads": 12,
    "num_layers": 12,
    "num_top_layer": 6,
    "mlp_ratio": 4,
    "image_size": 288,
    "vit_patch_size": 16,
    "token_types": 3,
    "max_text_len": 40,
    "drop_rate": 0.1,
    "keep_ratio": 1,
    "merge_ratio": 0,
    "merge_style": "tip",
    "sim_method": "mean_head",
    "contrast_method": None,
    "prune_layers": None,
    "reduce_layers": [2, 4, 6],
    "prune_r": 0.3,
    "merge_r": 0.5,
    "merge_text": 0.2,
    "vqa_label_size": 3129,
    "pad_token_id": 1,
    "transformers_version": "4.24.0",
}
OTHERS = {
    "vqav2": dict(architectures=["MeterForQuestionAnswering"], token_types=2),
    "snli_ve": dict(architectures=["MeterForVisualEntailment"], token_types=2),
    "flickr30k": dict(architectures=["MeterForImageAndTextRetrieval"], token_types=2),
    "nlvr2": {},
}


def abstract(spec):
    model = meter.Meter(spec, make_plan(meter.geometry(spec, text=8), ()))
    return jax.eval_shape(lambda key: encoders.init(model, key), jax.random.key(0))


def count(tree) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def test_a_config_brings_the_model_and_its_reducers():
    spec = hub.read_spec(RELEASED, "published")
    shares = dict(prune=0.3, merge=0.5, text=0.2)
    chosen = dict(layers=(1, 2, 3), preset="reference", **shares)
    assert spec.own == (Chosen.of("pumer", chosen),)
    assert spec.order == "sequential" and spec.block.soft_mask
    assert (spec.types, spec.head.task, spec.vision.patches) == (3, "nlvr2", 324)
    plan = make_plan(
        meter.geometry(spec, text=40), spec.own[0](meter.geometry(spec, text=40))
    )
    assert plan.layouts[-1].count("visual") == 15
    assert plan.layouts[-1].count("prefix") == 21


@pytest.mark.parametrize("kind", family.KINDS)
@pytest.mark.parametrize("task", OTHERS)
def test_configs_go_there_and_back(task, kind):
    spec = hub.read_spec({**RELEASED, **OTHERS[task], "model_type": kind}, "published")
    assert spec.head.task == task
    assert hub.read_spec(hub.model_config(spec, kind), "written") == spec


@pytest.mark.parametrize(
    "field, value",
    [
        ("reduce_layers", [0, 3]),
        ("tokenizer", "bert-base-uncased"),
        ("prune_layers", [2]),
        ("sim_method", "first_head"),
        ("vit", "swin_base"),
        ("architectures", ["MeterForMaskedLM"]),
    ],
)
def test_what_would_change_the_maths_is_refused(field, value):
    with pytest.raises(ValueError, match=field):
        hub.read_spec({**RELEASED, field: value}, "somewhere")


def test_their_code_reduces_only_where_it_prunes_and_merges():
    off = hub.read_spec({**RELEASED, "prune_r": 0}, "published")
    assert off.own == ()
    (text,) = hub.read_spec({**RELEASED, "merge_r": 0}, "published").own
    assert dict(text.arguments)["prune"] == 0
    assert dict(text.arguments)["text"] == 0.2


def test_other_models_are_not_exported():
    spec = meter.b_16("vqav2")
    assert family.config(spec)["model_type"] == "meter_original"
    spec = dataclasses.replace(spec, kind="meter")
    with pytest.raises(ValueError, match="order='parallel'"):
        family.config(spec)


def theirs(f, kind):
    """Tensors of a fixture, which has PuMer's keys, as `kind` calls them."""
    if kind == "meter":
        return f.params
    found = {
        "vit_model.positional_embedding": np.zeros(3),
        "vit_model.ln_final.bias": np.zeros(2),
    }
    for key, value in f.params.items():
        key = key.replace("meter.vit_model.", "vit_model.visual.")
        found[key.removeprefix("meter.").replace("ve_", "snli_")] = value
    return found


@pytest.mark.parametrize("kind", family.KINDS)
@pytest.mark.parametrize("name", ["meter_vqa_a", "meter_nlvr2_a"])
def test_every_tensor_goes_there_and_back(name, kind):
    f = reference.load(f"pumer/{name}")
    spec = dataclasses.replace(golden.spec(f), kind=kind)
    tensors, rows, fused = theirs(f, kind), family.rows(spec), family.fused(spec)
    split, shapes = Split(tensors, fused), abstract(spec)
    check_rows(rows, shapes)
    left = set(split) - names(rows, shapes)
    assert all(any(re.search(p, key) for p in family.IGNORED) for key in left)
    back = dict(joined(published(from_published(split, rows, shapes), rows), fused))
    assert set(back) == set(tensors) - left
    for key, value in back.items():
        np.testing.assert_array_equal(value, tensors[key], err_msg=key)


def test_parameters_of_the_full_size_to_the_unit():
    """Towers and layers counted by `transformers`; about 330M as published."""
    text = transformers.RobertaConfig(
        vocab_size=50265, max_position_embeddings=514, type_vocab_size=1
    )
    image = transformers.CLIPVisionConfig(
        image_size=384, patch_size=16, num_hidden_layers=11
    )
    layer = transformers.RobertaConfig(is_decoder=True, add_cross_attention=True)
    with torch.device("meta"):
        parts = {
            "text": transformers.RobertaModel(text, add_pooling_layer=False),
            "vision": transformers.CLIPVisionModel(image),
            "stack": torch.nn.ModuleList(RobertaLayer(layer) for _ in range(12)),
        }
    ours = abstract(meter.b_16("vqav2"))
    for name, part in parts.items():
        assert count(ours[name]) == sum(p.numel() for p in part.parameters()), name
    assert 320e6 < count(ours) < 335e6
    assert count(ours["head"]) == 1536 * 1536 + 3 * 1536 + 1536 * 3129 + 3129
