"""CLIP and SigLIP vision towers, alone or in the folder of the whole two-tower model."""

from __future__ import annotations

from typing import Any

from lmm_jax.hub.fields import Fields
from lmm_jax.models import vit
from lmm_jax.models.specs import CLIP_MEAN, CLIP_STD, VisionSpec, vit_block
from lmm_jax.nn.params import Param

_CLIP = dict(
    class_token=True, pre_norm=True, patch_bias=False, mean=CLIP_MEAN, std=CLIP_STD
)
_HALF = (0.5, 0.5, 0.5)
_SIGLIP = dict(
    class_token=False, pre_norm=False, patch_bias=True, mean=_HALF, std=_HALF
)
# model type -> (class on the hub, activation and epsilon by default, what is different)
KINDS: dict[str, tuple[str, str, float, dict[str, Any]]] = {
    "clip_vision_model": ("CLIPVisionModel", "quick_gelu", 1e-5, _CLIP),
    "siglip_vision_model": ("SiglipVisionModel", "gelu_pytorch_tanh", 1e-6, _SIGLIP),
}
TOWERS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
KINDS |= {whole: KINDS[tower] for whole, tower in TOWERS.items()}
IGNORED = (
    r"^text_model\.",
    r"^(logit_scale|logit_bias|visual_projection|text_projection)",
    r"\.position_ids$",
    r"^vision_model\.head\.",
)
# Since transformers 5 a tower alone is saved without its prefix.
ALIASES = (
    (r"^(embeddings|encoder|pre_layrnorm|post_layernorm|head)\.", r"vision_model.\1."),
)
_OTHER_TOWER = (
    "text_config",
    "text_config_dict",
    "vision_config_dict",
    "logit_scale_init_value",
)
_NAMES = {"gelu_tanh": "gelu_pytorch_tanh"}


def read(f: Fields) -> VisionSpec:
    """The spec of a config; all layers run.

    Raises:
        ValueError: a field that we do not know, or a value that we cannot compute.
    """
    kind = f.take("model_type")
    if kind in TOWERS:
        tower = f.inner("vision_config")
        for name in _OTHER_TOWER:
            f.take(name, None)
        tower.take("model_type", None)
        spec = _read(tower, TOWERS[kind])
        tower.done()
        return spec
    return _read(f, kind)


def _read(f: Fields, kind: str) -> VisionSpec:
    _, activation, eps, own = KINDS[kind]
    width, heads = f.take("hidden_size"), f.take("num_attention_heads")
    f.only("num_channels", 3)
    f.take("vision_use_head", True)  # the pooled output, which no connector reads
    hidden, act = f.take("intermediate_size"), f.activation("hidden_act", activation)
    block = vit_block(width, heads, hidden, act, norm_eps=f.take("layer_norm_eps", eps))
    depth = f.take("num_hidden_layers")
    image, patch = f.take("image_size"), f.take("patch_size")
    return VisionSpec(image, patch, block, depth=depth, run=depth, kind=kind, **own)


def rows(spec: VisionSpec) -> tuple[Param, ...]:
    """Rows in the keys of a two-tower model."""
    return tuple(row.under("", "vision_model.") for row in vit.params(spec))


def config(spec: VisionSpec) -> dict[str, Any]:
    """A `config.json` from which `read` gives `spec` again."""
    b = spec.block
    return {
        "model_type": spec.kind,
        "architectures": [KINDS[spec.kind][0]],
        "hidden_size": b.width,
        "intermediate_size": b.hidden,
        "num_hidden_layers": spec.depth,
        "num_attention_heads": b.heads,
        "num_channels": 3,
        "image_size": spec.image,
        "patch_size": spec.patch,
        "hidden_act": _NAMES.get(b.activation, b.activation),
        "layer_norm_eps": b.norm_eps,
        # We hold no pooling head. The field means nothing to CLIP.
        **({} if spec.class_token else {"vision_use_head": False}),
    }
