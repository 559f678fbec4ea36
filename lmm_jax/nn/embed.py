"""Tokens and patches become vectors.

Letters: B batch, T tokens, P patches, D width, W vocabulary.
"""

from __future__ import annotations

import einops
from flax import linen as nn
import jax
import jax.numpy as jnp

from lmm_jax.nn.linear import Int8
from lmm_jax.nn.norm import LayerNorm
from lmm_jax.nn.params import Param

Array = jax.Array


class TokenEmbed(nn.Module):
    """A table [W, D], read by row; also the output head where the two are tied, and
    then perhaps `Int8`."""

    vocab: int
    width: int
    dtype: str
    param_dtype: str

    def setup(self):
        if isinstance(stored := self.get_variable("params", "table"), Int8):
            self.table = stored
            return
        init = nn.initializers.normal(self.width**-0.5)
        shape = (self.vocab, self.width)
        self.table = self.param("table", init, shape, jnp.dtype(self.param_dtype))

    def __call__(self, tokens: Array) -> Array:
        """[B, T] -> [B, T, D]."""

        def read(table):
            return jnp.take(table, tokens, axis=0, mode="clip").astype(self.dtype)

        if isinstance(self.table, Int8):
            return read(self.table.values) * read(self.table.scale)[..., None]
        return read(self.table)

    def attend(self, hidden: Array) -> Array:
        """[..., D] -> logits [..., W]."""
        flat = hidden.reshape(-1, self.width)
        if isinstance(self.table, Int8):
            flat = self.table.product(flat)
        else:
            flat = flat @ self.table.T.astype(self.dtype)
        return flat.reshape(*hidden.shape[:-1], self.vocab)


class TextEmbed(nn.Module):
    """BERT's: a token, its place and one segment for all, added up and normalised.

    Attributes:
        vocab, places, segments: rows of the three tables.
    """

    vocab: int
    places: int
    segments: int
    width: int
    norm_eps: float
    dtype: str
    param_dtype: str

    def setup(self):
        def table(name: str, rows: int) -> Array:
            init, dtype = nn.initializers.normal(0.02), jnp.dtype(self.param_dtype)
            return self.param(name, init, (rows, self.width), dtype)

        self.words = table("words", self.vocab)
        self.positions = table("positions", self.places)
        self.segment = table("segments", self.segments)
        self.norm = LayerNorm(self.norm_eps)

    def __call__(self, tokens: Array, places: Array) -> Array:
        """[B, T] and the place of each, [B, T] or [T] -> [B, T, D]."""
        found = jnp.take(self.words, tokens, axis=0, mode="clip")
        found = found + jnp.take(self.positions, places, axis=0, mode="clip")
        return self.norm((found + self.segment[0]).astype(self.dtype))

    @staticmethod
    def params() -> tuple[Param, ...]:
        """Rows in the naming of BERT and of all that follow it."""
        tables = (("words", "vocab", "word"), ("positions", "place", "position"))
        return (
            *(
                Param(
                    path, f"{axis} embed", f"{key}_embeddings.weight", f"{axis} embed"
                )
                for path, axis, key in (*tables, ("segments", "segment", "token_type"))
            ),
            Param("norm/scale", "norm", "LayerNorm.weight", "norm"),
            Param("norm/bias", "norm", "LayerNorm.bias", "norm"),
        )


class PatchEmbed(nn.Module):
    """Non-overlapping patches through one matrix (a convolution with equal stride).

    Pixels beyond the last whole patch are ignored, as a valid convolution does.
    """

    patch: int
    width: int
    use_bias: bool
    dtype: str
    param_dtype: str

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """[B, H, W, 3] -> [B, P, D], row-major."""
        p = self.patch
        init = nn.initializers.lecun_normal(in_axis=(0, 1, 2), out_axis=3)
        dtype = jnp.dtype(self.param_dtype)
        kernel = self.param("kernel", init, (p, p, 3, self.width), dtype)
        rows, columns = images.shape[1] // p, images.shape[2] // p
        patches = einops.rearrange(
            images[:, : rows * p, : columns * p],
            "b (h p) (w q) c -> b (h w) (p q c)",
            p=p,
            q=p,
        )
        flat = patches.astype(self.dtype).reshape(-1, 3 * p * p)
        out = flat @ kernel.reshape(-1, self.width).astype(self.dtype)
        out = out.reshape(*patches.shape[:2], self.width)
        if self.use_bias:
            zeros = nn.initializers.zeros
            out = out + self.param("bias", zeros, (self.width,), dtype).astype(
                out.dtype
            )
        return out
