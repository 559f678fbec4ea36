"""A matrix product over any number of leading and contracted axes."""

from __future__ import annotations

import math

from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp

Array = jax.Array


FEW = 8  # rows that XLA on CPU multiplies one by one


@struct.dataclass
class Int8:
    """A matrix in eight bits.

    Attributes:
        values: int8 [..., out, in].
        scale: f32 [..., out], what one step of the output's values is worth.
    """

    values: Array
    scale: Array

    def product(self, x: Array) -> Array:
        """[n, in] -> [n, out] in the dtype of x.

        The values become floats inside the product, so that only bytes are read. XLA on
        CPU does that for a single row; for more it would first write all the floats.
        """

        def whole(x, values):
            return x @ values.astype(x.dtype).T

        def row_by_row(x, values):
            # Else a decode loop would convert the values once, before it starts.
            x, values = jax.lax.optimization_barrier((x, values))
            return jnp.concatenate([whole(row, values) for row in jnp.split(x, len(x))])

        few = row_by_row if len(x) <= FEW else whole
        y = jax.lax.platform_dependent(x, self.values, cpu=few, default=whole)
        return y * self.scale.astype(x.dtype)


class Linear(nn.Module):
    """[..., *inputs] -> [..., *outputs]. To run, its kernel may be `Int8`.

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
        leading = x.shape[: x.ndim - len(self.inputs)]
        y = self._product(x.astype(self.dtype).reshape(-1, math.prod(self.inputs)))
        y = y.reshape(*leading, *self.outputs)
        if self.use_bias:
            zeros = nn.initializers.zeros
            dtype = jnp.dtype(self.param_dtype)
            y = y + self.param("bias", zeros, self.outputs, dtype).astype(y.dtype)
        return y

    def _product(self, x: Array) -> Array:
        """[n, in] -> [n, out]."""
        if isinstance(stored := self.get_variable("params", "kernel"), Int8):
            return stored.product(x)
        fan_in, fan_out = math.prod(self.inputs), math.prod(self.outputs)
        init = nn.initializers.lecun_normal()

        def flat(key, shape, dtype):
            return init(key, (fan_in, fan_out), dtype).reshape(shape)

        shape = (*self.inputs, *self.outputs)
        kernel = self.param("kernel", flat, shape, jnp.dtype(self.param_dtype))
        return x @ kernel.astype(self.dtype).reshape(fan_in, fan_out)
