"""The executor: runs the steps of a plan over a stack of equal blocks.

Letters: B batch, T tokens, D width, L layers, l layers of one run, S keys, K key heads,
H head width, M slots of the tail.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import functools
from typing import Any

from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp

from lmm_jax.depth import Context, Keys, Observation, Place, TokenState
from lmm_jax.depth.edits import ReduceOp
from lmm_jax.depth.planner import Cut, Feed, Layer, Mode, Scan, Step
from lmm_jax.depth.reduce import reduce_span
from lmm_jax.nn import halves
from lmm_jax.nn.apart import packed, unpacked
from lmm_jax.nn.attention import Sight, observe, sight
from lmm_jax.nn.block import Block, BlockSpec
from lmm_jax.nn.cache import Cache, Run
from lmm_jax.nn.chunk import in_chunks
from lmm_jax.nn.kernels import Kernel
from lmm_jax.nn.lora import NOISE, adapted, thinned
from lmm_jax.nn.remat import Remat, in_turn, rematted
from lmm_jax.nn.rope import Rotation, rotation

Array = jax.Array
# (tokens that enter a layer, [B, T, D] that leaves it, its keys, its queries [B, T, N, H])
# to a small tree of arrays.
Watch = Callable[[TokenState, Array, Keys, Array], Any]


@struct.dataclass
class StackOutput:
    """The tokens after the last step, the caches of its runs (empty unless asked for),
    what the cuts report, by "<edit>/<name>", and what was watched, [L, ...]."""

    state: TokenState
    runs: tuple[Run, ...]
    aux: dict[str, Array]
    watched: Any = None


class LayerStack(nn.Module):
    """L equal blocks with stacked parameters, run as scans over slices of them.

    To run and to decode, but not to learn, they may also be given `apart`; to learn, in
    `Halves`.

    Attributes:
        spec: the block.
        depth: L.
        masked: False where every token sees every token (vision), which skips masks.
        remat: what the backward pass recomputes: "none" keeps all, "full" keeps layer
            inputs, "dots" keeps matrix products without batch dimensions.
        unroll: layers per loop iteration; 0 unrolls every scan. XLA on CPU parallelises
            poorly inside loops, on TPU and GPU 1 compiles fastest and runs as fast.
        constrain: pins the sharding of [B, T, D] activations.
        kernel: what computes attention where it can; None: XLA.
    """

    spec: BlockSpec
    depth: int
    masked: bool = True
    remat: Remat = "none"
    unroll: int = 1
    constrain: Callable[[Array], Array] = lambda x: x
    kernel: Kernel | None = None

    def setup(self):
        # `self.param` traces its initialiser on every apply; L layers are slow to trace.
        if self.has_variable("params", "layers"):
            layers = self.get_variable("params", "layers")
        else:
            layers = self.param("layers", self._init_layers)
        self.layers = adapted(layers, self.spec.lora)

    def run(
        self,
        state: TokenState,
        steps: Sequence[Step],
        ctx: Context,
        *,
        ops: Mapping[str, ReduceOp] | None = None,
        mode: Mode = "drop",
        collect: bool = False,
        chunk: int = 0,
        watch: Watch | None = None,
    ) -> StackOutput:
        """Runs a whole sequence: training and prefill.

        Args:
            state: tokens at the entrance; its layout is the plan's.
            steps: of the plan, for this stack.
            ctx: buffers aligned with the visual span.
            ops: bound modules of reductions that learn, by edit name.
            mode: see `Plan.mode`.
            collect: whether to return the caches for decoding.
            chunk: tokens that a layer reads at a time, once it has the keys of all; 0
                is all T. Not for learning: dropout would repeat from chunk to chunk.
            watch: what is to be known of every layer, as small as it can be there.

        Raises:
            ValueError: a watched layer is cut half-way.
        """
        ops = ops or {}
        seen, runs, aux, watched = Observation(), [], {}, []
        for step in steps:
            if isinstance(step, Cut):
                state, ctx, said = cut(step.edits, state, seen, ctx, ops, mode)
                state = _fed(state, ctx, step.feeds)
                for query in step.queries:
                    state = ops.get(query.name, query.op)(state, ctx)
                aux |= said
                continue
            place = state.place
            if isinstance(step, Scan):
                hidden, keys, known = self._scan(
                    state, step, ctx, collect, chunk, watch
                )
                state = state.replace(hidden=hidden)
            else:
                state, ctx, seen, keys, said, known = self._layer(
                    state, step, ctx, ops, mode, chunk, watch
                )
                aux |= said
            watched.append(known)
            if collect:
                keys = tuple(map(packed, keys)) if self._apart else keys
                runs.append(Run(keys, place))
        known = jax.tree.map(lambda *x: jnp.concatenate(x), *watched) if watch else None
        return StackOutput(state, tuple(runs), aux, known)

    def decode(
        self, hidden: Array, cache: Cache, steps: Sequence[Step]
    ) -> tuple[Array, Cache]:
        """Runs one new token per row through all layers.

        Args:
            hidden: [B, 1, D].
            cache: of the prompt and of the tokens decoded so far.
            steps: those that filled the cache.

        Returns:
            [B, 1, D] and the cache with one more token, written with one update.
        """
        batch, slots = hidden.shape[0], cache.tail.k.shape[2]
        same = jnp.zeros((batch, slots), jnp.int32)
        positions = cache.start[:, None] + jnp.arange(slots)
        written = jnp.broadcast_to(jnp.arange(slots) < cache.step, same.shape)
        tail_place = Place(positions, written, same)
        place = Place(
            cache.start[:, None] + cache.step, jnp.ones((batch, 1), bool), same[:, :1]
        )
        if cache.shift is not None:
            at = place.positions + cache.shift[:, None]
            axes = self.spec.rope.axes.count
            place = place.replace(coords=jnp.repeat(at[..., None], axes, axis=-1))
        angles = self._rotation(place)
        own, tail_sight = self._sight(place, place), self._sight(place, tail_place)
        block = Block(self.spec, parent=None)

        fresh = []
        layered = [step for step in steps if not isinstance(step, Cut)]
        for step, run in zip(layered, cache.runs):
            past = self._sight(place, run.place)

            def read(x, layer, prompt, tail, past=past):
                parts = ((prompt, past), (tail, tail_sight))
                return block.apply({"params": layer}, x, angles, own, parts)

            hidden, keys = self._read(read, hidden, step, run.keys, cache.tail)
            fresh.append(keys)
        new = jax.tree.map(lambda *parts: jnp.concatenate(parts), *fresh)
        tail = jax.tree.map(
            lambda t, n: jax.lax.dynamic_update_slice_in_dim(
                t, n.astype(t.dtype), cache.step, axis=2
            ),
            cache.tail,
            new,
        )
        return hidden, cache.replace(tail=tail, step=cache.step + 1)

    def _read(self, read, hidden: Array, step: Scan | Layer, prompts, tails):
        """One token through the layers of a run: [B, 1, D] and its keys in each layer."""
        numbers = range(step.start, step.stop)
        if self._apart:
            fresh = []
            for i, prompt in zip(numbers, prompts):
                tail = jax.tree.map(lambda t, i=i: t[i], tails)
                hidden, keys = read(hidden, self.layers[i], unpacked(prompt), tail)
                fresh.append(keys)
            return hidden, jax.tree.map(lambda *k: jnp.stack(k), *fresh)

        def body(x, xs):
            index, prompt = xs
            # Indexed here and not sliced outside: a slice of the stack would be a copy
            # of its weights in every decode step.
            layer, tail = jax.tree.map(
                lambda p: jax.lax.dynamic_index_in_dim(p, index, keepdims=False),
                (self.layers, tails),
            )
            return read(x, layer, prompt, tail)

        unroll = self._unroll(len(numbers))
        return jax.lax.scan(
            body, hidden, (jnp.asarray(numbers), prompts), unroll=unroll
        )

    def _scan(self, state, step: Scan, ctx: Context, collect: bool, chunk: int, watch):
        block = self._watched(state, chunk, watch)

        # One stack for each layer of the period and not a reshaped one, of which XLA on
        # CPU makes a copy, also where the period is 1.
        firsts = range(step.start, step.start + step.period)
        runs = [range(first, step.stop, step.period) for first in firsts]

        def body(hidden, xs):
            layers, fed = xs
            for rows in fed:
                hidden = _add(hidden, rows, state.layout.slice("visual"))
            kept, known = [], []
            for run, (row, rngs) in zip(runs, layers):
                layer = self._row(run, row)
                hidden, keys, seen = block(layer, self.constrain(hidden), rngs)
                kept.append(keys)
                known.append(seen)
            return hidden, (tuple(kept) if collect else (), tuple(known))

        layers = tuple(self._rows(run, step, ctx) for run in runs)
        fed = tuple(ctx.aligned[f.source][f.start : f.stop] for f in step.feeds)
        bodies = (step.stop - step.start) // step.period
        unroll = self._unroll(bodies)
        times = -(-bodies // unroll)
        body = rematted(body, self.remat, scanned=not self._apart, times=times)
        if not self._apart:
            hidden, layers = in_turn(state.hidden, layers, self.remat, times)
            hidden, (keys, known) = jax.lax.scan(
                body, hidden, (layers, fed), unroll=unroll
            )
            return hidden, _interleaved(keys), _interleaved(known)
        hidden, kept, known = state.hidden, [], []
        for i in range(bodies):
            rows = tuple(buffer[i] for buffer in fed)
            layer = tuple(stack[i] for stack in layers)
            hidden, (keys, seen) = body(hidden, (layer, rows))
            kept, known = [*kept, *keys], [*known, *seen]
        return hidden, tuple(kept), jax.tree.map(lambda *x: jnp.stack(x), *known)

    def _layer(self, state, step: Layer, ctx, ops, mode, chunk, watch):
        """One layer alone: its attention is shown, and it may be cut half-way."""
        if watch and step.between:
            names = ", ".join(edit.name for edit in step.between)
            raise ValueError(
                f"{names} cuts inside layer {step.index}, so what leaves it are not the "
                "tokens that enter it, and no score compares them: score the model "
                "without that strategy."
            )
        attend = self._block(state.place, chunk, "attend")
        run = range(step.start, step.stop)
        rows = self._rows(run, step, ctx)
        row, rngs = rows[0] if self._apart else jax.tree.map(lambda p: p[0], rows)
        layer = self._row(run, row)
        entered = self.constrain(_fed(state, ctx, step.feeds).hidden)

        def feed(layer, hidden):
            feed = functools.partial(self._methods(layer, rngs), method="feed")
            return in_chunks(feed, hidden, chunk)

        hidden, keys, q = rematted(attend, self.remat)(layer, entered, rngs)
        own = self._sight(state.place, state.place)
        angles = self._rotation(state.place)
        seen = observe(q, keys, own, state, step.observe, angles)
        entered, state = state.replace(hidden=entered), state.replace(hidden=hidden)
        state, ctx, aux = cut(step.between, state, seen, ctx, ops, mode)
        state = state.replace(hidden=rematted(feed, self.remat)(layer, state.hidden))
        known = watch(entered, state.hidden, keys, q) if watch else None
        known = jax.tree.map(lambda x: x[None], known)
        kept = (keys,) if self._apart else jax.tree.map(lambda k: k[None], keys)
        return state, ctx, seen, kept, aux, known

    def _block(self, place: Place, chunk: int, method: str = "__call__"):
        """A method of a block over all tokens at `place`: a function of (parameters, x,
        random keys).

        In chunks, the keys of all tokens come first, so a chunk may hold any tokens, in
        any order.
        """
        angles = self._rotation(place)
        whole = chunk == 0 or chunk >= place.valid.shape[1]
        own = self._own_sight(place) if whole else None

        def run(layer, x, rngs):
            apply = self._methods(layer, rngs)
            if whole:
                return apply(x, angles, own, method=method)
            keys = apply(x, angles, method="keys")

            def read(part):
                x, angles, queries = part
                sight = self._sight(queries, place)
                x, _, *q = apply(x, angles, sight, keys=keys, method=method)
                return x, *q

            x, *q = in_chunks(read, (x, angles, place), chunk)
            return x, keys, *q

        return run

    def _watched(self, state: TokenState, chunk: int, watch: Watch | None):
        """A whole block as a function like `_block`'s, and what `watch` says of it."""
        block = self._block(state.place, chunk, "attend" if watch else "__call__")

        def run(layer, x, rngs):
            if watch is None:
                return *block(layer, x, rngs), None
            y, keys, q = block(layer, x, rngs)
            feed = functools.partial(self._methods(layer, rngs), method="feed")
            y = in_chunks(feed, y, chunk)
            return y, keys, watch(state.replace(hidden=x), y, keys, q)

        return run

    def _methods(self, layer, rngs):
        block = Block(self.spec, parent=None)
        return functools.partial(block.apply, {"params": layer}, rngs=rngs)

    def _rotation(self, place: Place) -> Rotation | None:
        if self.spec.rope is None:
            return None
        return rotation(place, self.spec.rope, self.spec.head_dim)

    def _sight(self, queries: Place, keys: Place) -> Sight:
        if not self.masked:
            return Sight(None)
        s = self.spec
        kinds = dict(causal=s.causal, window=s.window, soft=s.soft_mask)
        return sight(queries, keys, **kinds)

    def _own_sight(self, place: Place) -> Sight:
        """Of tokens among themselves, by the kernel if it can."""
        seen = self._sight(place, place)
        return seen.replace(fused=self.kernel and self.kernel.fused(place, seen))

    @property
    def _apart(self) -> bool:
        return isinstance(self.layers, tuple)

    def _rows(self, run: range, step: Scan | Layer, ctx: Context):
        """Rows of some layers of a step, and the keys of what is random in them."""
        if self._apart:
            return [(self.layers[layer], {}) for layer in run]
        rows = halves.rows(self.layers, run)
        # A mask inside a shared scan would compute all weight gradients and drop them.
        rows = rows if step.learns else jax.lax.stop_gradient(rows)
        if ctx.rng is None or not self.spec.lora:
            return rows, {}
        keys = jax.vmap(functools.partial(jax.random.fold_in, ctx.rng))
        return rows, {NOISE: keys(jnp.asarray(run))}

    def _row(self, run: range, row):
        """The parameters of one layer of a run, from its row."""
        return row if self._apart else halves.row(self.layers, run, row)

    def _unroll(self, bodies: int) -> int:
        return bodies if self.unroll == 0 else min(self.unroll, bodies)

    def _init_layers(self, rng: Array):
        block = Block(self.spec, parent=None)
        x = jnp.zeros((1, 1, self.spec.width), self.spec.dtype)
        one = jnp.zeros((1, 1), jnp.int32)
        rope = self.spec.rope
        coords = rope and rope.axes and jnp.zeros((1, 1, rope.axes.count), jnp.int32)
        angles = self._rotation(Place(one, one == 0, one, coords=coords))

        def init(key):
            return block.init(key, x, angles, Sight(None))["params"]

        layers = jax.vmap(init)(jax.random.split(rng, self.depth))
        # 2 L branches add up in the residual stream (GPT-2, section 2.3): scaled so,
        # they do not drown what entered it, and a small model learns to read sooner.
        for name in ("o", "down"):
            layers[name]["kernel"] *= (2 * self.depth) ** -0.5
        return thinned(layers, self.spec.lora)


