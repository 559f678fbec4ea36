"""Full-size specs from the official `config.json` values: parameters to the unit.

Configs and counts: the models' pages on the hub; counts of the towers with their heads.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import pytest

from lmm_jax.depth import make_plan
from lmm_jax.depth.cost import cost
from lmm_jax.hub.families import FAMILIES
from lmm_jax.hub.fields import Fields
from lmm_jax.models import lmm, specs
from lmm_jax.models.specs import LMMSpec
from tests.hub import test_language, test_vision

LLAMA = dict(
    model_type="llama", hidden_act="silu", rms_norm_eps=1e-5, tie_word_embeddings=False
)
VICUNA = dict(LLAMA, vocab_size=32000, max_position_embeddings=4096)
LLAMA3 = dict(
    LLAMA,
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    rope_theta=500000.0,
)
SCALING = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)
QWEN2 = dict(
    model_type="qwen2",
    hidden_act="silu",
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    sliding_window=131072,
    use_sliding_window=False,
)
LANGUAGE = {
    "vicuna-7b": (
        dict(
            VICUNA,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=32,
        ),
        6_738_415_616,
    ),
    "vicuna-13b": (
        dict(
            VICUNA,
            hidden_size=5120,
            intermediate_size=13824,
            num_hidden_layers=40,
            num_attention_heads=40,
            num_key_value_heads=40,
        ),
        13_015_864_320,
    ),
    "llama-3-8b": (LLAMA3, 8_030_261_248),
    "llama-3.1-8b": (dict(LLAMA3, rope_scaling=SCALING), 8_030_261_248),
    "qwen2-0.5b": (
        dict(
            QWEN2,
            vocab_size=151936,
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            max_window_layers=24,
            tie_word_embeddings=True,
        ),
        494_032_768,
    ),
    "qwen2-7b": (
        dict(
            QWEN2,
            vocab_size=152064,
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            max_window_layers=28,
        ),
        7_615_616_512,
    ),
    "qwen3-8b": (
        dict(
            model_type="qwen3",
            vocab_size=151936,
            hidden_size=4096,
            intermediate_size=12288,
            num_hidden_layers=36,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            hidden_act="silu",
            rms_norm_eps=1e-6,
            rope_theta=1e6,
            attention_bias=False,
        ),
        8_190_735_360,
    ),
    "phi-2": (
        dict(
            model_type="phi",
            vocab_size=51200,
            hidden_size=2560,
            intermediate_size=10240,
            num_hidden_layers=32,
            num_attention_heads=32,
            partial_rotary_factor=0.4,
            hidden_act="gelu_new",
            layer_norm_eps=1e-5,
            resid_pdrop=0.1,
            qk_layernorm=False,
        ),
        2_779_683_840,
    ),
    "phi-3-mini-4k": (
        dict(
            model_type="phi3",
            vocab_size=32064,
            hidden_size=3072,
            intermediate_size=8192,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=32,
            hidden_act="silu",
            rms_norm_eps=1e-5,
            rope_theta=10000.0,
            sliding_window=2047,
            attention_bias=False,
        ),
        3_821_079_552,
    ),
}

_D, _F = 1152, 4304  # of the pooling head: a probe, attention, a norm and an MLP
SIGLIP_HEAD = _D + 4 * _D * (_D + 1) + 2 * _D + _D * _F + _F + _F * _D + _D
VISION = {
    "clip-l-336": (
        dict(
            model_type="clip_vision_model",
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
            projection_dim=768,
        ),
        303_507_456,
    ),
    "siglip-so400m-384": (
        dict(
            model_type="siglip_vision_model",
            hidden_size=1152,
            intermediate_size=4304,
            num_hidden_layers=27,
            num_attention_heads=16,
            image_size=384,
            patch_size=14,
        ),
        428_225_600 - SIGLIP_HEAD,
    ),
    "clip-b-16": (
        dict(
            model_type="clip",
            logit_scale_init_value=2.6592,
            projection_dim=512,
            text_config=dict(hidden_size=512, model_type="clip_text_model"),
            text_config_dict=None,
            vision_config=dict(
                model_type="clip_vision_model",
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=12,
                num_attention_heads=12,
                image_size=224,
                patch_size=16,
                hidden_act="quick_gelu",
                projection_dim=512,
            ),
        ),
        85_799_424,
    ),
    "siglip2-so400m-384": (
        dict(
            model_type="siglip",
            initializer_factor=1.0,
            text_config=dict(
                hidden_size=1152,
                model_type="siglip_text_model",
                projection_size=1152,
                vocab_size=256000,
            ),
            vision_config=dict(
                model_type="siglip_vision_model",
                hidden_size=1152,
                intermediate_size=4304,
                num_hidden_layers=27,
                num_attention_heads=16,
                image_size=384,
                patch_size=14,
            ),
        ),
        428_225_600 - SIGLIP_HEAD,
    ),
}


def qwen3_vl(width, hidden, layers, heads, *, tied, tower):
    depth, vision_width, vision_hidden, taps = tower
    return dict(
        model_type="qwen3_vl",
        tie_word_embeddings=tied,
        text_config=dict(
            model_type="qwen3_vl_text",
            vocab_size=151936,
            hidden_size=width,
            intermediate_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=8,
            head_dim=128,
            hidden_act="silu",
            rms_norm_eps=1e-6,
            rope_theta=5_000_000,
            rope_scaling=dict(
                mrope_interleaved=True, mrope_section=[24, 20, 20], rope_type="default"
            ),
            attention_bias=False,
        ),
        vision_config=dict(
            model_type="qwen3_vl",
            depth=depth,
            hidden_size=vision_width,
            intermediate_size=vision_hidden,
            num_heads=16,
            in_channels=3,
            out_hidden_size=width,
            patch_size=16,
            temporal_patch_size=2,
            spatial_merge_size=2,
            num_position_embeddings=2304,
            deepstack_visual_indexes=taps,
            hidden_act="gelu_pytorch_tanh",
        ),
    )


_SMALL, _LARGE = (24, 1024, 4096, [5, 11, 17]), (27, 1152, 4304, [8, 16, 24])
QWEN3_VL = {
    "2b": (qwen3_vl(2048, 6144, 28, 16, tied=True, tower=_SMALL), 2_127_532_032),
    "4b": (qwen3_vl(2560, 9728, 36, 32, tied=True, tower=_SMALL), 4_437_815_808),
    "8b": (qwen3_vl(4096, 12288, 36, 32, tied=False, tower=_LARGE), 8_767_123_696),
}


def read(fields):
    found = Fields(fields)
    spec = FAMILIES[fields["model_type"]].read(found)
    found.done()
    return spec


def count(tree) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", LANGUAGE)
def test_language_models(name):
    fields, parameters = LANGUAGE[name]
    assert count(test_language.abstract(read(fields))) == parameters


def test_bunny_with_three_scales():
    """Version 1.1 with Llama-3-8B: 14 passes of the tower, three features side by side."""
    tower = read(VISION["siglip-so400m-384"][0])
    tower = dataclasses.replace(tower.read_at(-2), scales=(384, 768, 1152))
    spec = LMMSpec(tower, read(LANGUAGE["llama-3-8b"][0]))
    sizes = lmm.geometry(spec, images=1, crops=0, prefix=8, suffix=8)
    model = lmm.LMM(spec, make_plan(sizes, ()))
    params = jax.eval_shape(lambda key: lmm.init(model, key), jax.random.key(0))
    assert count(params["connector"]) == 30_941_184
    assert lmm.abstract_batch(model, 1)["images"].shape[3:5] == (1152, 1152)
    plain = dataclasses.replace(sizes, passes=1)
    assert cost(model.plan).vision == 14 * cost(make_plan(plain, ())).vision


@pytest.mark.parametrize("name", [n for n in LANGUAGE if n != "llama-3.1-8b"])
def test_named_sizes_are_those_of_the_config(name):
    fields, _ = LANGUAGE[name]
    assert specs.named("language", name.removesuffix("-4k")) == read(fields)


@pytest.mark.parametrize("name", VISION)
def test_towers(name):
    fields, parameters = VISION[name]
    assert count(test_vision.abstract(read(fields))) == parameters


@pytest.mark.parametrize("name", QWEN3_VL)
def test_qwen3_vl(name):
    fields, parameters = QWEN3_VL[name]
    spec = read(fields)
    sizes = lmm.geometry(spec, images=1, crops=0, prefix=0, suffix=8)
    model = lmm.LMM(spec, make_plan(sizes, lmm.own_edits(spec, sizes)))
    abstract = jax.eval_shape(lambda key: lmm.init(model, key), jax.random.key(0))
    assert count(abstract) == parameters
