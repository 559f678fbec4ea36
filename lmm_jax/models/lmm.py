"""A LLaVA-shaped large multimodal model that runs a depth plan.

Letters: B batch, I images, C views, H W pixels, P patches, E vision width, V visual
tokens per image, T text tokens, D language width, W vocabulary, S rows of a buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import einops
from flax import linen as nn
import jax
import jax.numpy as jnp

from lmm_jax.depth import (
    Context,
    Edit,
    Geometry,
    Layout,
    Memory,
    Observation,
    Place,
    Plan,
    Role,
    TokenState,
    VisionFeatures,
)
from lmm_jax.depth.reduce import reduce_span
from lmm_jax.models import connector, decoder, native_vit, tokens, vit
from lmm_jax.models.native_vit import NativeVisionTransformer
from lmm_jax.models.specs import LMMSpec
from lmm_jax.models.vit import VisionTransformer
from lmm_jax.nn.cache import Cache, empty_tail
from lmm_jax.nn.kernels import Kernel
from lmm_jax.nn.params import Param
from lmm_jax.nn.stack import StackOutput, Watch

Array = jax.Array
Batch = Mapping[str, Array]


class LMM(nn.Module):
    """Vision encoder, projector and language model, run along a plan.

    The batch contract is that of `lmm_jax.data.placement`. Methods are pure functions of
    (parameters, batch); `constrain(x, "batch tokens act_embed")` pins shardings, `kernel`
    computes the attention of the language model where it can.
    """

    spec: LMMSpec
    plan: Plan
    constrain: Callable[[Array, str], Array] = lambda x, names: x
    kernel: Kernel | None = None

    def setup(self):
        s = self.spec
        tower = NativeVisionTransformer if s.vision.native else VisionTransformer
        self.vision = tower(s.vision, s.remat, s.unroll, self._constrain_views)
        self.connector = connector.build(s)
        self.language = decoder.Decoder(
            s.language, s.remat, s.unroll, self._constrain_tokens, self.kernel
        )
        # Ops that learn become submodules, so parameters follow the edit's name.
        self.strategy = {
            e.name: e.op
            for e in self.plan.edits
            if isinstance(getattr(e, "op", None), nn.Module)
        }

    def __call__(
        self,
        batch: Batch,
        rng: Array | None = None,
        *,
        collect: bool = False,
        chunk: int = 0,
        watch: Watch | None = None,
    ) -> StackOutput:
        """Runs all layers: the tokens alive at the end, caches and what is watched."""
        state, ctx = self._enter(batch, rng)
        return self.language.stack.run(
            state,
            self.plan.language,
            ctx,
            ops=self.strategy,
            mode=self.plan.mode,
            collect=collect,
            chunk=chunk,
            watch=watch,
        )

    def score(
        self, batch: Batch, rng: Array | None = None
    ) -> tuple[Array, dict[str, Array]]:
        """Logits that predict each text token of the batch, and what the cuts report.

        Returns:
            [B, T, W]; row t is read from the token just before t in the sequence, which
            may be a visual one. Rows without a predecessor are meaningless.
        """
        out = self(batch, rng)
        return self.predict(out.state, batch), out.aux

    def predict(self, state: TokenState, batch: Batch) -> Array:
        """Logits [B, T, W] that predict each text token, from the last layer's state."""
        with jax.named_scope("head"):
            rows = tokens.predecessors(state, batch["positions"], batch["segment"])
            hidden = jnp.take_along_axis(state.hidden, rows[..., None], axis=1)
            logits = self.language.logits(hidden)
        return self.constrain(logits, "batch tokens vocab")

    def prefill(
        self, batch: Batch, *, slots: int, chunk: int = 0
    ) -> tuple[Array, Cache]:
        """Reads a prompt: logits [B, W] of the first new token, and the cache.

        Args:
            batch: prompts; see `lmm_jax.data.pipeline`.
            slots: capacity for decoded tokens.
            chunk: tokens that a language layer reads at a time; 0 is all.
        """
        out = self(batch, collect=True, chunk=chunk)
        state, s = out.state, self.spec.language
        order = jnp.where(state.valid, state.positions, -1)
        last = jnp.argmax(order, axis=1)
        hidden = jnp.take_along_axis(state.hidden, last[:, None, None], axis=1)
        tail = jax.tree.map(
            # Zeros follow no operand: unpinned, every device would hold all rows.
            lambda x: self.constrain(x, "layers batch slots kv_heads head_dim"),
            empty_tail(s.block, s.depth, len(last), slots),
        )
        start = jnp.max(jnp.where(batch["valid"], batch["positions"], -1), axis=1) + 1
        cache = Cache(out.runs, tail, start.astype(jnp.int32), jnp.zeros((), jnp.int32))
        if s.axes:
            coords = jnp.where(state.valid[..., None], state.coords, -1)
            cache = cache.replace(shift=jnp.max(coords, axis=(1, 2)) + 1 - cache.start)
        return self.language.logits(hidden[:, 0]), cache

    def decode(self, tokens: Array, cache: Cache) -> tuple[Array, Cache]:
        """Reads one more token int32 [B] per row: logits [B, W] of the next."""
        hidden = self.language.embed(tokens[:, None])
        hidden, cache = self.language.stack.decode(hidden, cache, self.plan.language)
        return self.language.logits(hidden[:, 0]), cache

    def logits(self, hidden: Array) -> Array:
        """[..., D] of the last layer to logits [..., W]."""
        return self.language.logits(hidden)

    def features(self, batch: Batch) -> VisionFeatures:
        """Vision features of every view of every image that the plan does not stack."""
        images, grid = batch["images"], batch["grid"]
        count, slots, views = images.shape[:3]
        with jax.named_scope("vision"):
            flat = images.reshape(-1, *images.shape[3:])
            flat_grid = jnp.repeat(grid.reshape(-1, 2), views, axis=0)
            found = self.vision(flat, self.plan.vision, flat_grid, self.plan.taps)
        hidden, taps = jax.tree.map(
            lambda x: x.reshape(count, slots, -1, *x.shape[1:]), found
        )
        sizes, fine = self.plan.geometry, None
        if sizes.fine:
            hidden, fine = jnp.split(hidden, [1 + sizes.crops], axis=2)
            each = *hidden.shape[:3], sizes.fine**2, *hidden.shape[3:]
            fine = fine.reshape(each)
        return VisionFeatures(hidden, grid, taps, batch.get("visual_rows"), fine)

    def _enter(self, batch: Batch, rng: Array | None) -> tuple[TokenState, Context]:
        """Assembles the sequence: text and visual spans in storage order."""
        if not self.plan.geometry.images:
            nothing = jnp.zeros(
                (len(batch["tokens"]), 0, self.spec.language.block.width)
            )
            return self._assemble(batch, nothing, None), Context(rng=rng)
        vision = self.features(batch)
        with jax.named_scope("connector"):
            visual = self._connect(vision)
            aligned = {
                e.name: self._op(e)(vision, self.connector) for e in self.plan.injects
            }
            tokens.check_aligned(aligned, visual)
            ctx = Context(aligned, rng, self._memory(vision, batch))
            visual, gate, ctx = self._compress(visual, batch, ctx)
        state = self._assemble(batch, visual, gate)
        if state.hidden.shape[1] < self.plan.entrance.length:  # mask mode
            state, ctx = tokens.padded_visual(state, ctx, self.plan.entrance)
        hidden = self.constrain(state.hidden, "batch tokens act_embed")
        return state.replace(hidden=hidden), ctx

    def _memory(self, vision: VisionFeatures, batch: Batch) -> Memory | None:
        """The features that queries read; an image is there once its last token is."""
        if not self.plan.queries:
            return None
        b, i, c, p, _ = vision.hidden.shape
        names = ("visual_positions", "visual_valid", "visual_segment")
        positions, shown, segment = (batch[name].reshape(b, i, -1) for name in names)
        last = jnp.where(shown, positions, -1).max(axis=-1)
        patch = jnp.arange(p) < (
            batch["grid"].prod(axis=-1)[..., None, None]
            if self.spec.vision.native
            else p
        )
        valid = (batch["views"][:, :, :c] & shown.any(-1, keepdims=True))[..., None]

        def flat(x: Array) -> Array:
            return jnp.broadcast_to(x, (b, i, c, p)).reshape(b, -1)

        place = Place(
            flat(last[..., None, None]),
            flat(valid & patch),
            flat(segment[..., :1, None]),
        )
        hidden = einops.rearrange(vision.hidden, "b i c p e -> b (i c p) e")
        return Memory(hidden, place)

    def _connect(self, vision: VisionFeatures) -> Array:
        """[B, I, V, D]; without a `Connect` edit, the projected view of the whole."""
        connect = self.plan.connect
        if connect is None:
            return self.connector(vision.hidden[:, :, 0])
        visual = self._op(connect)(vision, self.connector)
        if visual.shape[2] != connect.to:
            raise ValueError(
                f"{connect.name} announced {connect.to} tokens per image and made "
                f"{visual.shape[2]}; its `to` must be what its op returns."
            )
        return visual

    def _compress(self, visual: Array, batch: Batch, ctx: Context):
        """Reductions at the connector, image by image."""
        b, i, v, d = visual.shape
        if not self.plan.compress:
            return visual.reshape(b, i * v, d), None, ctx
        present = batch["views"][..., :1]
        if self.plan.connect and self.plan.connect.varies:
            present = present & (batch["visual_rows"] >= 0)
        state = tokens.per_image(visual, present)
        aligned = {
            name: x.reshape(x.shape[0], b * i, v, d) for name, x in ctx.aligned.items()
        }
        ctx = ctx.replace(aligned=aligned)
        for edit in self.plan.compress:
            decision = self._op(edit)(state, Observation(), ctx)
            state, ctx = reduce_span(state, ctx, edit.span, decision)
        m = state.hidden.shape[1]
        aligned = {
            name: x.reshape(x.shape[0], b, i * m, d) for name, x in ctx.aligned.items()
        }
        gate = None if state.gate is None else state.gate.reshape(b, i * m)
        return state.hidden.reshape(b, i * m, d), gate, ctx.replace(aligned=aligned)

    def _assemble(self, batch: Batch, visual: Array, gate: Array | None) -> TokenState:
        text, embed = self.language.embed(batch["tokens"]), self.language.embed
        for query in self.plan.queries:
            words = text, batch["tokens"], batch["role"]
            text = self._op(query).enter(*words, embed)
        prefix, count = self.plan.geometry.prefix, visual.shape[1]
        if batch["visual_positions"].shape[1] != count:
            raise ValueError(
                f"the batch has {batch['visual_positions'].shape[1]} visual slots and "
                f"the plan {count}: place the data with this plan's tokens_per_image."
            )

        def join(words: Array, pictures: Array) -> Array:
            parts = (words[:, :prefix], pictures, words[:, prefix:])
            return jnp.concatenate(parts, axis=1)

        ones = jnp.ones(visual.shape[:2], jnp.float32)
        return TokenState(
            hidden=join(text, visual.astype(text.dtype)),
            positions=join(batch["positions"], batch["visual_positions"]),
            valid=join(batch["valid"], batch["visual_valid"]),
            segment=join(batch["segment"], batch["visual_segment"]),
            role=join(batch["role"], jnp.full_like(ones, Role.VISUAL, jnp.int8)),
            turn=join(batch["turn"], jnp.zeros_like(ones, jnp.int32)),
            size=join(jnp.ones(text.shape[:2], jnp.float32), ones),
            coords=join(batch["coords"], batch["visual_coords"])
            if self.spec.language.axes
            else None,
            gate=None if gate is None else join(jnp.ones(text.shape[:2]), gate),
            layout=Layout.of(
                {
                    "prefix": prefix,
                    "visual": count,
                    "suffix": text.shape[1] - prefix,
                }
            ),
        )

    def _op(self, edit):
        return self.strategy.get(edit.name, edit.op)

    def _constrain_views(self, x: Array) -> Array:
        return self.constrain(x, "views patches act_embed")

    def _constrain_tokens(self, x: Array) -> Array:
        return self.constrain(x, "batch tokens act_embed")


