"""A matrix product over any number of leading and contracted axes."""

from __future__ import annotations

import math

from flax import linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array


class Linear(nn.Module):
    """[..., *inputs] -> [..., *outputs].

    Computed as one product of two matrices. The weight gradient of a batched product
    contracts over two axes, for which XLA on CPU has no fast path (2-3 x slower);
    elsewhere the reshapes are free.

    Attributes:
        inputs, outputs: sizes of the contracted and of the new axes.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    use_bias: bool
    dtype: str
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (*self.inputs, *self.outputs)
        fan_in, fan_out = math.prod(self.inputs), math.prod(self.outputs)
        init = nn.initializers.lecun_normal()

        def flat(key, shape, dtype):
            return init(key, (fan_in, fan_out), dtype).reshape(shape)

        dtype = jnp.dtype(self.param_dtype)
        kernel = self.param("kernel", flat, shape, dtype).astype(self.dtype)
        leading = x.shape[: x.ndim - len(self.inputs)]
        y = x.astype(self.dtype).reshape(-1, fan_in) @ kernel.reshape(fan_in, fan_out)
        y = y.reshape(*leading, *self.outputs)
        if self.use_bias:
            zeros = nn.initializers.zeros
            y = y + self.param("bias", zeros, self.outputs, dtype).astype(y.dtype)
        return y
