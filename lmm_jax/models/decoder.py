"""The language model: embedding, stack, head. Letters: T tokens, D width, W vocabulary."""

from __future__ import annotations

from collections.abc import Callable

from flax import linen as nn
import jax

from lmm_jax.models.specs import LanguageSpec
from lmm_jax.nn.embed import TokenEmbed
from lmm_jax.nn.linear import Linear
from lmm_jax.nn.norm import LayerNorm, RMSNorm
from lmm_jax.nn.params import Param
from lmm_jax.nn.stack import LayerStack, Remat

Array = jax.Array


class Decoder(nn.Module):
    """Llama-style decoder. The caller assembles the sequence and runs `stack`."""

    spec: LanguageSpec
    remat: Remat = "none"
    unroll: int = 1
    constrain: Callable[[Array], Array] = lambda x: x

    def setup(self):
        s, b = self.spec, self.spec.block
        self.embed = TokenEmbed(s.vocab, b.width, b.dtype, b.param_dtype)
        self.stack = LayerStack(
            b, s.depth, True, self.remat, self.unroll, self.constrain
        )
        self.norm = (RMSNorm if b.norm == "rms" else LayerNorm)(b.norm_eps)
        if not s.tied:
            self.head = Linear((b.width,), (s.vocab,), False, b.dtype, b.param_dtype)

    def logits(self, hidden: Array) -> Array:
        """Residual stream [..., D] after the last layer to logits [..., W]."""
        y = self.norm(hidden)
        return self.embed.attend(y) if self.spec.tied else self.head(y)


def params(spec: LanguageSpec) -> tuple[Param, ...]:
    """Rows of a Llama-style decoder in the Hugging Face naming."""
    layer = "model.layers.{layer}."
    rows = [
        Param("embed/table", "vocab embed", "model.embed_tokens.weight", "vocab embed"),
        Param("norm/scale", "norm", "model.norm.weight", "norm"),
        Param(
            "stack/layers/attn_norm/scale",
            "layers norm",
            layer + "input_layernorm.weight",
            "norm",
        ),
        Param(
            "stack/layers/mlp_norm/scale",
            "layers norm",
            layer + "post_attention_layernorm.weight",
            "norm",
        ),
        Param(
            "stack/layers/o/kernel",
            "layers heads head_dim embed",
            layer + "self_attn.o_proj.weight",
            "embed (heads head_dim)",
        ),
    ]
    for ours, heads in (("q", "heads"), ("k", "kv_heads"), ("v", "kv_heads")):
        rows.append(
            Param(
                f"stack/layers/{ours}/kernel",
                f"layers embed {heads} head_dim",
                f"{layer}self_attn.{ours}_proj.weight",
                f"({heads} head_dim) embed",
            )
        )
    for ours, into, out in (
        ("gate", "embed", "mlp"),
        ("up", "embed", "mlp"),
        ("down", "mlp", "embed"),
    ):
        rows.append(
            Param(
                f"stack/layers/{ours}/kernel",
                f"layers {into} {out}",
                f"{layer}mlp.{ours}_proj.weight",
                f"{out} {into}",
            )
        )
    if not spec.tied:
        rows.append(
            Param("head/kernel", "embed vocab", "lm_head.weight", "vocab embed")
        )
    return tuple(rows)
