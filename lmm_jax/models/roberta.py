"""RoBERTa, a text tower (Liu et al., arXiv:1907.11692).

Letters: B batch, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses

from flax import linen as nn
import jax
import jax.numpy as jnp

from lmm_jax.depth import Context, Layout, Role, Scan, TokenState
from lmm_jax.nn import block
from lmm_jax.nn.block import BlockSpec
from lmm_jax.nn.embed import TextEmbed
from lmm_jax.nn.params import Param
from lmm_jax.nn.remat import Remat
from lmm_jax.nn.stack import LayerStack

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class TextSpec:
    """A text tower.

    Attributes:
        vocab: rows of the table of tokens.
        places: rows of the table of positions, the first `pad` + 1 of no token.
        block: its block (bidirectional, norms after the sums).
        depth: layers.
        segments: rows of the table of segments, of which the first is used.
        pad: token of empty slots.
    """

    vocab: int
    places: int
    block: BlockSpec
    depth: int
    segments: int = 1
    pad: int = 1

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return self.places - self.pad - 1


class Roberta(nn.Module):
    """All layers, without the pooler."""

    spec: TextSpec
    remat: Remat = "none"
    unroll: int = 1
    constrain: Callable[[Array], Array] = lambda x: x

    def setup(self):
        s, b = self.spec, self.spec.block
        sizes = (s.vocab, s.places, s.segments, b.width)
        self.embed = TextEmbed(*sizes, b.norm_eps, b.dtype, b.param_dtype)
        self.stack = LayerStack(
            b, s.depth, True, self.remat, self.unroll, self.constrain
        )

    def __call__(self, tokens: Array, valid: Array) -> Array:
        """What each token means in its text.

        Args:
            tokens: int32 [B, T]; empty slots hold `pad`, which alone decides on places.
            valid: bool [B, T].

        Returns:
            [B, T, D]; also of empty slots, which see the text and are not seen.
        """
        words = tokens != self.spec.pad
        places = jnp.where(words, jnp.cumsum(words, axis=1), 0) + self.spec.pad
        zero = jnp.zeros_like(tokens)
        state = TokenState(
            hidden=self.embed(tokens, places),
            positions=places,
            valid=valid,
            segment=zero,
            role=jnp.full_like(tokens, Role.USER, jnp.int8),
            turn=zero,
            size=jnp.ones_like(tokens, jnp.float32),
            layout=Layout.of({"prefix": tokens.shape[1]}),
        )
        steps = (Scan(0, self.spec.depth),)
        return self.stack.run(state, steps, Context()).state.hidden


BLOCK = {
    "attn_norm": "attention.output.LayerNorm",
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
    "mlp_norm": "output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
}


def params(spec: TextSpec) -> tuple[Param, ...]:
    """Rows in the Hugging Face naming."""
    blocks = block.params(spec.block, "encoder.layer.{layer}.", BLOCK)
    return (
        *(row.under("embed/", "embeddings.") for row in TextEmbed.params()),
        *(row.under("stack/", "") for row in blocks),
    )
