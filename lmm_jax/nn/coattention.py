"""The executor of two streams in lock-step: each attends to itself, then to the other.

Dou et al., "An Empirical Study of Training End-to-End Vision-and-Language Transformers"
(METER), CVPR 2022, arXiv:2111.02387, section 3.

Letters: B batch, T text tokens, V visual tokens, D width, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import functools
from typing import Any, Literal

import einops
from flax import linen as nn
import jax
import jax.numpy as jnp

from lmm_jax.depth import Context, Keys, Observation, Place, TokenState
from lmm_jax.depth.edits import ReduceOp
from lmm_jax.depth.planner import Cut, Layer, Mode, Scan, Step
from lmm_jax.nn import block, halves
from lmm_jax.nn.attention import Sight, mean_head, probabilities, sight
from lmm_jax.nn.block import Block, BlockSpec
from lmm_jax.nn.params import Param
from lmm_jax.nn.remat import Remat, rematted
from lmm_jax.nn.stack import StackOutput, cut

Array = jax.Array
Order = Literal["sequential", "parallel"]

TEXT, IMAGE = "prefix", "visual"  # spans of the streams


class CoAttentionStack(nn.Module):
    """L pairs of a text block and an image block, with stacked parameters, or, to run but
    not to learn, with layers `apart` as in `LayerStack`.

    A cut inside a layer lies before the MLP of its text block: the image block finds both
    streams as the cut leaves them.

    Attributes:
        spec: of all blocks, which read another sequence.
        depth: L.
        order: what the image block reads: the text that the text block of its layer has
            made ("sequential", PuMer), or the text that entered the layer ("parallel",
            METER).
        remat, unroll, constrain: see `LayerStack`.
    """

    spec: BlockSpec
    depth: int
    order: Order
    remat: Remat = "none"
    unroll: int = 1
    constrain: Callable[[Array], Array] = lambda x: x

    def setup(self):
        self.text = self._stacked("text")
        self.image = self._stacked("image")

    def run(
        self,
        state: TokenState,
        steps: Sequence[Step],
        ctx: Context,
        *,
        ops: Mapping[str, ReduceOp] | None = None,
        mode: Mode = "drop",
    ) -> StackOutput:
        """Runs both streams, which lie side by side in `state`; see `LayerStack.run`."""
        ops, seen, aux = ops or {}, Observation(), {}
        for step in steps:
            if isinstance(step, Cut):
                state, ctx, said = cut(step.edits, state, seen, ctx, ops, mode)
            elif isinstance(step, Scan):
                state, said = self._scan(state, step), {}
            else:
                state, ctx, seen, said = self._layer(state, step, ctx, ops, mode)
            aux |= said
        return StackOutput(state, (), aux)

    def _scan(self, state: TokenState, step: Scan) -> TokenState:
        text, image = _place(state, TEXT), _place(state, IMAGE)
        of_text = self._sight(text, text), self._sight(text, image)
        of_image = self._sight(image, image), self._sight(image, text)

        run = range(step.start, step.stop)

        def body(streams, row):
            layer = self._row(run, row)
            words, patches = map(self.constrain, streams)
            read = self._read(layer["text"], words, patches, *of_text)[0]
            new = self._feed(layer["text"], read)
            shown = new if self.order == "sequential" else words
            read = self._read(layer["image"], patches, shown, *of_image)[0]
            return (new, self._feed(layer["image"], read)), None

        streams = _hidden(state, TEXT), _hidden(state, IMAGE)
        layers = self._rows(run, step)
        unroll = len(run) if self.unroll == 0 else min(self.unroll, len(run))
        body = rematted(body, self.remat, times=-(-len(run) // unroll))
        if self._apart:
            for layer in layers:
                streams, _ = body(streams, layer)
        else:
            streams, _ = jax.lax.scan(body, streams, layers, unroll=unroll)
        words, patches = streams
        return _put(_put(state, TEXT, words), IMAGE, patches)

    def _layer(self, state: TokenState, step: Layer, ctx, ops, mode):
        """One layer alone: its text block is shown, and both streams may be cut."""
        run = range(step.start, step.stop)
        rows = self._rows(run, step)
        row = rows[0] if self._apart else jax.tree.map(lambda p: p[0], rows)
        layer = self._row(run, row)
        entered, feed = state, rematted(self._feed, self.remat)
        words, seen = self._shown(layer["text"], state, TEXT, state, step.observe)
        state = _put(state, TEXT, words)
        state, ctx, aux = cut(step.between, state, seen, ctx, ops, mode)
        state = _put(state, TEXT, feed(layer["text"], _hidden(state, TEXT)))
        other = state if self.order == "sequential" else entered
        patches, _ = self._shown(layer["image"], state, IMAGE, other)
        return _put(state, IMAGE, feed(layer["image"], patches)), ctx, seen, aux

    def _shown(
        self,
        params: Any,
        state: TokenState,
        span: str,
        other: TokenState,
        names: Sequence[str] = (),
    ) -> tuple[Array, Observation]:
        """A stream after both attentions of its block, the second to the other stream as
        it is in `other`, and what they show."""
        across = IMAGE if span == TEXT else TEXT
        place, there = _place(state, span), _place(other, across)
        own, cross = self._sight(place, place), self._sight(place, there)
        read = rematted(self._read, self.remat)
        x, *keys, q = read(
            params, _hidden(state, span), _hidden(other, across), own, cross
        )
        return x, _observe(*keys, q, cross, names)

    def _read(
        self, params: Any, x: Array, other: Array, own: Sight, cross: Sight
    ) -> tuple[Array, Keys, Keys, Array]:
        """Both attentions of a block: its stream, the keys of x and of `other`, and the
        queries of the second."""
        apply = functools.partial(self._block().apply, {"params": params})
        x, keys, _ = apply(self.constrain(x), None, own, method="attend")
        x, others, q = apply(x, other, cross, method="read")
        return x, keys, others, q

    def _feed(self, params: Any, x: Array) -> Array:
        return self._block().apply({"params": params}, x, method="feed")

    def _sight(self, queries: Place, keys: Place) -> Sight:
        return sight(queries, keys, causal=False, soft=self.spec.soft_mask)

    def _block(self) -> Block:
        return Block(self.spec, parent=None)

    @property
    def _apart(self) -> bool:
        return isinstance(self.text["layers"], tuple)

    @property
    def _layers(self) -> dict[str, Any]:
        return {"text": self.text["layers"], "image": self.image["layers"]}

    def _rows(self, run: range, step: Scan | Layer) -> Any:
        layers = self._layers
        if self._apart:
            of = {stream: [layers[stream][layer] for layer in run] for stream in layers}
            return [dict(zip(of, pair)) for pair in zip(*of.values())]
        rows = halves.rows(layers, run)
        return rows if step.learns else jax.lax.stop_gradient(rows)

    def _row(self, run: range, row: Any) -> Any:
        return row if self._apart else halves.row(self._layers, run, row)

    def _stacked(self, stream: str) -> Mapping[str, Any]:
        # `self.param` would refuse layers that are apart.
        if self.has_variable("params", stream):
            return self.get_variable("params", stream)
        return self.param(stream, self._init)

    def _init(self, rng: Array) -> dict[str, Any]:
        x = jnp.zeros((1, 1, self.spec.width), self.spec.dtype)

        def whole(block: Block, x: Array) -> Array:
            x, *_ = block.attend(x, None, Sight(None))
            x, *_ = block.read(x, x, Sight(None))
            return block.feed(x)

        def init(key):
            return self._block().init(key, x, method=whole)["params"]

        return {"layers": jax.vmap(init)(jax.random.split(rng, self.depth))}


def _place(state: TokenState, span: str) -> Place:
    where = state.layout.slice(span)
    return jax.tree.map(lambda x: x[:, where], state.place)


def _hidden(state: TokenState, span: str) -> Array:
    return state.hidden[:, state.layout.slice(span)]


def _put(state: TokenState, span: str, hidden: Array) -> TokenState:
    """The state with other hidden vectors of one span."""
    where, old = state.layout.slice(span), state.hidden
    parts = old[:, : where.start], hidden, old[:, where.stop :]
    return state.replace(hidden=jnp.concatenate(parts, axis=1))


def _observe(
    own: Keys, others: Keys, q: Array, seen: Sight, names: Sequence[str]
) -> Observation:
    """What a block shows: keys of both its attentions, the rest of the second."""
    shown = {}
    if "text_attention" in names:
        probs = probabilities(q, others, seen)
        shown["text_attention"] = einops.rearrange(probs, "b k g r v -> b (k g) r v")
    if "keys" in names:
        keys = mean_head(own.k), mean_head(others.k)
        shown["keys"] = jnp.concatenate(keys, axis=1)
    if "queries" in names:
        none = ((0, 0), (0, others.k.shape[1]), (0, 0))
        shown["queries"] = jnp.pad(mean_head(q), none)
    return Observation(**shown)


def params(spec: BlockSpec, layer: str, names: Mapping[str, str]) -> tuple[Param, ...]:
    """Rows of both streams; `{stream}` in `layer` is "text" or "image"."""
    return tuple(
        row.under(f"{stream}/", "")
        for stream in ("text", "image")
        for row in block.params(spec, layer.replace("{stream}", stream), names)
    )
