"""The projector between vision and language. Letters: E vision width, D language width."""

from __future__ import annotations

from flax import linen as nn
import jax

from lmm_jax.nn.linear import Linear
from lmm_jax.nn.params import Param

Array = jax.Array


class Projector(nn.Module):
    """Linear, exact GELU, linear, token by token (LLaVA-1.5's "mlp2x_gelu")."""

    inputs: int
    width: int
    dtype: str
    param_dtype: str

    def setup(self):
        kinds = (True, self.dtype, self.param_dtype)
        self.first = Linear((self.inputs,), (self.width,), *kinds)
        self.second = Linear((self.width,), (self.width,), *kinds)

    def __call__(self, features: Array) -> Array:
        """[..., E] -> [..., D]."""
        return self.second(nn.gelu(self.first(features), approximate=False))


PARAMS = (
    Param("first/kernel", "vision_embed embed", "0.weight", "embed vision_embed"),
    Param("first/bias", "norm", "0.bias", "norm"),
    # Square, so its input keeps a name of its own: an axis is sharded once.
    Param("second/kernel", "mlp embed", "2.weight", "embed mlp"),
    Param("second/bias", "norm", "2.bias", "norm"),
)
