"""Normalisation over the width, in float32. Letters: T tokens, D width."""

from __future__ import annotations

from flax import linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array


class RMSNorm(nn.Module):
    """x / rms(x) * scale; rounded to the compute dtype before the scale, as Llama does."""

    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return y.astype(x.dtype) * scale.astype(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / std * scale + bias."""

    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, width, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, width, jnp.float32)
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * scale + bias).astype(x.dtype)
