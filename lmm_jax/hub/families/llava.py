"""LLaVA-1.5 as `transformers` stores it: a vision tower, a projector, a language model."""

from __future__ import annotations

import dataclasses
from typing import Any

from lmm_jax.hub.families import llama, phi, phi3, vision
from lmm_jax.hub.fields import Fields
from lmm_jax.hub.fused import Fused, fused_of
from lmm_jax.models import connector
from lmm_jax.models.specs import LMMSpec
from lmm_jax.nn.params import Param

KINDS = {"llava": ("LlavaForConditionalGeneration",)}
IMAGE_TOKEN = "<image>"
IGNORED = (*llama.IGNORED, r"\.position_ids$", r"^vision_tower\.vision_model\.head\.")
ALIASES = (
    # In memory since transformers 4.52, and on disk in between.
    (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
)
_TOKENS = (
    "image_token_index",
    "image_token_id",
    "image_seq_length",
    "ignore_index",
    "tie_word_embeddings",
    "vocab_size",
)
LANGUAGES = {kind: f for f in (llama, phi, phi3) for kind in f.KINDS}


def read(f: Fields) -> LMMSpec:
    """The spec of a config; the tower runs up to the layer whose features are read.

    Raises:
        ValueError: a field that we do not know, or a value that we cannot compute.
    """
    inner = f.inner("vision_config")
    inner.only("model_type", *vision.KINDS)
    inner.take("vocab_size", None)  # a stray of the published LLaVA-1.5
    tower = vision.read(inner)
    inner.done()
    inner = f.inner("text_config")
    language = LANGUAGES[inner.only("model_type", *LANGUAGES)].read(inner)
    inner.done()
    # The head has no bias here, whatever the language model has on its own (Phi-2).
    bias = f.take("lm_head_bias", False)
    language = dataclasses.replace(language, head_bias=bias)
    layer = f.take("vision_feature_layer", -2)
    if not isinstance(layer, int):
        raise ValueError(
            f"vision_feature_layer={layer!r}: lmm_jax reads one layer only."
        )
    keeps_class = tower.class_token
    f.only("vision_feature_select_strategy", "default" if keeps_class else "full")
    f.only("projector_hidden_act", "gelu")
    f.only("multimodal_projector_bias", True)
    # Ids belong to the tokenizer; the text config says the rest of the language model.
    for name in _TOKENS:
        f.take(name, None)
    return LMMSpec(tower.read_at(layer), language)


def rows(spec: LMMSpec) -> tuple[Param, ...]:
    """Rows in the keys on disk, the same for every version of `transformers`."""
    first, second = "multi_modal_projector.linear_1.", "multi_modal_projector.linear_2."
    projector = (
        dataclasses.replace(
            row,
            path=f"connector/{row.path}",
            key=row.key.replace("0.", first).replace("2.", second),
        )
        for row in connector.PROJECTOR
    )
    return (
        *(row.under("vision/", "vision_tower.") for row in vision.rows(spec.vision)),
        *projector,
        *(
            row.under("language/", "language_model.")
            for row in _language(spec).rows(spec.language)
        ),
    )


def fused(spec: LMMSpec) -> Fused:
    """Those of the language model."""
    found = fused_of(_language(spec), spec.language)
    at = "language_model."
    return {
        at + whole: tuple((at + name, n) for name, n in parts)
        for whole, parts in found.items()
    }


def config(spec: LMMSpec) -> dict[str, Any]:
    """A `config.json` from which `read` gives `spec` again.

    The image token is the last but one id, the padding token the last, as in the
    published checkpoints, whose vocabulary was extended for them. `lm_head_bias` is ours:
    `transformers` has no such model.

    Raises:
        ValueError: the layout has no place for this model.
    """
    v, w = spec.vision, spec.language
    if v.scales:
        raise ValueError(
            f"the layout of transformers has no place for a tower that reads at {v.scales} "
            "pixels: use kind='bunny-llama' or another of the original layouts."
        )
    return {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "vision_config": vision.config(v),
        "text_config": {**_language(spec).config(w), "pad_token_id": w.vocab - 1},
        "vision_feature_layer": v.run - v.depth - 1,
        "vision_feature_select_strategy": "default" if v.class_token else "full",
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "image_token_index": w.vocab - 2,
        "pad_token_id": w.vocab - 1,
        "image_seq_length": v.patches,
        "tie_word_embeddings": w.tied,
        **({"lm_head_bias": True} if w.head_bias else {}),
    }


def _language(spec: LMMSpec):
    return LANGUAGES[spec.language.kind]
