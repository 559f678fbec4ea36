"""METER: a vision tower, a text tower, and layers in which the two streams meet.

Dou et al., "An Empirical Study of Training End-to-End Vision-and-Language Transformers",
CVPR 2022, arXiv:2111.02387, with CLIP-ViT-B/16 and RoBERTa-base.

Letters: B batch, I images, H W pixels, T text tokens, V visual tokens of an image ([CLS]
and patches), D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
from typing import ClassVar, Literal

import einops
from flax import linen as nn
import jax
import jax.numpy as jnp

from lmm_jax.depth import Context, Edit, Geometry, Plan, TokenState
from lmm_jax.models import heads, roberta, vit
from lmm_jax.models.heads import Head, HeadSpec
from lmm_jax.models.roberta import Roberta, TextSpec
from lmm_jax.models.specs import VisionSpec, vit_block
from lmm_jax.models.vit import VisionTransformer
from lmm_jax.nn import coattention
from lmm_jax.nn.block import BlockSpec
from lmm_jax.nn.coattention import CoAttentionStack, Order
from lmm_jax.nn.linear import Linear
from lmm_jax.nn.params import Param
from lmm_jax.nn.stack import StackOutput

Array = jax.Array
Batch = Mapping[str, Array]
SPANS = coattention.TEXT, coattention.IMAGE


@dataclasses.dataclass(frozen=True)
class MeterSpec:
    """Static sizes.

    Attributes:
        vision, text: the towers.
        block: of the co-attention layers, both streams; it reads another sequence.
        depth: co-attention layers.
        order: see `CoAttentionStack`.
        types: rows that say what a token is of: 0 the text, i the i-th image.
        head: what is predicted; None leaves it out.
        own: edits that belong to the model; see `LMMSpec`.
        remat, unroll: see `LayerStack`; they apply to all stacks.
        kind: model type on the hub whose keys its checkpoints have.
    """

    vision: VisionSpec
    text: TextSpec
    block: BlockSpec
    depth: int
    order: Order = "parallel"
    types: int = 2
    head: HeadSpec | None = None
    own: tuple[Callable[[Geometry], tuple[Edit, ...]], ...] = ()
    remat: Literal["none", "full", "dots"] = "none"
    unroll: int = 1
    kind: str = "meter_original"
    resample: ClassVar[str] = "bicubic"  # of images that become square

    def replaced(
        self, *, dtype: str, param_dtype: str, remat: str, unroll: int
    ) -> MeterSpec:
        """The same sizes with other numerics and execution."""

        def other(block: BlockSpec) -> BlockSpec:
            return dataclasses.replace(block, dtype=dtype, param_dtype=param_dtype)

        vision = dataclasses.replace(self.vision, block=other(self.vision.block))
        text = dataclasses.replace(self.text, block=other(self.text.block))
        parts = dict(vision=vision, text=text, block=other(self.block))
        return dataclasses.replace(self, **parts, remat=remat, unroll=unroll)


class Meter(nn.Module):
    """Towers, co-attention along a plan, and one vector for each image and its text.

    Text is the span "prefix", the image "visual". Several images are read one by one, each
    with the text.

    Batch: `images` uint8 or float [B, I, H, W, 3] (see `VisionTransformer`), `tokens` int32
    and `valid` bool [B, T].
    """

    spec: MeterSpec
    plan: Plan
    constrain: Callable[[Array, str], Array] = lambda x, names: x

    def setup(self):
        s, b = self.spec, self.spec.block
        run = (s.remat, s.unroll, self._constrain_tokens)
        self.vision = VisionTransformer(s.vision, *run)
        self.text = Roberta(s.text, *run)
        kinds = (True, b.dtype, b.param_dtype)
        self.image_in = Linear((s.vision.block.width,), (b.width,), *kinds)
        self.text_in = Linear((s.text.block.width,), (b.width,), *kinds)
        init, dtype = nn.initializers.normal(0.02), jnp.dtype(b.param_dtype)
        self.types = self.param("types", init, (s.types, b.width), dtype)
        self.stack = CoAttentionStack(b, s.depth, s.order, *run)
        self.image_pooler = Linear((b.width,), (b.width,), *kinds)
        self.text_pooler = Linear((b.width,), (b.width,), *kinds)
        if s.head:
            self.head = Head(s.head, 2 * b.width, b.dtype, b.param_dtype)

    def __call__(self, batch: Batch, rng: Array | None = None) -> StackOutput:
        """Both streams after the last layer, B * I rows."""
        state = self.enter(batch)
        plan = self.plan
        return self.stack.run(state, plan.language, Context(rng=rng), mode=plan.mode)

    def score(
        self, batch: Batch, rng: Array | None = None
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """What the head predicts of each example, and what the cuts report."""
        out = self(batch, rng)
        return self.head(self.pooled(out.state)), out.aux

    def pooled(self, state: TokenState) -> Array:
        """The first tokens of text and image, side by side: [B * I, 2 D].

        After cuts the image's first token need not be its [CLS]; see `strategies.pumer`.
        """
        text, image = (
            state.hidden[:, state.layout.slice(span).start] for span in SPANS
        )
        both = self.text_pooler(text), self.image_pooler(image)
        return jnp.tanh(jnp.concatenate(both, axis=-1))

    def enter(self, batch: Batch) -> TokenState:
        """What enters the first co-attention layer."""
        images = batch["images"]
        count = images.shape[1]
        with jax.named_scope("vision"):
            flat = einops.rearrange(images, "b i h w c -> (b i) h w c")
            image = self.image_in(self.vision.tokens(flat, self.plan.vision))
        with jax.named_scope("text"):
            text = self.text_in(self.text(batch["tokens"], batch["valid"]))
        types = self.types.astype(text.dtype)
        image = image + jnp.tile(types[1 : 1 + count], (len(images), 1))[:, None]
        text, valid = (
            jnp.repeat(x, count, axis=0) for x in (text + types[0], batch["valid"])
        )
        state = heads.entrance(text, image, valid)
        return state.replace(hidden=self._constrain_tokens(state.hidden))

    def _constrain_tokens(self, x: Array) -> Array:
        return self.constrain(x, "batch row act_embed")


def geometry(spec: MeterSpec, *, text: int) -> Geometry:
    """Static sizes of a model, one image and `text` slots, for strategies and plans.

    Raises:
        ValueError: more slots than the text tower has places for.
    """
    v, b = spec.vision, spec.block
    if text > spec.text.longest:
        raise ValueError(
            f"{text} text slots: the text tower has places for {spec.text.longest}; use "
            "fewer."
        )
    return Geometry(
        vision=v.block.geometry(v.depth),
        language=dataclasses.replace(b.geometry(spec.depth), cross=spec.order),
        vision_layers=v.run,
        class_token=v.class_token,
        image_class=v.class_token,
        patches=v.patches,
        fixed_grid=v.grid,
        patch=3 * v.patch**2,
        connector=v.block.width * b.width,
        text=spec.text.block.geometry(spec.text.depth),
        rows=spec.head.images if spec.head else 1,
        head=2 * b.width**2 + (spec.head.weights(2 * b.width) if spec.head else 0),
        images=1,
        crops=0,
        prefix=text,
        suffix=0,
        vocab=spec.text.vocab,
        dtype=b.dtype,
        param_dtype=b.param_dtype,
    )


# In CLIP's own code queries, keys and values are one tensor; these names are of its parts.
CLIP = vit.Names(
    "transformer.resblocks.{layer}.",
    {
        "attn_norm": "ln_1",
        "q": "attn.in_proj.q",
        "k": "attn.in_proj.k",
        "v": "attn.in_proj.v",
        "o": "attn.out_proj",
        "mlp_norm": "ln_2",
        "up": "mlp.c_fc",
        "down": "mlp.c_proj",
    },
    patch="conv1",
    positions="positional_embedding",
    cls="class_embedding",
    pre_norm="ln_pre",
    post_norm="ln_post",
)
LAYERS = "cross_modal_{stream}_layers.{layer}."
BLOCK = {
    **roberta.BLOCK,
    "cross_norm": "crossattention.output.LayerNorm",
    "cross_q": "crossattention.self.query",
    "cross_k": "crossattention.self.key",
    "cross_v": "crossattention.self.value",
    "cross_o": "crossattention.output.dense",
}


def params(spec: MeterSpec) -> tuple[Param, ...]:
    """Rows in METER's own naming."""
    stack = coattention.params(spec.block, LAYERS, BLOCK)
    types = "token_type_embeddings.weight"
    entails = spec.head is not None and spec.head.task == "snli_ve"
    classifier = "snli_classifier" if entails else ""
    return (
        *(
            r.under("vision/", "vit_model.visual.")
            for r in vit.params(spec.vision, CLIP)
        ),
        *(r.under("text/", "text_transformer.") for r in roberta.params(spec.text)),
        *_square("text_in", "cross_modal_text_transform"),
        *_square("image_in", "cross_modal_image_transform"),
        Param("types", "type embed", types, "type embed"),
        *(r.under("stack/", "") for r in stack),
        *_square("text_pooler", "cross_modal_text_pooler.dense"),
        *_square("image_pooler", "cross_modal_image_pooler.dense"),
        *(row.under("head/", "") for row in heads.params(spec.head, classifier)),
    )


