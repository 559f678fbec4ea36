"""LLaVA and Bunny as their own code stores them: a language model with `mm_` fields.

The vision tower is named, and stored only where it was tuned; otherwise it comes from its
own folder. The image token has no row in the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

from lmm_jax.hub.families import llama, vision
from lmm_jax.hub.families.llava import LANGUAGES
from lmm_jax.hub.fields import Fields
from lmm_jax.hub.fused import Fused, fused_of
from lmm_jax.models import connector
from lmm_jax.models.specs import VISION, LMMSpec
from lmm_jax.nn.params import Param

# model type -> model type of its language model
KINDS = {
    "llava_llama": "llama",
    "llava_mistral": "mistral",
    "llava_qwen": "qwen2",
    "bunny-llama": "llama",
    "bunny-phi": "phi",
    "bunny-phi3": "phi3",
    "bunny-qwen2": "qwen2",
}
IGNORED = (*llama.IGNORED, r"\.position_ids$", r"\.vision_model\.head\.")
TOWER = "model.vision_tower.vision_tower."
TOWERS = {
    "clip-vit-large-patch14-336": VISION["clip-l-336"],
    "siglip-so400m-patch14-384": VISION["siglip-so400m-384"],
}
_ABOUT_TRAINING = """
    freeze_mm_mlp_adapter tune_mm_mlp_adapter use_mm_proj tokenizer_padding_side
    tokenizer_model_max_length mm_projector_lr mm_vision_tower_lr unfreeze_vision_tower
    unfreeze_mm_vision_tower continuous_training image_aspect_ratio image_grid_pinpoints
    mm_use_im_patch_token pretrain_mm_mlp_adapter group_by_modality_length
    model_max_length image_crop_resolution image_split_resolution
"""


def read(f: Fields, kinds: Mapping[str, str] = KINDS) -> LMMSpec:
    """The spec of a config; `kinds` are those of a layout that follows this one.

    Raises:
        ValueError: a field that we do not know, or a value that we cannot compute; a
            tower that we do not know by name.
    """
    kind = f.take("model_type")
    tower = str(f.take("mm_vision_tower")).rstrip("/").rsplit("/", 1)[-1]
    if tower not in TOWERS:
        raise ValueError(
            f"mm_vision_tower={tower!r} is not known by name; lmm_jax knows "
            f"{', '.join(TOWERS)}: give --config.init.vision=DIR of the tower, and "
            "--config.init.language=DIR of the language model."
        )
    seen = TOWERS[tower]
    layer = f.take("mm_vision_select_layer", -2)
    f.only("mm_vision_select_feature", "patch")
    f.only("mm_projector_type", "mlp2x_gelu")
    f.only("mm_use_im_start_end", False)
    f.only("mm_patch_merge_type", "flat")
    if f.take("use_s2", False):
        scales = tuple(scale * seen.image for scale in (1, 2, 3))
        seen = dataclasses.replace(seen, scales=scales)
    f.only("mm_hidden_size", seen.merged)
    for name in _ABOUT_TRAINING.split():
        f.take(name, None)
    language = LANGUAGES[kinds[kind]].read(f.called(kinds[kind]))
    # Only this layout knows of scales; what it shares is kept in that of transformers.
    kept = dict(kind=kind) if seen.scales else {}
    return LMMSpec(seen.read_at(layer), language, **kept)


def rows(spec: LMMSpec) -> tuple[Param, ...]:
    """Rows in the keys of the original code."""
    tower = (row.under("vision/", TOWER) for row in vision.rows(spec.vision))
    projector = (
        row.under("connector/", "model.mm_projector.") for row in connector.PROJECTOR
    )
    language = LANGUAGES[spec.language.kind].rows(spec.language)
    return (*tower, *projector, *(row.under("language/", "") for row in language))


def fused(spec: LMMSpec) -> Fused:
    """Those of the language model."""
    return fused_of(LANGUAGES[spec.language.kind], spec.language)


def config(spec: LMMSpec, kinds: Mapping[str, str] = KINDS) -> dict[str, Any]:
    """A `config.json` from which `read` gives `spec` again.

    Raises:
        ValueError: the layout has no name for this tower or language model.
    """
    v, w = spec.vision, spec.language
    sizes = vision.config(v)
    names = [name for name, tower in TOWERS.items() if vision.config(tower) == sizes]
    called = {language: kind for kind, language in reversed(kinds.items())}
    if not names or w.kind not in called:
        raise ValueError(
            f"the original layout names its tower ({', '.join(TOWERS)}) and knows "
            f"{', '.join(called)}; this model is {v.kind} of width {v.block.width} with "
            f"{w.kind}: use kind='llava'."
        )
    return {
        **LANGUAGES[w.kind].config(w),
        "model_type": called[w.kind],
        "architectures": ["LlavaLlamaForCausalLM"] if w.kind == "llama" else [],
        "mm_vision_tower": names[0],
        "mm_vision_select_layer": v.run - v.depth - 1,
        "mm_vision_select_feature": "patch",
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": v.merged,
        # Without these, the original code adds a token and reads the tower elsewhere.
        "mm_use_im_patch_token": False,
        "unfreeze_mm_vision_tower": True,
        "use_s2": bool(v.scales),
    }
