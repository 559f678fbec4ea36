"""The connector between vision and language.

Letters: P patches, V visual tokens, E vision width, M joint width of merged patches,
D language width, S layers whose features are read.
"""

from __future__ import annotations

import dataclasses

import einops
from flax import linen as nn
import jax
import jax.numpy as jnp

from lmm_jax.depth import Edit, Inject, Project, VisionFeatures
from lmm_jax.models.specs import LMMSpec
from lmm_jax.nn.linear import Linear
from lmm_jax.nn.norm import LayerNorm
from lmm_jax.nn.params import Param

Array = jax.Array

TAPS = "taps"  # name of the edit that injects features of inner vision layers


def build(spec: LMMSpec) -> nn.Module:
    """The connector that a model's sizes ask for, [..., P, E] -> [..., V, D]."""
    b = spec.language.block
    if spec.vision.merge > 1:
        return Merger(spec, joint_norm=False)
    return Projector(spec.vision.merged, b.width, b.dtype, b.param_dtype)


def weights(spec: LMMSpec) -> int:
    """Entries of its two matrices."""
    inputs, outputs = spec.vision.merged, spec.language.block.width
    hidden = inputs if spec.vision.merge > 1 else outputs
    return inputs * hidden + hidden * outputs


def tap_edits(spec: LMMSpec) -> tuple[Edit, ...]:
    """The injection of inner vision layers, where a model has it."""
    taps, depth = len(spec.vision.taps), spec.language.depth
    if not taps:
        return ()
    layers = tuple(range(1, taps + 1))[:depth]
    tokens = spec.vision.patches // spec.vision.merge**2
    op = TappedLayers(spec, len(layers))
    return (Inject(TAPS, layers, op, projects=len(layers) * tokens),)


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


class Merger(nn.Module):
    """Neighbouring patches side by side, then linear, exact GELU, linear (Qwen2-VL).

    Attributes:
        joint_norm: whether the LayerNorm before it is over merged patches or over each.
    """

    spec: LMMSpec
    joint_norm: bool

    def setup(self):
        v, b = self.spec.vision, self.spec.language.block
        kinds = (True, b.dtype, b.param_dtype)
        self.norm = LayerNorm(v.block.norm_eps)
        self.first = Linear((v.merged,), (v.merged,), *kinds)
        self.second = Linear((v.merged,), (b.width,), *kinds)

    def __call__(self, features: Array) -> Array:
        """[..., P, E] -> [..., V, D]; patches of one token follow each other."""
        x = features if self.joint_norm else self.norm(features)
        count = self.spec.vision.merge**2
        x = einops.rearrange(x, "... (v n) e -> ... v (n e)", n=count)
        x = self.norm(x) if self.joint_norm else x
        return self.second(nn.gelu(self.first(x), approximate=False))


class TappedLayers(nn.Module):
    """The op of an injection: features of inner vision layers, a merger for each.

    Bai et al., "Qwen3-VL Technical Report", arXiv:2511.21631, section on DeepStack.

    Attributes:
        rows: how many are injected; what the language stack has no layer for is not.
    """

    spec: LMMSpec
    rows: int

    @nn.compact
    def __call__(self, vision: VisionFeatures, project: Project) -> Array:
        """[S, B, I * V, D], in the order of the layers."""
        taps, merger = self.spec.vision.taps, Merger(self.spec, True, parent=None)
        first = vision.taps[0]

        def init(rng):
            keys = jax.random.split(rng, len(taps))
            return jax.vmap(lambda key: merger.init(key, first)["params"])(keys)

        mergers = self.param("mergers", init)
        # Published mergers are in the order of the list, features in that of execution.
        order = sorted(range(len(taps)), key=lambda j: taps[j])
        rows = [
            merger.apply({"params": jax.tree.map(lambda p, j=j: p[j], mergers)}, tap)
            for j, tap in list(zip(order, vision.taps))[: self.rows]
        ]
        return einops.rearrange(jnp.stack(rows), "s b i 1 v d -> s b (i v) d")


def tap_params(spec: LMMSpec, prefix: str) -> tuple[Param, ...]:
    """Rows of the mergers of taps; `{layer}` in `prefix` runs over them."""
    if not spec.vision.taps:
        return ()
    path = f"strategy_{TAPS}/mergers/"
    return tuple(
        dataclasses.replace(row, axes=f"layers {row.axes}").under(path, prefix)
        for row in MERGER
    )


def params(spec: LMMSpec) -> tuple[Param, ...]:
    """Rows of `build`."""
    return MERGER if spec.vision.merge > 1 else PROJECTOR


PROJECTOR = (
    Param("first/kernel", "vision_embed embed", "0.weight", "embed vision_embed"),
    Param("first/bias", "norm", "0.bias", "norm"),
    # Square, so its input keeps a name of its own: an axis is sharded once.
    Param("second/kernel", "mlp embed", "2.weight", "embed mlp"),
    Param("second/bias", "norm", "2.bias", "norm"),
)
MERGER = (
    Param("norm/scale", "norm", "norm.weight", "norm"),
    Param("norm/bias", "norm", "norm.bias", "norm"),
    Param("first/kernel", "vision_embed mlp", "linear_fc1.weight", "mlp vision_embed"),
    Param("first/bias", "norm", "linear_fc1.bias", "norm"),
    Param("second/kernel", "mlp embed", "linear_fc2.weight", "embed mlp"),
    Param("second/bias", "norm", "linear_fc2.bias", "norm"),
)