def _interleaved(parts: tuple[Any, ...]) -> Any:
    """What there is of every layer of a period, each [n, ...], in the order of layers."""
    if len(parts) < 2:
        return parts[0] if parts else None

    def join(*each):
        return jnp.stack(each, axis=1).reshape(-1, *each[0].shape[1:])

    return jax.tree.map(join, *parts)


def cut(edits, state, seen, ctx, ops, mode):
    """Applies reductions of one site; all read the same state and observation."""
    decisions = [(e, ops.get(e.name, e.op)(state, seen, ctx)) for e in edits]
    aux = {}
    for edit, assignment in decisions:
        state, ctx = reduce_span(state, ctx, edit.span, assignment, mode=mode)
        aux |= {f"{edit.name}/{name}": x for name, x in assignment.aux.items()}
    return state, ctx, aux


def _fed(state: TokenState, ctx: Context, feeds: Sequence[Feed]) -> TokenState:
    """Adds one row of each buffer to the visual span."""
    hidden = state.hidden
    for feed in feeds:
        rows = ctx.aligned[feed.source][feed.start]
        hidden = _add(hidden, rows, state.layout.slice("visual"))
    return state.replace(hidden=hidden)


def _add(hidden: Array, rows: Array, where: slice) -> Array:
    """Adds [B, V, D] to the visual rows of [B, T, D]. A pad fuses into the addition."""
    widths = ((0, 0), (where.start, hidden.shape[1] - where.stop), (0, 0))
    return hidden + jnp.pad(rows.astype(hidden.dtype), widths)
