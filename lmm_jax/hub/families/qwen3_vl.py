"""Qwen3-VL (arXiv:2511.21631): images of their own size, three rotary coordinates a token,
and features of inner vision layers injected into the first language layers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from lmm_jax.hub.families.sizes import block_sizes, size_fields
from lmm_jax.hub.fields import Fields, rope_fields
from lmm_jax.hub.fused import Fused
from lmm_jax.models import connector, decoder, native_vit
from lmm_jax.models.specs import LanguageSpec, LMMSpec, VisionSpec, vit_block
from lmm_jax.nn.block import BlockSpec
from lmm_jax.nn.merger import MERGER
from lmm_jax.nn.params import Param
from lmm_jax.nn.rope import Axial, Interleaved

KINDS = {"qwen3_vl": ("Qwen3VLForConditionalGeneration",)}
IGNORED = (r"rotary_(pos_)?emb\.inv_freq$",)
_TOWERS = ("qwen3_vl_vision", "qwen3_vl")  # the second before transformers 5
_TOKENS = ("image_token_id", "video_token_id")
_TOKENS += ("vision_start_token_id", "vision_end_token_id")
# Interleaving is how the model is defined, whatever the second field says.
_MROPE = ("mrope_section", "mrope_interleaved")


def read(f: Fields) -> LMMSpec:
    """The spec of a config; images may have as many patches as the table of positions.

    Raises:
        ValueError: a field that we do not know, or a value that we cannot compute.
    """
    tied = f.take("tie_word_embeddings", False)
    inner = f.inner("text_config")
    language = dataclasses.replace(_language(inner), tied=tied)
    inner.take("tie_word_embeddings", None)  # the outer one counts
    inner.done()
    inner = f.inner("vision_config")
    vision = _vision(inner, language.block.width)
    inner.done()
    for name in _TOKENS:
        f.take(name, None)
    return LMMSpec(vision, language, kind="qwen3_vl")


def _vision(f: Fields, width: int) -> VisionSpec:
    f.only("model_type", *_TOWERS)
    f.only("in_channels", 3)
    f.only("out_hidden_size", width)
    depth, patch = f.take("depth", 27), f.take("patch_size", 16)
    block = vit_block(
        f.take("hidden_size", 1152),
        f.take("num_heads", 16),
        f.take("intermediate_size", 4304),
        f.activation("hidden_act", "gelu_pytorch_tanh"),
        norm_eps=1e-6,
    )
    positions = f.take("num_position_embeddings", 2304)
    return VisionSpec(
        math.isqrt(positions) * patch,
        patch,
        dataclasses.replace(block, rope=dataclasses.replace(f.rope(), axes=Axial())),
        depth=depth,
        run=depth,
        class_token=False,
        pre_norm=False,
        patch_bias=True,
        post_norm=False,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        native=positions,
        frames=f.take("temporal_patch_size", 2),
        merge=f.take("spatial_merge_size", 2),
        taps=tuple(f.take("deepstack_visual_indexes", (8, 16, 24))),
        kind="qwen3_vl_vision",
    )


def _language(f: Fields) -> LanguageSpec:
    f.only("model_type", "qwen3_vl_text")
    f.only("attention_bias", False)
    _, *axes = f.rope_values().get("mrope_section", (24, 20, 20))
    rope = f.rope(base=500_000.0, read=_MROPE)
    block = BlockSpec(
        **block_sizes(f),
        norm_eps=f.take("rms_norm_eps", 1e-6),
        activation=f.activation("hidden_act", "silu"),
        qk_norm=True,
        rope=dataclasses.replace(rope, axes=Interleaved(*axes)),
    )
    vocab, depth = f.take("vocab_size", 151_936), f.take("num_hidden_layers")
    return LanguageSpec(vocab, block, depth, kind="qwen3_vl_text")


def rows(spec: LMMSpec) -> tuple[Param, ...]:
    """Rows in the keys of this family, the fused tensors apart."""
    names = dataclasses.replace(
        decoder.LLAMA,
        layer="model.language_model.layers.{layer}.",
        embed="model.language_model.embed_tokens",
        norm="model.language_model.norm",
    )
    at = "model.visual."
    return (
        *(row.under("vision/", at) for row in native_vit.params(spec.vision)),
        *(row.under("connector/", f"{at}merger.") for row in MERGER),
        *connector.tap_params(spec, f"{at}deepstack_merger_list.{{layer}}."),
        *(row.under("language/", "") for row in decoder.params(spec.language, names)),
    )


def fused(spec: LMMSpec) -> Fused:
    """Queries, keys and values of the tower are one tensor."""
    width, found = spec.vision.block.width, {}
    for layer in range(spec.vision.depth):
        at = f"model.visual.blocks.{layer}.attn."
        for leaf in ("weight", "bias"):
            parts = tuple((f"{at}{name}.{leaf}", width) for name in "qkv")
            found[f"{at}qkv.{leaf}"] = parts
    return found


def config(spec: LMMSpec) -> dict[str, Any]:
    """A `config.json` from which `read` gives `spec` again.

    Token ids belong to the tokenizer; those of a published model are added by whoever
    exports one.
    """
    v, w = spec.vision, spec.language
    axes = w.block.rope.axes
    time = w.block.head_dim // 2 - axes.rows - axes.columns
    text = size_fields(w, "Qwen3VLTextModel")
    rope = text.get("rope_scaling", {"rope_type": "default"})
    rope |= {"mrope_section": [time, axes.rows, axes.columns]}
    text |= {
        "head_dim": w.block.head_dim,
        "hidden_act": w.block.activation,
        "rms_norm_eps": w.block.norm_eps,
        "rope_scaling": rope | {"mrope_interleaved": True},
    }
    vision = {
        "model_type": v.kind,
        "depth": v.depth,
        "hidden_size": v.block.width,
        "num_heads": v.block.heads,
        "intermediate_size": v.block.hidden,
        "hidden_act": "gelu_pytorch_tanh",
        "in_channels": 3,
        "out_hidden_size": w.block.width,
        "patch_size": v.patch,
        "temporal_patch_size": v.frames,
        "spatial_merge_size": v.merge,
        "num_position_embeddings": v.grid[0] * v.grid[1],
        "deepstack_visual_indexes": list(v.taps),
        **rope_fields(v.block.rope),
    }
    return {
        "model_type": "qwen3_vl",
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "text_config": text,
        "vision_config": vision,
        "tie_word_embeddings": w.tied,
    }
