"""The language model: embedding, stack, head. Letters: T tokens, D width, W vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses

from flax import linen as nn
import jax

from lmm_jax.models.specs import LanguageSpec
from lmm_jax.nn import block
from lmm_jax.nn.embed import TokenEmbed
from lmm_jax.nn.kernels import Kernel
from lmm_jax.nn.linear import Linear
from lmm_jax.nn.norm import LayerNorm, RMSNorm
from lmm_jax.nn.params import Param
from lmm_jax.nn.remat import Remat
from lmm_jax.nn.stack import LayerStack

Array = jax.Array


class Decoder(nn.Module):
    """Llama-style decoder. The caller assembles the sequence and runs `stack`."""

    spec: LanguageSpec
    remat: Remat = "none"
    unroll: int = 1
    constrain: Callable[[Array], Array] = lambda x: x
    kernel: Kernel | None = None

    def setup(self):
        s, b = self.spec, self.spec.block
        self.embed = TokenEmbed(s.vocab, b.width, b.dtype, b.param_dtype)
        self.stack = LayerStack(
            b, s.depth, True, self.remat, self.unroll, self.constrain, self.kernel
        )
        self.norm = (RMSNorm if b.norm == "rms" else LayerNorm)(b.norm_eps)
        if not s.tied:
            width, vocab = (b.width,), (s.vocab,)
            self.head = Linear(width, vocab, s.head_bias, b.dtype, b.param_dtype)

    def logits(self, hidden: Array) -> Array:
        """Residual stream [..., D] after the last layer to logits [..., W]."""
        y = self.norm(hidden)
        return self.embed.attend(y) if self.spec.tied else self.head(y)


@dataclasses.dataclass(frozen=True)
class Names:
    """What a family of checkpoints calls the parts of a decoder.

    Attributes:
        layer: prefix of one layer.
        block: our submodule of a block -> name below that prefix.
        embed, norm, head: of the other three.
    """

    layer: str
    block: Mapping[str, str]
    embed: str = "model.embed_tokens"
    norm: str = "model.norm"
    head: str = "lm_head"


LLAMA = Names(
    "model.layers.{layer}.",
    {
        "attn_norm": "input_layernorm",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "q_norm": "self_attn.q_norm",
        "k_norm": "self_attn.k_norm",
        "mlp_norm": "post_attention_layernorm",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    },
)


def params(spec: LanguageSpec, names: Names = LLAMA) -> tuple[Param, ...]:
    """Rows of a decoder, by default in the Hugging Face naming of Llama."""
    rows = [
        Param("embed/table", "vocab embed", f"{names.embed}.weight", "vocab embed"),
        Param("norm/scale", "norm", f"{names.norm}.weight", "norm"),
    ]
    if spec.block.norm == "layer":
        rows.append(Param("norm/bias", "norm", f"{names.norm}.bias", "norm"))
    blocks = block.params(spec.block, names.layer, names.block)
    rows += [row.under("stack/", "") for row in blocks]
    if not spec.tied:
        layout = "vocab embed"
        rows.append(Param("head/kernel", "embed vocab", f"{names.head}.weight", layout))
        if spec.head_bias:
            rows.append(Param("head/bias", "vocab", f"{names.head}.bias", "vocab"))
    return tuple(rows)
