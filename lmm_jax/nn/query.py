"""Learned tokens that read the question, and with it the image, once.

Zhang et al., "FlashSloth: Lightning Multimodal Large Language Models via Embedded Visual
Compression", arXiv:2412.04317 ("embedded query module"), in the order of its code.

Letters: B batch, T tokens, Q query tokens of an example, K query tokens of a question,
N patches of all images, D language width, E vision width, A bottleneck width.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses

import einops
from flax import linen as nn
import jax
import jax.numpy as jnp

from lmm_jax.depth import Context, Keys, Memory, Role, TokenState
from lmm_jax.nn.attention import Sight, attention, sight
from lmm_jax.nn.linear import Linear
from lmm_jax.nn.norm import LayerNorm
from lmm_jax.nn.params import Param

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class QuerySpec:
    """Static sizes of embedded queries.

    Attributes:
        count: K.
        most: questions of an example; the queries of further ones do not read.
        width: D.
        vision: E.
        patches: N.
        bottleneck: A; with E, a multiple of `heads`.
        heads: of both attentions.
        anchor: token of the language model whose embedding is added to all queries; -1
            for none.
        norm_eps: of the LayerNorms.
        dtype, param_dtype: of computation and of parameters.
    """

    count: int
    most: int
    width: int
    vision: int
    patches: int
    bottleneck: int
    heads: int
    anchor: int = -1
    norm_eps: float = 1e-5
    dtype: str = "float32"
    param_dtype: str = "float32"


class CrossAttention(nn.Module):
    """Heads side by side; what they find passes no projection afterwards.

    Attributes:
        heads: number of heads.
        keys: width of queries and keys.
        values: width of values.
    """

    heads: int
    keys: int
    values: int
    dtype: str
    param_dtype: str

    def setup(self):
        kinds = (True, self.dtype, self.param_dtype)
        self.q = Linear((self.keys,), (self.keys,), *kinds)
        self.k = Linear((self.keys,), (self.keys,), *kinds)
        self.v = Linear((self.values,), (self.values,), *kinds)

    def __call__(self, queries: Array, keys: Array, values: Array, seen: Sight):
        """[B, Q, keys], [B, S, keys], [B, S, values] -> [B, Q, values]."""
        split = "b s (n h) -> b s n h"
        q, k, v = (
            einops.rearrange(x, split, n=self.heads)
            for x in (self.q(queries), self.k(keys), self.v(values))
        )
        found = attention(q, ((Keys(k, v), seen),))
        return einops.rearrange(found, "b q n h -> b q (n h)")


class EmbeddedQuery(nn.Module):
    """The op of a `Query`.

    Queries attend to their question, what they find to the patches, and what that finds
    is added to them. An empty question counts as one token of zeros. Nothing is added
    without an image.
    """

    spec: QuerySpec

    def setup(self):
        s = self.spec
        kinds = (s.dtype, s.param_dtype)

        def spread(key, shape, dtype):
            return jax.random.uniform(key, shape, dtype, -1, 1) * s.width**-0.5

        dtype = jnp.dtype(s.param_dtype)
        self.tokens = self.param("tokens", spread, (s.count, s.width), dtype)
        self.down_text = Linear((s.width,), (s.bottleneck,), True, *kinds)
        self.down_image = Linear((s.vision,), (s.bottleneck,), True, *kinds)
        self.query_norm = LayerNorm(s.norm_eps)
        self.text_norm = LayerNorm(s.norm_eps)
        self.image_norm = LayerNorm(s.norm_eps)
        self.text = CrossAttention(s.heads, s.bottleneck, s.bottleneck, *kinds)
        self.image = CrossAttention(s.heads, s.bottleneck, s.vision, *kinds)
        self.up = Linear((s.vision,), (s.width,), True, *kinds)

    def enter(
        self, words: Array, tokens: Array, role: Array, embed: Callable[[Array], Array]
    ) -> Array:
        """See `QueryOp.enter`."""
        learned = self.tokens.astype(words.dtype)
        if self.spec.anchor >= 0:
            learned = learned + embed(jnp.asarray([self.spec.anchor]))
        ours = jnp.take(learned, jnp.clip(tokens, 0, self.spec.count - 1), axis=0)
        return jnp.where((role == Role.QUERY)[..., None], ours, words)

    def __call__(self, state: TokenState, ctx: Context) -> TokenState:
        """See `QueryOp.__call__`."""
        asking = (state.role == Role.QUERY) & state.valid
        size = min(self.spec.count * self.spec.most, asking.shape[1])
        rows = jnp.argsort(~asking, axis=1, stable=True)[:, :size]  # [B, Q]

        def take(x: Array) -> Array:
            index = rows[..., None] if x.ndim == 3 else rows
            return jnp.take_along_axis(x, index, axis=1)

        queries, memory = jax.tree.map(take, state.place), ctx.memory
        question = (
            (state.valid & (state.role == Role.QUESTION))[:, None]
            & (state.segment[:, None] == queries.segment[..., None])
            & (state.turn[:, None] == take(state.turn)[..., None])
        )
        image = sight(queries, memory.place, causal=True)
        before = take(state.hidden)
        found = self.read(before, state.hidden, memory, Sight(question), image)
        shown = take(asking) & image.visible.any(-1)
        after = before + jnp.where(shown[..., None], found, 0)
        put = jax.vmap(lambda old, at, new: old.at[at].set(new))
        return state.replace(hidden=put(state.hidden, rows, after))

    def read(
        self, queries: Array, text: Array, memory: Memory, question: Sight, image: Sight
    ) -> Array:
        """What is added to queries [B, Q, D]; `text` is [B, T, D], and the sights say
        which of its tokens and which patches each query sees."""
        asked = self.query_norm(self.down_text(queries))
        words = self.text_norm(self.down_text(text))
        meant = self.text(asked, words, words, question)
        nothing = self.text_norm(self.down_text(jnp.zeros_like(queries[:1, :1])))
        empty = ~question.visible.any(-1, keepdims=True)
        return self.look(jnp.where(empty, self.text.v(nothing), meant), memory, image)

    def look(self, meant: Array, memory: Memory, image: Sight) -> Array:
        """What queries find with what they mean, [B, Q, A] -> [B, Q, D]."""
        patches = self.image_norm(self.down_image(memory.hidden))
        return self.up(self.image(meant, patches, memory.hidden, image))

    def flops(self, text: int) -> float:
        """See `QueryOp.flops`; of one question, all of the text."""
        s = self.spec
        square = s.bottleneck**2
        down, up = s.width * s.bottleneck, s.vision * s.width
        per_query = down + 2 * square + up
        per_word = down + 2 * square
        per_patch = s.vision * s.bottleneck + square + s.vision**2
        pairs = 2 * text * s.bottleneck + s.patches * (s.bottleneck + s.vision)
        weights = s.count * per_query + text * per_word + s.patches * per_patch
        return 2.0 * (weights + s.count * pairs)

    @staticmethod
    def params() -> tuple[Param, ...]:
        """Rows in the naming of the published checkpoints."""
        rows = [
            Param(
                "tokens", "query act_embed", "learnable_tokens.token", "query act_embed"
            )
        ]
        linears = (
            ("down_text", "embed mlp", "down_projector_learnable_text"),
            ("down_image", "vision_embed mlp", "down_projector_image"),
            ("text/q", "vision_embed mlp", "layers.0.t2q_attn.q_proj"),
            ("text/k", "vision_embed mlp", "layers.0.t2q_attn.k_proj"),
            ("text/v", "vision_embed mlp", "layers.0.t2q_attn.v_proj"),
            ("image/q", "vision_embed mlp", "layers.0.i2q_attn.q_proj"),
            ("image/k", "vision_embed mlp", "layers.0.i2q_attn.k_proj"),
            ("image/v", "vision_embed mlp", "layers.0.i2q_attn.v_proj"),
            ("up", "mlp embed", "up_projector"),
        )
        for path, axes, key in linears:
            inputs, outputs = axes.split()
            key, layout = f"lqformer.{key}", f"{outputs} {inputs}"
            rows.append(Param(f"{path}/kernel", axes, f"{key}.weight", layout))
            rows.append(Param(f"{path}/bias", "norm", f"{key}.bias", "norm"))
        norms = (
            ("query_norm", "ln_q"),
            ("text_norm", "ln_text"),
            ("image_norm", "ln_kv"),
        )
        for path, key in norms:
            key = f"lqformer.layers.0.{key}"
            rows.append(Param(f"{path}/scale", "norm", f"{key}.weight", "norm"))
            rows.append(Param(f"{path}/bias", "norm", f"{key}.bias", "norm"))
        return tuple(rows)
