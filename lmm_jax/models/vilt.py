"""ViLT: words and patches of pixels through one stack, without a vision tower.

Kim et al., "ViLT: Vision-and-Language Transformer Without Convolution or Region
Supervision", ICML 2021, arXiv:2102.03334.

Letters: B batch, I images of an example, N images of a batch, H W pixels, P patches, T text
tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
from typing import ClassVar, Literal

import einops
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lmm_jax.depth import Context, Edit, Geometry, Plan, TokenState
from lmm_jax.models import heads
from lmm_jax.models.heads import Head, HeadSpec
from lmm_jax.models.specs import VisionSpec, vit_block
from lmm_jax.models.vit import normalised
from lmm_jax.nn import block
from lmm_jax.nn.block import BlockSpec
from lmm_jax.nn.embed import PatchEmbed, TextEmbed
from lmm_jax.nn.linear import Linear
from lmm_jax.nn.norm import LayerNorm
from lmm_jax.nn.params import Param
from lmm_jax.nn.stack import LayerStack, StackOutput
from lmm_jax.ops.resize import between_corners

Array = jax.Array
Batch = Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class ViltSpec:
    """Static sizes.

    Attributes:
        vision: a tower without layers: patches, and `image`, for which the table of their
            positions was made.
        block: of the stack.
        depth: its layers.
        vocab, places, segments: rows of the tables of the text; texts are no longer than
            its places.
        types: rows that say what a token is of: 0 the text, i the i-th image.
        text_eps: of the text's LayerNorm; `block.norm_eps` is that of the others.
        head: what is predicted; None leaves it out.
        own: edits that belong to the model; see `LMMSpec`.
        remat, unroll: see `LayerStack`.
        kind: model type on the hub whose keys its checkpoints have.
    """

    vision: VisionSpec
    block: BlockSpec
    depth: int
    vocab: int
    places: int
    segments: int = 2
    types: int = 2
    text_eps: float = 1e-12
    head: HeadSpec | None = None
    own: tuple[Callable[[Geometry], tuple[Edit, ...]], ...] = ()
    remat: Literal["none", "full", "dots"] = "none"
    unroll: int = 1
    kind: str = "vilt"
    resample: ClassVar[str] = "bilinear"  # how PuMer makes its images square

    def replaced(
        self, *, dtype: str, param_dtype: str, remat: str, unroll: int
    ) -> ViltSpec:
        """The same sizes with other numerics and execution."""
        kinds = dict(dtype=dtype, param_dtype=param_dtype)
        block = dataclasses.replace(self.block, **kinds)
        vision = dataclasses.replace(self.vision, block=block)
        parts = dict(vision=vision, block=block)
        return dataclasses.replace(self, **parts, remat=remat, unroll=unroll)


class Vilt(nn.Module):
    """One stack over text and image, along a plan, and one vector for both.

    Several images of an example are read one by one, each with the text.

    Batch: `images` uint8 [B, I, H, W, 3], normalised here, or float, already normalised;
    `tokens` int32 and `valid` bool [B, T]. Where images do not fill their canvas, `grid`
    int32 [B, I, 2] has the columns and rows of patches that they have.
    """

    spec: ViltSpec
    plan: Plan
    constrain: Callable[[Array, str], Array] = lambda x, names: x

    def setup(self):
        s, b, v = self.spec, self.spec.block, self.spec.vision
        kinds = (b.dtype, b.param_dtype)
        tables = (s.vocab, s.places, s.segments, b.width)
        self.text = TextEmbed(*tables, s.text_eps, *kinds)
        self.patch = PatchEmbed(v.patch, b.width, v.patch_bias, *kinds)
        init, dtype = nn.initializers.normal(0.02), jnp.dtype(b.param_dtype)
        # With the leading axes that they are published with.
        self.cls = self.param("cls", init, (1, 1, b.width), dtype)
        positions = (1, 1 + v.patches, b.width)
        self.positions = self.param("positions", init, positions, dtype)
        self.types = self.param("types", init, (s.types, b.width), dtype)
        self.stack = LayerStack(
            b, s.depth, True, s.remat, s.unroll, self._constrain_tokens
        )
        self.norm = LayerNorm(b.norm_eps)
        self.pooler = Linear((b.width,), (b.width,), True, *kinds)
        if s.head:
            self.head = Head(s.head, b.width, *kinds)

    def __call__(self, batch: Batch, rng: Array | None = None) -> StackOutput:
        """Text and image after the last layer, B * I rows."""
        steps, mode = self.plan.language, self.plan.mode
        return self.stack.run(self.enter(batch), steps, Context(rng=rng), mode=mode)

    def score(
        self, batch: Batch, rng: Array | None = None
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """What the head predicts of each example, and what the cuts report."""
        out = self(batch, rng)
        return self.head(self.pooled(out.state)), out.aux

    def pooled(self, state: TokenState) -> Array:
        """The text's first token, which no cut moves, as the vector of all: [B * I, D]."""
        first = state.hidden[:, state.layout.slice("prefix").start]
        return jnp.tanh(self.pooler(self.norm(first)))

    def enter(self, batch: Batch) -> TokenState:
        """What enters the first layer."""
        images, grid = batch["images"], batch.get("grid")
        count, types = images.shape[1], self.types.astype(self.spec.block.dtype)
        flat = einops.rearrange(images, "b i h w c -> (b i) h w c")
        flat_grid = None if grid is None else grid.reshape(-1, 2)
        visual, shown = self._visual(flat, flat_grid)
        which = jnp.tile(types[1 : 1 + count], (len(images), 1))
        text = self.text(batch["tokens"], jnp.arange(batch["tokens"].shape[1]))
        text, valid = (
            jnp.repeat(x, count, axis=0) for x in (text + types[0], batch["valid"])
        )
        state = heads.entrance(text, visual + which[:, None], valid, shown)
        return state.replace(hidden=self._constrain_tokens(state.hidden))

    def _visual(self, images: Array, grid: Array | None) -> tuple[Array, Array | None]:
        """[CLS] and the patches of each canvas, [N, 1 + P, D], and which of them are of
        the image, bool [N, 1 + P]."""
        v = self.spec.vision
        x = self.patch(normalised(images, v))
        rows, columns = (side // v.patch for side in images.shape[1:3])
        places = np.stack(np.indices((rows, columns)), -1).reshape(1, -1, 2)
        first, table = self.positions[:, :1], self.positions[0, 1:]
        table, shown = table.reshape(*v.grid, -1), None
        if grid is None:
            at = between_corners(table, places, jnp.array([[columns, rows]]))
        else:
            inside = (places < grid[:, None, ::-1]).all(axis=-1)
            at = between_corners(
                table, jnp.broadcast_to(places, (*inside.shape, 2)), grid
            )
            at = jnp.where(inside[..., None], at, 0)
            shown = jnp.pad(inside, ((0, 0), (1, 0)), constant_values=True)
        cls = (self.cls + first).astype(x.dtype)
        cls = jnp.broadcast_to(cls, (len(x), 1, x.shape[-1]))
        return jnp.concatenate([cls, x + at.astype(x.dtype)], axis=1), shown

    def _constrain_tokens(self, x: Array) -> Array:
        return self.constrain(x, "batch row act_embed")


def geometry(
    spec: ViltSpec, *, text: int, canvas: tuple[int, int] | None = None
) -> Geometry:
    """Static sizes of a model and an example, for strategies and plans.

    Args:
        text: slots for tokens.
        canvas: rows and columns of patches of the images, if not the table's.

    Raises:
        ValueError: more slots than the text has places.
    """
    v, b = spec.vision, spec.block
    if text > spec.places:
        raise ValueError(
            f"{text} text slots: this ViLT has places for {spec.places} tokens; use no "
            "more, and cut longer texts."
        )
    grid = canvas or v.grid
    return Geometry(
        vision=b.geometry(0),
        language=b.geometry(spec.depth),
        vision_layers=0,
        class_token=False,
        patches=grid[0] * grid[1],
        fixed_grid=grid,
        patch=3 * v.patch**2,
        connector=0,
        images=1,
        crops=0,
        prefix=text,
        suffix=0,
        vocab=spec.vocab,
        image_class=True,
        rows=spec.head.images if spec.head else 1,
        head=b.width**2 + (spec.head.weights(b.width) if spec.head else 0),
        dtype=b.dtype,
        param_dtype=b.param_dtype,
    )


@dataclasses.dataclass(frozen=True)
class Names:
    """What checkpoints call the parts of ViLT.

    Attributes:
        layer: prefix of one layer.
        block: our submodule of a block -> name below that prefix.
        text, patch, cls, positions, norm: of the others; cls and positions whole keys.
        types: the key of the table that says what a token is of.
        classifier: of the head; see `heads.params`.
    """

    layer: str
    block: Mapping[str, str]
    text: str
    patch: str
    cls: str
    positions: str
    types: str
    norm: str
    classifier: str


HUB = Names(
    "vilt.encoder.layer.{layer}.",
    {
        "attn_norm": "layernorm_before",
        "q": "attention.attention.query",
        "k": "attention.attention.key",
        "v": "attention.attention.value",
        "o": "attention.output.dense",
        "mlp_norm": "layernorm_after",
        "up": "intermediate.dense",
        "down": "output.dense",
    },
    text="vilt.embeddings.text_embeddings.",
    patch="vilt.embeddings.patch_embeddings.projection",
    cls="vilt.embeddings.cls_token",
    positions="vilt.embeddings.position_embeddings",
    types="vilt.embeddings.token_type_embeddings.weight",
    norm="vilt.layernorm",
    classifier="classifier",
)


def params(spec: ViltSpec, names: Names = HUB) -> tuple[Param, ...]:
    """Rows, by default in the Hugging Face naming."""
    kernel = "patch_h patch_w channel embed"
    patch = "embed channel patch_h patch_w"
    blocks = block.params(spec.block, names.layer, names.block)
    return (
        *(row.under("text/", names.text) for row in TextEmbed.params()),
        Param("patch/kernel", kernel, f"{names.patch}.weight", patch),
        Param("patch/bias", "embed", f"{names.patch}.bias", "embed"),
        Param("cls", "one token embed", names.cls, "one token embed"),
        Param("positions", "one place embed", names.positions, "one place embed"),
        Param("types", "type embed", names.types, "type embed"),
        *(row.under("stack/", "") for row in blocks),
        Param("norm/scale", "norm", f"{names.norm}.weight", "norm"),
        Param("norm/bias", "norm", f"{names.norm}.bias", "norm"),
        # Square, so its input keeps a name of its own: an axis is sharded once.
        Param("pooler/kernel", "mlp embed", "vilt.pooler.dense.weight", "embed mlp"),
        Param("pooler/bias", "norm", "vilt.pooler.dense.bias", "norm"),
        *(row.under("head/", "") for row in heads.params(spec.head, names.classifier)),
    )


def patches(image: int, patch: int, block: BlockSpec) -> VisionSpec:
    """ViLT's vision: no more than a matrix and a table."""
    half = (0.5, 0.5, 0.5)
    return VisionSpec(
        image,
        patch,
        block,
        depth=0,
        run=0,
        pre_norm=False,
        patch_bias=True,
        post_norm=False,
        mean=half,
        std=half,
        kind="vilt",
    )


def b_32(task: str | None = None) -> ViltSpec:
    """ViLT-B/32 as its own code and PuMer's compute it, with the head of a task."""
    b = vit_block(768, 12, 3072, "gelu", norm_eps=1e-6)
    found = heads.head(task, b.width) if task else None
    types = 1 + (found.images if found else 1)
    vision = patches(384, 32, b)
    return ViltSpec(vision, b, 12, 30_522, 40, types=types, head=found)
