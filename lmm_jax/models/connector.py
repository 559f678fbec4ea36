"""The connector between vision and language.

Letters: P patches, V visual tokens, E vision width, D language width.
"""

from __future__ import annotations

from flax import linen as nn
import jax

from lmm_jax.depth import Edit, Inject
from lmm_jax.models.specs import LMMSpec
from lmm_jax.nn.linear import Linear
from lmm_jax.nn.merger import MERGER, Merger, MergerSpec, TappedLayers
from lmm_jax.nn.params import Param

Array = jax.Array

TAPS = "taps"  # name of the edit that injects features of inner vision layers


def build(spec: LMMSpec) -> nn.Module:
    """The connector that a model's sizes ask for, [..., P, E] -> [..., V, D]."""
    b = spec.language.block
    if spec.vision.merge > 1:
        return Merger(_merger(spec, joint_norm=False))
    return Projector(spec.vision.merged, b.width, b.dtype, b.param_dtype)


def weights(spec: LMMSpec) -> int:
    """Entries of its two matrices."""
    if spec.vision.merge > 1:
        return _merger(spec, joint_norm=False).weights
    width = spec.language.block.width
    return spec.vision.merged * width + width * width


def tap_edits(spec: LMMSpec) -> tuple[Edit, ...]:
    """The injection of inner vision layers, where a model has it."""
    taps, depth = spec.vision.taps, spec.language.depth
    if not taps:
        return ()
    layers = tuple(range(1, len(taps) + 1))[:depth]
    projects = len(layers) * spec.vision.patches // spec.vision.merge**2
    op = TappedLayers(_merger(spec, joint_norm=True), taps, len(layers))
    return (Inject(TAPS, layers, op, projects, taps=taps),)


def _merger(spec: LMMSpec, *, joint_norm: bool) -> MergerSpec:
    v, b = spec.vision, spec.language.block
    return MergerSpec(
        patches=v.merge**2,
        width=v.block.width,
        hidden=v.merged,
        outputs=b.width,
        joint_norm=joint_norm,
        norm_eps=v.block.norm_eps,
        dtype=b.dtype,
        param_dtype=b.param_dtype,
    )


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


def tap_params(spec: LMMSpec, prefix: str) -> tuple[Param, ...]:
    """Rows of the mergers of taps; `{layer}` in `prefix` runs over them."""
    if not spec.vision.taps:
        return ()
    rows = TappedLayers.params()
    return tuple(row.under(f"strategy_{TAPS}/", prefix) for row in rows)


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
