"""Neighbouring patches merged into one token, and inner vision layers read that way.

Letters: B batch, I images, C views, P patches, N patches of a token, V visual tokens,
E vision width, D language width, S layers whose features are read.
"""

from __future__ import annotations

import dataclasses
import math

import einops
from flax import linen as nn
import jax
import jax.numpy as jnp

from lmm_jax.depth import Project, VisionFeatures
from lmm_jax.nn.linear import Linear
from lmm_jax.nn.norm import LayerNorm
from lmm_jax.nn.params import Param
from lmm_jax.ops.spatial import cell_order

Array = jax.Array


MERGER = (
    Param("norm/scale", "norm", "norm.weight", "norm"),
    Param("norm/bias", "norm", "norm.bias", "norm"),
    Param("first/kernel", "vision_embed mlp", "linear_fc1.weight", "mlp vision_embed"),
    Param("first/bias", "norm", "linear_fc1.bias", "norm"),
    Param("second/kernel", "mlp embed", "linear_fc2.weight", "embed mlp"),
    Param("second/bias", "norm", "linear_fc2.bias", "norm"),
)


@dataclasses.dataclass(frozen=True)
class MergerSpec:
    """Static sizes of a merger.

    Attributes:
        patches: N.
        width: E.
        hidden: width between its two products.
        outputs: D.
        joint_norm: whether the LayerNorm is over merged patches, or over each of them.
        norm_eps: of the LayerNorm.
        dtype, param_dtype: of computation and of parameters.
    """

    patches: int
    width: int
    hidden: int
    outputs: int
    joint_norm: bool = False
    norm_eps: float = 1e-6
    dtype: str = "float32"
    param_dtype: str = "float32"

    @property
    def merged(self) -> int:
        """Joint width of the patches of a token."""
        return self.patches * self.width

    @property
    def weights(self) -> int:
        """Entries of its two matrices."""
        return self.merged * self.hidden + self.hidden * self.outputs

    @property
    def side(self) -> int:
        """Patches a side of a token."""
        return math.isqrt(self.patches)


class Merger(nn.Module):
    """LayerNorm, patches side by side, linear, exact GELU, linear (Qwen2-VL,
    arXiv:2409.12191)."""

    spec: MergerSpec

    def setup(self):
        s = self.spec
        kinds = (True, s.dtype, s.param_dtype)
        self.norm = LayerNorm(s.norm_eps)
        self.first = Linear((s.merged,), (s.hidden,), *kinds)
        self.second = Linear((s.hidden,), (s.outputs,), *kinds)

    def __call__(self, features: Array) -> Array:
        """[..., P, E] -> [..., V, D]; patches of one token follow each other."""
        joint = self.spec.joint_norm
        x = features if joint else self.norm(features)
        x = einops.rearrange(x, "... (v n) e -> ... v (n e)", n=self.spec.patches)
        x = self.norm(x) if joint else x
        return self.second(nn.gelu(self.first(x), approximate=False))


class TappedLayers(nn.Module):
    """The op of an injection: features of inner vision layers, a merger for each.

    Bai et al., "Qwen3-VL Technical Report", arXiv:2511.21631, section on DeepStack.

    Attributes:
        spec: of each merger.
        taps: layers after which features are read, in the order of the mergers.
        rows: how many are injected, from the first layer on; what the language stack has
            no layer for is not.
        grid: rows and columns of patches; None where those of a token follow each other.
    """

    spec: MergerSpec
    taps: tuple[int, ...]
    rows: int
    grid: tuple[int, int] | None = None

    @nn.compact
    def __call__(self, vision: VisionFeatures, project: Project) -> Array:
        """[S, B, I * V, D], in the order of the layers."""
        merger = Merger(self.spec, parent=None)

        def of(layer: int) -> Array:
            return cell_order(vision.taps[layer][:, :, 0], self.grid, self.spec.side)

        def init(rng):
            keys = jax.random.split(rng, len(self.taps))
            first = of(self.taps[0])
            return jax.vmap(lambda key: merger.init(key, first)["params"])(keys)

        mergers = self.param("mergers", init)
        rows = []
        for layer in sorted(self.taps)[: self.rows]:
            j = self.taps.index(layer)
            own = jax.tree.map(lambda p, j=j: p[j], mergers)
            rows.append(merger.apply({"params": own}, of(layer)))
        return einops.rearrange(jnp.stack(rows), "s b i v d -> s b (i v) d")

    @staticmethod
    def params() -> tuple[Param, ...]:
        """Rows of the mergers."""
        layered = (dataclasses.replace(r, axes=f"layers {r.axes}") for r in MERGER)
        return tuple(row.under("mergers/", "") for row in layered)
