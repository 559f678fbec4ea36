"""Phi-2: attention and MLP side by side, LayerNorm, biases everywhere, partial rotary."""

from __future__ import annotations

from typing import Any

from lmm_jax.hub.families.sizes import block_sizes, size_fields
from lmm_jax.hub.fields import Fields
from lmm_jax.models import decoder
from lmm_jax.models.specs import LanguageSpec
from lmm_jax.nn.block import BlockSpec
from lmm_jax.nn.params import Param

KINDS = {"phi": ("PhiForCausalLM", {})}
IGNORED = (r"rotary_emb\.inv_freq$",)
NAMES = decoder.Names(
    "model.layers.{layer}.",
    {
        "attn_norm": "input_layernorm",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.dense",
        "up": "mlp.fc1",
        "down": "mlp.fc2",
    },
    norm="model.final_layernorm",
)


def read(f: Fields) -> LanguageSpec:
    """The spec of a config.

    Raises:
        ValueError: a field that we do not know, or a value that we cannot compute.
    """
    f.only("qk_layernorm", False)
    block = BlockSpec(
        **block_sizes(f),
        norm="layer",
        norm_eps=f.take("layer_norm_eps", 1e-5),
        activation=f.activation("hidden_act", "gelu_new"),
        gated=False,
        bias="all",
        rope=f.rope(fraction=0.5),
        parallel=True,
    )
    f.only("tie_word_embeddings", False)
    depth = f.take("num_hidden_layers")
    return LanguageSpec(f.take("vocab_size"), block, depth, head_bias=True, kind="phi")


def rows(spec: LanguageSpec) -> tuple[Param, ...]:
    """Rows in the keys of this family."""
    return decoder.params(spec, NAMES)


def config(spec: LanguageSpec) -> dict[str, Any]:
    """A `config.json` from which `read` gives `spec` again."""
    b = spec.block
    return {
        **size_fields(spec, KINDS[spec.kind][0]),
        "hidden_act": "gelu_new",
        "layer_norm_eps": b.norm_eps,
        "partial_rotary_factor": b.rope.fraction,
    }
