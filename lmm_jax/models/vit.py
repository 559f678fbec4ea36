"""The vision stack: patches, learned positions, layers, and the features in between.

Letters: N images (views), H W pixels, P patches, E width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lmm_jax.depth import Context, Fold, Layout, Role, Scan, TokenState, VisionFeatures
from lmm_jax.depth.planner import Step
from lmm_jax.models import s2
from lmm_jax.models.specs import VisionSpec
from lmm_jax.nn import block
from lmm_jax.nn.embed import PatchEmbed
from lmm_jax.nn.norm import LayerNorm
from lmm_jax.nn.params import Param
from lmm_jax.nn.remat import Remat
from lmm_jax.nn.stack import LayerStack

Array = jax.Array


class VisionTransformer(nn.Module):
    """CLIP-style encoder, run up to the layer whose features a connector reads."""

    spec: VisionSpec
    remat: Remat = "none"
    unroll: int = 1
    constrain: Callable[[Array], Array] = lambda x: x

    def setup(self):
        s, b = self.spec, self.spec.block
        self.patch = PatchEmbed(s.patch, b.width, s.patch_bias, b.dtype, b.param_dtype)
        init, dtype = nn.initializers.normal(0.02), jnp.dtype(b.param_dtype)
        tokens = s.patches + s.class_token
        if s.class_token:
            self.cls = self.param("cls", init, (b.width,), dtype)
        self.positions = self.param("positions", _sincos, (tokens, b.width), dtype)
        if s.pre_norm:
            self.pre_norm = LayerNorm(b.norm_eps)
        if s.post_norm:
            self.post_norm = LayerNorm(b.norm_eps)
        self.stack = LayerStack(
            b, s.depth, False, self.remat, self.unroll, self.constrain
        )

    def __call__(
        self,
        images: Array,
        steps: Sequence[Step | Fold],
        grid: Array | None = None,
        taps: Sequence[int] = (),
    ) -> tuple[Array, dict[int, Array]]:
        """Features of each view.

        Args:
            images: uint8 [N, H, W, 3], normalised here; or float, already normalised.
            steps: of the plan's vision stack.
            grid: int32 [N, 2], columns and rows of hi-res views of the image; read by
                what stacks them.
            taps: layers after which features are read too.

        Returns:
            [N, P, E], the residual stream after the last step, and after each tap,
            without [CLS]; of several scales [N, P, S * E], and no taps. After a `Fold`
            there are as many views as images.
        """
        images = normalised(images, self.spec)
        if self.spec.scales:
            found, _ = self._encoded(s2.tiles(images, self.spec), steps, grid, ())
            return s2.joined(found, self.spec), {}
        return self._encoded(images, steps, grid, taps)

    def tokens(self, images: Array, steps: Sequence[Step]) -> Array:
        """All tokens of each view after the last LayerNorm, [CLS] first: what an encoder
        reads that has no connector.

        Args:
            images, steps: as above; steps without a `Fold`.

        Returns:
            [N, 1 + P, E].
        """
        state = self._entered(normalised(images, self.spec))
        return self.post_norm(self.stack.run(state, steps, Context()).state.hidden)

    def _encoded(
        self,
        images: Array,
        steps: Sequence[Step | Fold],
        grid: Array | None,
        taps: Sequence[int],
    ) -> tuple[Array, dict[int, Array]]:
        state = self._entered(images)
        if self.spec.post_norm and self.is_initializing():
            self.post_norm(state.hidden)
        return run(self.stack, state, steps, taps, grid)

    def _entered(self, images: Array) -> TokenState:
        """Pixels as the tokens before the first layer."""
        x = self.patch(images)
        if self.spec.class_token:
            cls = jnp.broadcast_to(self.cls.astype(x.dtype), (len(x), 1, x.shape[-1]))
            x = jnp.concatenate([cls, x], axis=1)
        x = x + self.positions.astype(x.dtype)
        if self.spec.pre_norm:
            x = self.pre_norm(x)
        return entrance(x, cls=int(self.spec.class_token))


def normalised(images: Array, spec: VisionSpec) -> Array:
    """uint8 pixels [..., 3] as the encoder expects them; floats pass."""
    if images.dtype != jnp.uint8:
        return images
    mean, std = (np.asarray(x, np.float32) for x in (spec.mean, spec.std))
    return (images.astype(jnp.float32) / 255.0 - mean) / std


def entrance(
    x: Array, *, cls: int = 0, valid: Array | None = None, coords: Array | None = None
) -> TokenState:
    """The tokens [N, P, E] before the first layer, `cls` of them in front."""
    shape, tokens = x.shape[:2], x.shape[1]
    zero = jnp.zeros(shape, jnp.int32)
    return TokenState(
        hidden=x,
        positions=jnp.broadcast_to(jnp.arange(tokens), shape),
        valid=jnp.ones(shape, bool) if valid is None else valid,
        segment=zero,
        role=jnp.full(shape, Role.VISUAL, jnp.int8),
        turn=zero,
        size=jnp.ones(shape, jnp.float32),
        coords=coords,
        layout=Layout.of({"cls": cls, "visual": tokens - cls}),
    )


def run(
    stack: LayerStack,
    state: TokenState,
    steps: Sequence[Step | Fold],
    taps: Sequence[int],
    grid: Array | None,
) -> tuple[Array, dict[int, Array]]:
    """Visual rows after the last step, and after each layer in `taps`."""
    ctx, seen = Context(), {}
    for step in steps:
        if isinstance(step, Fold):
            state, ctx = _folded(state, step, grid)
            continue
        state = stack.run(state, (step,), ctx).state
        if isinstance(step, Scan) and step.stop - 1 in taps:
            seen[step.stop - 1] = state.hidden[:, state.layout.slice("visual")]
    return state.hidden[:, state.layout.slice("visual")], seen


def _folded(state: TokenState, fold: Fold, grid: Array) -> tuple[TokenState, Context]:
    """The views of whole images, and the rows that will be added to them."""

    def by_image(x: Array) -> Array:
        return x.reshape(-1, 1, fold.views, *x.shape[1:])

    state, grid = jax.tree.map(by_image, (state, grid))
    patches = state.hidden[..., state.layout.slice("visual"), :]
    vision = VisionFeatures(patches, grid[:, :, 0])
    rows = fold.edit.op(vision, lambda features: features)
    whole = jax.tree.map(lambda x: x[:, 0, 0], state)
    return whole, Context({fold.edit.name: rows})


def _sincos(key: Array, shape: tuple[int, int], dtype) -> Array:
    """Waves over rows and columns, 6 to 63 patches long; [CLS] stands at zero.

    Positions that start as noise of 0.02 are invisible beside the patches until they have
    grown, and a model from scratch learns nothing of places before.
    """
    del key  # nothing is random
    tokens, width = shape
    side, waves = math.isqrt(tokens), width // 4
    angles = np.arange(side)[:, None] * np.geomspace(1, 0.1, waves)
    line = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    table = np.zeros(shape, np.float32)
    grid = table[tokens - side**2 :]
    grid[:, : 2 * waves] = np.repeat(line, side, axis=0)
    grid[:, 2 * waves : 4 * waves] = np.tile(line, (side, 1))
    return jnp.asarray(table, dtype)


@dataclasses.dataclass(frozen=True)
class Names:
    """What checkpoints call the parts of a tower.

    Attributes:
        layer: prefix of one layer.
        block: our submodule of a block -> name below that prefix.
        patch, positions, cls, pre_norm, post_norm: of the others; of what is no module,
            the whole key.
    """

    layer: str
    block: Mapping[str, str]
    patch: str
    positions: str
    cls: str
    pre_norm: str
    post_norm: str


HUB = Names(
    "encoder.layers.{layer}.",
    {
        "attn_norm": "layer_norm1",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.out_proj",
        "mlp_norm": "layer_norm2",
        "up": "mlp.fc1",
        "down": "mlp.fc2",
    },
    patch="embeddings.patch_embedding",
    positions="embeddings.position_embedding.weight",
    cls="embeddings.class_embedding",
    pre_norm="pre_layrnorm",  # as it is spelt there
    post_norm="post_layernorm",
)


def params(spec: VisionSpec, names: Names = HUB) -> tuple[Param, ...]:
    """Rows of a CLIP-style vision tower, by default in the Hugging Face naming."""
    rows = [
        Param(
            "patch/kernel",
            "patch_h patch_w channel embed",
            f"{names.patch}.weight",
            "embed channel patch_h patch_w",
        ),
        Param("positions", "position embed", names.positions, "position embed"),
    ]
    if spec.patch_bias:
        rows.append(Param("patch/bias", "embed", f"{names.patch}.bias", "embed"))
    if spec.class_token:
        rows.append(Param("cls", "embed", names.cls, "embed"))
    if spec.pre_norm:
        rows += _norm("pre_norm", names.pre_norm)
    if spec.post_norm:
        rows += _norm("post_norm", names.post_norm)
    blocks = block.params(spec.block, names.layer, names.block)
    rows += [row.under("stack/", "") for row in blocks]
    return tuple(rows)


def _norm(path: str, key: str) -> list[Param]:
    leaves = (("scale", "weight"), ("bias", "bias"))
    return [
        Param(f"{path}/{our}", "norm", f"{key}.{their}", "norm")
        for our, their in leaves
    ]
