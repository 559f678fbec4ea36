"""Llama and those that share its keys: Mistral, Qwen2 (biased queries, keys and values),
Qwen3 (normalised queries and keys)."""

from __future__ import annotations

from typing import Any

from lmm_jax.hub.families.sizes import block_sizes, size_fields
from lmm_jax.hub.fields import Fields
from lmm_jax.models import decoder
from lmm_jax.models.specs import LanguageSpec
from lmm_jax.nn.block import BlockSpec
from lmm_jax.nn.params import Param

# model type -> (class on the hub, what its block has that Llama's has not). Qwen's configs
# name a window, which `use_sliding_window` turns off.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "mistral": ("MistralForCausalLM", {}),
    "qwen2": ("Qwen2ForCausalLM", {"bias": "qkv", "window": None}),
    "qwen3": ("Qwen3ForCausalLM", {"qk_norm": True, "window": None}),
}
IGNORED = (r"rotary_emb\.inv_freq$",)
_WINDOWS = {"mistral": 4096}  # where a config does not speak of it


def read(f: Fields) -> LanguageSpec:
    """The spec of a config.

    Raises:
        ValueError: a field that we do not know, or a value that we cannot compute.
    """
    kind = f.take("model_type")
    f.only("attention_bias", False)
    f.only("mlp_bias", False)
    f.only("use_sliding_window", False)
    depth = f.take("num_hidden_layers")
    f.only("layer_types", ["full_attention"] * depth)
    own = {"window": f.window(_WINDOWS.get(kind))} | KINDS[kind][1]
    block = BlockSpec(
        **block_sizes(f),
        norm_eps=f.take("rms_norm_eps", 1e-6),
        activation=f.activation("hidden_act", "silu"),
        rope=f.rope(),
        **own,
    )
    tied = f.take("tie_word_embeddings", False)
    return LanguageSpec(f.take("vocab_size"), block, depth, tied=tied, kind=kind)


def rows(spec: LanguageSpec) -> tuple[Param, ...]:
    """Rows in the keys of this family."""
    return decoder.params(spec)


def config(spec: LanguageSpec) -> dict[str, Any]:
    """A `config.json` from which `read` gives `spec` again."""
    b = spec.block
    return {
        **size_fields(spec, KINDS[spec.kind][0]),
        "head_dim": b.head_dim,
        "hidden_act": b.activation,
        "rms_norm_eps": b.norm_eps,
        "sliding_window": b.window,
    }