def geometry(
    spec: LMMSpec,
    *,
    images: int,
    crops: int,
    prefix: int,
    suffix: int,
    pinpoints: tuple[tuple[int, int], ...] = (),
    fine: int = 0,
    train: bool = False,
) -> Geometry:
    """Static sizes of a model and its prompt, for strategies and plans."""
    v, w = spec.vision, spec.language
    return Geometry(
        vision=v.block.geometry(v.depth),
        language=w.block.geometry(w.depth),
        vision_layers=v.run,
        class_token=v.class_token,
        patches=v.patches,
        fixed_grid=None if v.native else v.grid,
        patch=3 * v.frames * v.patch**2,
        merge=v.merge,
        passes=v.passes,
        connector=connector.weights(spec),
        images=images,
        crops=crops,
        prefix=prefix,
        suffix=suffix,
        vocab=w.vocab,
        pinpoints=pinpoints,
        fine=fine,
        train=train,
        dtype=w.block.dtype,
        param_dtype=w.block.param_dtype,
    )


def own_edits(spec: LMMSpec, sizes: Geometry) -> tuple[Edit, ...]:
    """The edits that a model has before any strategy."""
    own = tuple(edit for make in spec.own for edit in make(sizes))
    return (*own, *connector.tap_edits(spec))


def abstract_batch(model: LMM, size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the batch that a model reads, for tracing without data."""
    g, v = model.plan.geometry, model.spec.vision
    text = g.prefix + g.suffix
    visual = g.images * model.plan.tokens_per_image

    def of(dtype, *shape):
        return jax.ShapeDtypeStruct((size, *shape), dtype)

    view = (v.patches, 1, v.patch, v.patch, 3) if v.native else (v.view, v.view, 3)
    axes = model.spec.language.axes
    coords = {
        "coords": of(jnp.int32, text, axes),
        "visual_coords": of(jnp.int32, visual, axes),
    }
    tiled = g.tiled_tokens
    return {
        "images": of(jnp.uint8, g.images, g.views, *view),
        "views": of(bool, g.images, g.views),
        "grid": of(jnp.int32, g.images, 2),
        "tokens": of(jnp.int32, text),
        "positions": of(jnp.int32, text),
        "valid": of(bool, text),
        "segment": of(jnp.int32, text),
        "role": of(jnp.int8, text),
        "turn": of(jnp.int32, text),
        "loss_mask": of(jnp.float32, text),
        "visual_positions": of(jnp.int32, visual),
        "visual_valid": of(bool, visual),
        "visual_segment": of(jnp.int32, visual),
        **(coords if axes else {}),
        **({"visual_rows": of(jnp.int32, g.images, tiled)} if tiled else {}),
    }


def init(model: LMM, rng: Array) -> dict:
    """Fresh parameters. Call it under `jax.jit` or `jax.eval_shape`."""
    batch = {
        name: jnp.zeros(x.shape, x.dtype)
        for name, x in abstract_batch(model, 1).items()
    }
    return model.init(rng, batch, method="score")["params"]


def params(spec: LMMSpec) -> tuple[Param, ...]:
    """Rows of the whole model in the naming of the original LLaVA checkpoints."""
    tower = native_vit if spec.vision.native else vit
    at = "model.vision_tower.vision_tower.vision_model."
    return (
        *(row.under("vision/", at) for row in tower.params(spec.vision)),
        *(
            row.under("connector/", "model.mm_projector.")
            for row in connector.params(spec)
        ),
        *connector.tap_params(spec, "model.mm_projector.taps.{layer}."),
        *(row.under("language/", "") for row in decoder.params(spec.language)),
    )
