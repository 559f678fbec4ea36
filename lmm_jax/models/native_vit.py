"""The vision stack for images that keep their own size and shape.

Patches of an image fill the first of a fixed number of slots. Those that the connector
will merge follow each other; the blocks they form are in raster order. Positions are a
learned table, interpolated to the image, and rotary angles of row and column.

Letters: N images, P slots for patches, F frames, p pixels a side of a patch, E width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flax import linen as nn
import jax
import jax.numpy as jnp

from lmm_jax.depth.planner import Step
from lmm_jax.models import vit
from lmm_jax.models.specs import VisionSpec
from lmm_jax.nn import block
from lmm_jax.nn.linear import Linear
from lmm_jax.nn.params import Param
from lmm_jax.nn.remat import Remat
from lmm_jax.nn.stack import LayerStack
from lmm_jax.ops.resize import between_corners

Array = jax.Array


class NativeVisionTransformer(nn.Module):
    """Qwen3-VL's encoder (arXiv:2511.21631): full attention within each image."""

    spec: VisionSpec
    remat: Remat = "none"
    unroll: int = 1
    constrain: Callable[[Array], Array] = lambda x: x

    def setup(self):
        s, b = self.spec, self.spec.block
        pixels = (s.frames, s.patch, s.patch, 3)
        self.patch = Linear(pixels, (b.width,), s.patch_bias, b.dtype, b.param_dtype)
        init, dtype = nn.initializers.normal(0.02), jnp.dtype(b.param_dtype)
        table = (s.grid[0] * s.grid[1], b.width)
        self.positions = self.param("positions", init, table, dtype)
        self.stack = LayerStack(
            b, s.depth, True, self.remat, self.unroll, self.constrain
        )

    def __call__(
        self,
        images: Array,
        steps: Sequence[Step],
        grid: Array,
        taps: Sequence[int] = (),
    ) -> tuple[Array, dict[int, Array]]:
        """Features of each image.

        Args:
            images: uint8 [N, P, F, p, p, 3], normalised here; or float, already
                normalised. A single frame stands for all.
            steps: of the plan's vision stack.
            grid: int32 [N, 2], columns and rows of patches.
            taps: layers after which features are read too.

        Returns:
            [N, P, E], the residual stream after the last step, and after each tap.
        """
        x = vit.normalised(images, self.spec)
        x = jnp.broadcast_to(x, (*x.shape[:2], self.spec.frames, *x.shape[3:]))
        x = self.patch(x)
        places = coordinates(grid, x.shape[1], self.spec.merge)
        table = self.positions.reshape(*self.spec.grid, -1)
        x = x + between_corners(table, places, grid).astype(x.dtype)
        valid = jnp.arange(x.shape[1]) < grid.prod(axis=-1, keepdims=True)
        state = vit.entrance(x, valid=valid, coords=places)
        return vit.run(self.stack, state, steps, taps, grid)


def coordinates(grid: Array, slots: int, merge: int) -> Array:
    """Row and column of the patch in each slot: int32 [N, P, 2].

    Args:
        grid: int32 [N, 2], columns and rows, multiples of `merge`.
    """
    index = jnp.arange(slots)
    cell, inside = index // merge**2, index % merge**2
    columns = jnp.maximum(grid[:, :1] // merge, 1)
    row = cell // columns * merge + inside // merge
    column = cell % columns * merge + inside % merge
    return jnp.stack([row, column], axis=-1).astype(jnp.int32)


_BLOCK = {
    "attn_norm": "norm1",
    "q": "attn.q",
    "k": "attn.k",
    "v": "attn.v",
    "o": "attn.proj",
    "mlp_norm": "norm2",
    "up": "mlp.linear_fc1",
    "down": "mlp.linear_fc2",
}


def params(spec: VisionSpec) -> tuple[Param, ...]:
    """Rows in the Hugging Face naming; queries, keys and values apart."""
    blocks = block.params(spec.block, "blocks.{layer}.", _BLOCK)
    return (
        Param(
            "patch/kernel",
            "frame patch_h patch_w channel embed",
            "patch_embed.proj.weight",
            "embed channel frame patch_h patch_w",
        ),
        Param("patch/bias", "embed", "patch_embed.proj.bias", "embed"),
        Param("positions", "position embed", "pos_embed.weight", "position embed"),
        *(row.under("stack/", "") for row in blocks),
    )
