"""Phi-3: Llama's mathematics, with fused projections and a sliding window."""

from __future__ import annotations

from typing import Any

from lmm_jax.hub.families.sizes import block_sizes, size_fields
from lmm_jax.hub.fields import Fields
from lmm_jax.hub.fused import Fused
from lmm_jax.models import decoder
from lmm_jax.models.specs import LanguageSpec
from lmm_jax.nn.block import BlockSpec
from lmm_jax.nn.params import Param

KINDS = {"phi3": ("Phi3ForCausalLM", {})}
IGNORED = (r"rotary_emb\.inv_freq$",)


def read(f: Fields) -> LanguageSpec:
    """The spec of a config.

    Raises:
        ValueError: a field that we do not know, or a value that we cannot compute.
    """
    f.only("attention_bias", False)
    block = BlockSpec(
        **block_sizes(f),
        norm_eps=f.take("rms_norm_eps", 1e-5),
        activation=f.activation("hidden_act", "silu"),
        rope=f.rope(),
        window=f.window(None),
    )
    tied, depth = f.take("tie_word_embeddings", False), f.take("num_hidden_layers")
    return LanguageSpec(f.take("vocab_size"), block, depth, tied=tied, kind="phi3")


def rows(spec: LanguageSpec) -> tuple[Param, ...]:
    """Rows in the keys of this family, the fused tensors apart."""
    return decoder.params(spec)


def fused(spec: LanguageSpec) -> Fused:
    """Queries, keys and values are one tensor; so are the two halves of the MLP."""
    b, found = spec.block, {}
    keys = b.kv_heads * b.head_dim
    attention = (("q", b.heads * b.head_dim), ("k", keys), ("v", keys))
    halves = (("gate", b.hidden), ("up", b.hidden))
    for layer in range(spec.depth):
        at = f"model.layers.{layer}."
        for whole, parts in (
            ("self_attn.qkv_proj", [(f"self_attn.{x}_proj", n) for x, n in attention]),
            ("mlp.gate_up_proj", [(f"mlp.{x}_proj", n) for x, n in halves]),
        ):
            found[f"{at}{whole}.weight"] = tuple(
                (f"{at}{x}.weight", n) for x, n in parts
            )
    return found


def config(spec: LanguageSpec) -> dict[str, Any]:
    """A `config.json` from which `read` gives `spec` again."""
    b = spec.block
    return {
        **size_fields(spec, KINDS[spec.kind][0]),
        "hidden_act": b.activation,
        "rms_norm_eps": b.norm_eps,
        "sliding_window": b.window,
    }