def _square(path: str, key: str) -> tuple[Param, Param]:
    """A matrix of the width by the width; its input has a name of its own, since an axis
    is sharded once."""
    kernel = Param(f"{path}/kernel", "mlp embed", f"{key}.weight", "embed mlp")
    return kernel, Param(f"{path}/bias", "norm", f"{key}.bias", "norm")


def co_block(
    width: int, heads: int, hidden: int, *, soft_mask: bool = False
) -> BlockSpec:
    """Of the co-attention layers: BERT's, which read another sequence."""
    block = vit_block(width, heads, hidden, "gelu", norm_eps=1e-12)
    kinds = dict(post_norm=True, cross=True, soft_mask=soft_mask)
    return dataclasses.replace(block, **kinds)


ROBERTA_BASE = TextSpec(
    50_265,
    514,
    dataclasses.replace(vit_block(768, 12, 3072, "gelu"), post_norm=True),
    12,
)
# CLIP-ViT-B/16 without its last layer.
CLIP_B_16 = VisionSpec(
    384, 16, vit_block(768, 12, 3072, "quick_gelu"), depth=11, run=11
)


def b_16(task: str = "") -> MeterSpec:
    """METER with the head of a task, or without one.

    Raises:
        ValueError: no such task.
    """
    head = heads.head(task, 768) if task else None
    types = 1 + (head.images if head else 1)
    block = co_block(768, 12, 3072)
    return MeterSpec(CLIP_B_16, ROBERTA_BASE, block, 6, types=types, head=head)
