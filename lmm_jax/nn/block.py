"""A transformer block in two halves, so that tokens can be cut in between.

Letters: B batch, T tokens, S tokens of another sequence, D width, N query heads, K key
heads, H head width, F hidden width of the MLP.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Literal

from flax import linen as nn
import jax

from lmm_jax.depth import Keys, StackGeometry
from lmm_jax.nn.attention import Sight, attention
from lmm_jax.nn.linear import Linear
from lmm_jax.nn.lora import Lora, LoraLinear
from lmm_jax.nn.norm import LayerNorm, RMSNorm
from lmm_jax.nn.params import Param
from lmm_jax.nn.rope import RopeSpec, Rotation, rotate

Array = jax.Array

ACTIVATIONS = {
    "silu": nn.silu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
}
# How published keys end where it is not "weight"; the adapters' as in PEFT.
_ENDS = {"bias": "bias", "lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """Static sizes and kinds of one block; every layer of a stack shares one.

    Attributes:
        width, heads, kv_heads, head_dim, hidden: D, N, K, H, F.
        norm: "rms" or "layer".
        gated: down(act(gate(x)) * up(x)) instead of down(act(up(x))).
        bias: biases on queries, keys and values ("qkv"), on all projections of
            attention and MLP ("all"), or nowhere ("none").
        qk_norm: an RMSNorm over each head of queries and keys, before the rotation.
        window: a query sees this many positions at most, its own included.
        rope: rotary embedding; None where positions are learned.
        causal: no key later than the query is visible.
        parallel: attention and MLP read the same normalised input (Phi-2).
        post_norm: norms come after the residual sums and not before what they feed (BERT).
        cross: between its halves, a second attention that reads another sequence.
        soft_mask: DynamicViT's softmax (arXiv:2106.02034, section 3.3): a hidden token
            sees itself, and all keys get a little.
        lora: adapters beside some of the projections.
        dtype: compute dtype; parameters are float32 unless `param_dtype` says otherwise.
    """

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    activation: str = "silu"
    gated: bool = True
    bias: Literal["none", "qkv", "all"] = "none"
    qk_norm: bool = False
    window: int | None = None
    rope: RopeSpec | None = RopeSpec()  # noqa: RUF009 (frozen)
    causal: bool = True
    parallel: bool = False
    post_norm: bool = False
    cross: bool = False
    soft_mask: bool = False
    lora: Lora | None = None
    dtype: str = "float32"
    param_dtype: str = "float32"

    def geometry(self, depth: int) -> StackGeometry:
        """Sizes of a stack of `depth` such blocks, for plans and costs."""
        return StackGeometry(
            depth=depth,
            width=self.width,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            hidden=self.hidden,
            gated=self.gated,
            causal=self.causal,
            parallel=self.parallel,
        )


def params(spec: BlockSpec, layer: str, names: Mapping[str, str]) -> tuple[Param, ...]:
    """Rows of a stack of blocks.

    Args:
        spec: of every block.
        layer: published prefix of one layer, with `{layer}` in it.
        names: our submodule -> published name below the prefix.
    """
    rows = []

    def add(name: str, leaf: str, axes: str, layout: str, layers=None) -> None:
        key = f"{layer}{names[name]}.{_ENDS.get(leaf, 'weight')}"
        path, axes = f"layers/{name}/{leaf}", f"layers {axes}"
        rows.append(Param(path, axes, key, layout, layers))

    def norm(name: str) -> None:
        for leaf in ("scale", "bias") if spec.norm == "layer" else ("scale",):
            add(name, leaf, "norm", "norm")

    def linear(name: str, into: str, out: str, biased: bool) -> None:
        one = {axes: f"({axes})" if " " in axes else axes for axes in (into, out)}
        add(name, "kernel", f"{into} {out}", f"{one[out]} {one[into]}")
        if biased:
            add(name, "bias", out, one[out])
        if spec.lora and name in spec.lora.names:
            layers = spec.lora.layers
            add(name, "lora_a", f"{into} lora", f"lora {one[into]}", layers)
            add(name, "lora_b", f"lora {out}", f"{one[out]} lora", layers)

    norm("attn_norm")
    if not spec.parallel:
        norm("mlp_norm")
    for name, heads in (("q", "heads"), ("k", "kv_heads"), ("v", "kv_heads")):
        linear(name, "embed", f"{heads} head_dim", spec.bias != "none")
    linear("o", "heads head_dim", "embed", spec.bias == "all")
    if spec.cross:
        norm("cross_norm")
        linear("cross_q", "embed", "heads head_dim", spec.bias != "none")
        linear("cross_k", "embed", "kv_heads head_dim", spec.bias != "none")
        linear("cross_v", "embed", "kv_heads head_dim", spec.bias != "none")
        linear("cross_o", "heads head_dim", "embed", spec.bias == "all")
    for name in ("q_norm", "k_norm") if spec.qk_norm else ():
        add(name, "scale", "head_dim", "head_dim")
    for name in ("gate", "up") if spec.gated else ("up",):
        linear(name, "embed", "mlp", spec.bias == "all")
    linear("down", "mlp", "embed", spec.bias == "all")
    return tuple(rows)


class Block(nn.Module):
    """x -> x + attention(norm(x)) -> x + mlp(norm(x)); where norms come after,
    x -> norm(x + attention(x)) -> norm(x + mlp(x))."""

    spec: BlockSpec

    def setup(self):
        s = self.spec
        norm = RMSNorm if s.norm == "rms" else LayerNorm
        self.attn_norm = norm(s.norm_eps)
        if not s.parallel:
            self.mlp_norm = norm(s.norm_eps)
        qkv, biased = s.bias != "none", s.bias == "all"
        width, heads = (s.width,), (s.heads, s.head_dim)
        kv_heads = (s.kv_heads, s.head_dim)
        self.q = self._linear("q", width, heads, qkv)
        self.k = self._linear("k", width, kv_heads, qkv)
        self.v = self._linear("v", width, kv_heads, qkv)
        self.o = self._linear("o", heads, width, biased)
        if s.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(s.norm_eps), RMSNorm(s.norm_eps)
        if s.cross:
            self.cross_norm = norm(s.norm_eps)
            self.cross_q = self._linear("cross_q", width, heads, qkv)
            self.cross_k = self._linear("cross_k", width, kv_heads, qkv)
            self.cross_v = self._linear("cross_v", width, kv_heads, qkv)
            self.cross_o = self._linear("cross_o", heads, width, biased)
        if s.gated:
            self.gate = self._linear("gate", width, (s.hidden,), biased)
        self.up = self._linear("up", width, (s.hidden,), biased)
        self.down = self._linear("down", (s.hidden,), width, biased)

    def __call__(
        self,
        x: Array,
        rotation: Rotation | None,
        sight: Sight,
        past: tuple[tuple[Keys, Sight], ...] = (),
        keys: Keys | None = None,
    ) -> tuple[Array, Keys]:
        """Both halves: [B, T, D] and the keys of x, [B, T, K, H]."""
        x, keys, _ = self.attend(x, rotation, sight, past, keys)
        return self.feed(x), keys

    def attend(
        self, x, rotation, sight, past=(), keys=None
    ) -> tuple[Array, Keys, Array]:
        """First half: attention over `past` (read, never written) and x itself.

        Args:
            x: [B, T, D].
            rotation: angles of x; None without rotary embedding.
            sight: which tokens of x see which.
            past: caches and who sees them, in any order.
            keys: [B, S, K, H] of a sequence that x is a part of, in place of its own;
                `sight` then says who sees those.

        Returns:
            The residual stream [B, T, D], the keys of x, and its rotated queries
            [B, T, N, H] for whoever observes this layer.
        """
        with jax.named_scope("attention"):
            y = self._before(self.attn_norm, x)
            q = self.q(y)
            if self.spec.qk_norm:
                q = self.q_norm(q)
            if rotation is not None:
                q = rotate(q, rotation)
            keys = self._keys(y, rotation) if keys is None else keys
            out = self.o(attention(q, (*past, (keys, sight))))
            if self.spec.parallel:
                out = out + self._mlp(y)
            return self._after(self.attn_norm, x + out), keys, q

    def read(self, x: Array, other: Array, sight: Sight) -> tuple[Array, Keys, Array]:
        """Between the halves: attention to another sequence.

        Args:
            x: [B, T, D], after the first half.
            other: [B, S, D].
            sight: which tokens of `other` those of x see.

        Returns:
            [B, T, D], the keys of `other` and the queries of x, as `attend`.
        """
        with jax.named_scope("cross_attention"):
            q = self.cross_q(self._before(self.cross_norm, x))
            keys = Keys(self.cross_k(other), self.cross_v(other))
            out = self.cross_o(attention(q, ((keys, sight),)))
            return self._after(self.cross_norm, x + out), keys, q

    def keys(self, x: Array, rotation: Rotation | None) -> Keys:
        """The keys of x alone, [B, T, K, H]."""
        with jax.named_scope("attention"):
            return self._keys(self._before(self.attn_norm, x), rotation)

    def feed(self, x: Array) -> Array:
        """Second half, token by token; nothing is left to do in a parallel block."""
        if self.spec.parallel:
            return x
        with jax.named_scope("mlp"):
            out = self._mlp(self._before(self.mlp_norm, x))
            return self._after(self.mlp_norm, x + out)

    def _before(self, norm: nn.Module, x: Array) -> Array:
        return x if self.spec.post_norm else norm(x)

    def _after(self, norm: nn.Module, x: Array) -> Array:
        return norm(x) if self.spec.post_norm else x

    def _keys(self, y: Array, rotation: Rotation | None) -> Keys:
        k, v = self.k(y), self.v(y)
        if self.spec.qk_norm:
            k = self.k_norm(k)
        return Keys(k if rotation is None else rotate(k, rotation), v)

    def _mlp(self, y: Array) -> Array:
        act = ACTIVATIONS[self.spec.activation]
        if self.spec.gated:
            return self.down(act(self.gate(y)) * self.up(y))
        return self.down(act(self.up(y)))

    def _linear(self, name: str, inputs, outputs, use_bias: bool) -> Linear:
        s = self.spec
        arguments = (inputs, outputs, use_bias, s.dtype, s.param_dtype)
        if s.lora and name in s.lora.names:
            return LoraLinear(*arguments, s.lora)
        return Linear(*arguments)
