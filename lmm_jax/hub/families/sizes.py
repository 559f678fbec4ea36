"""What the configs of all language models call by the same names."""

from __future__ import annotations

from typing import Any

from lmm_jax.hub.fields import Fields, rope_fields
from lmm_jax.models.specs import LanguageSpec


def block_sizes(f: Fields) -> dict[str, int]:
    """Widths of a block, as arguments of `BlockSpec`."""
    width, heads = f.take("hidden_size"), f.take("num_attention_heads")
    return {
        "width": width,
        "heads": heads,
        "kv_heads": f.take("num_key_value_heads", heads),
        "head_dim": f.take("head_dim", width // heads),
        "hidden": f.take("intermediate_size"),
    }


def size_fields(spec: LanguageSpec, architecture: str) -> dict[str, Any]:
    """Fields of a `config.json` that all families have, rotary settings included."""
    b = spec.block
    return {
        "model_type": spec.kind,
        "architectures": [architecture],
        "vocab_size": spec.vocab,
        "hidden_size": b.width,
        "intermediate_size": b.hidden,
        "num_hidden_layers": spec.depth,
        "num_attention_heads": b.heads,
        "num_key_value_heads": b.kv_heads,
        "tie_word_embeddings": spec.tied,
        **rope_fields(b.rope),
    }
