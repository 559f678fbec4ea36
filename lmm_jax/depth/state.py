"""What is alive at one depth, what a layer can show of itself, and what a cut decides.

Letters: B batch, T tokens, V visual tokens, R text tokens, M tokens after a cut, D width,
S keys, N query heads, K key heads, H head width, A axes of rotary coordinates, I images,
C views of an image (crops), F fine views of a view, P patches, E width of the vision stack.
"""

from __future__ import annotations

import dataclasses

from flax import struct
import jax
import jax.numpy as jnp

from lmm_jax.depth.layout import Layout

Array = jax.Array


@struct.dataclass
class Place:
    """Where tokens stand: all that attention needs to know besides their content."""

    positions: Array  # int32 [B, T]; causal order and rotary angle
    valid: Array  # bool [B, T]
    segment: Array  # int32 [B, T]; packed example: tokens see only their own
    gate: Array | None = None  # f32 [B, T]; share in every softmax, None means all ones
    coords: Array | None = None  # int32 [B, T, A]; for rotary angles of several axes

    @property
    def share(self) -> Array:
        """f32 [B, T], the gate of a token that is there; 0 of one that is not."""
        valid = self.valid.astype(jnp.float32)
        return valid if self.gate is None else valid * self.gate


@struct.dataclass
class TokenState:
    """The tokens alive at one depth.

    `gate` multiplies a token's share in every softmax (its log is added to the logits).
    """

    hidden: Array  # [B, T, D]
    positions: Array  # int32 [B, T]
    valid: Array  # bool [B, T]
    segment: Array  # int32 [B, T]
    role: Array  # int8 [B, T], see `Role`
    turn: Array  # int32 [B, T]; dialogue turn, for text-informed methods
    size: Array  # f32 [B, T]; how many original tokens this one stands for
    gate: Array | None = None  # f32 [B, T]
    coords: Array | None = None  # int32 [B, T, A]
    layout: Layout = struct.field(pytree_node=False, default=Layout(()))

    @property
    def place(self) -> Place:
        return Place(self.positions, self.valid, self.segment, self.gate, self.coords)

    def arrays(self) -> dict[str, Array | None]:
        """All that is stored token by token, by name."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "layout"
        }


@struct.dataclass
class Keys:
    """Rotated keys and values of one layer, or of a run of layers with a leading axis."""

    k: Array  # [..., B, S, K, H]
    v: Array  # [..., B, S, K, H]


@struct.dataclass
class Observation:
    """What the attention before a cut shows: only what the plan asked for.

    Attributes:
        last_attention: f32 [B, T], probability that the last prompt token (the last
            valid token whose role is not ASSISTANT) gives to each key, mean over heads.
        mean_attention: f32 [B, T], the same, mean over all valid queries and heads.
        text_attention: f32 [B, N, R, V], probabilities that all text slots, empty ones
            too, give to the visual span.
        keys, queries: f32 [B, T, H], not rotated, mean over heads.
    """

    last_attention: Array | None = None
    mean_attention: Array | None = None
    text_attention: Array | None = None
    keys: Array | None = None
    queries: Array | None = None


OBSERVABLE = tuple(Observation.__dataclass_fields__)


@struct.dataclass
class VisionFeatures:
    """Output of the vision stack for every view of every image.

    View 0 is the whole image; the others are its hi-res crops in raster order, unless an
    `Inject` has stacked them into the vision layers, after which C is 1. `rows` arranges
    the patches of a tiled image as one sequence: patch p of view c is c * P + p, a newline
    C * P, and slots that the image leaves empty are -1. `fine` are the same views once
    more, each as F views in raster order.
    """

    hidden: Array  # [B, I, C, P, E]
    grid: Array  # int32 [B, I, 2]; columns and rows of crops, width first
    taps: dict[int, Array] = struct.field(default_factory=dict)  # hidden after layers
    rows: Array | None = None  # int32 [B, I, V]; of tiled images
    fine: Array | None = None  # [B, I, C, F, P, E]


@struct.dataclass
class Memory:
    """Vision features that tokens may attend to: all patches of an example, side by side.

    `place` has the segment of each image and the position of its last token, so that
    `nn.attention.sight` says who may look.
    """

    hidden: Array  # [B, I * C * P, E]
    place: Place


@struct.dataclass
class Context:
    """What edits may consult besides the state.

    Attributes:
        aligned: arrays [..., B, V, D] that follow the visual span through every cut.
        rng: key for edits that draw; None where nothing is random.
        memory: what queries read; None in a plan without them.
    """

    aligned: dict[str, Array] = struct.field(default_factory=dict)
    rng: Array | None = None
    memory: Memory | None = None


@struct.dataclass
class Keep:
    """A cut that selects.

    Attributes:
        index: int32 [B, M], rows of the span, the valid ones first.
        valid: bool [B, M].
        gate: f32 [B, M] or None; see `TokenState.gate`.
        aux: auxiliary losses and metrics by name.
    """

    index: Array
    valid: Array
    gate: Array | None = None
    aux: dict[str, Array] = struct.field(default_factory=dict)


@struct.dataclass
class Mix:
    """A cut that merges or pools: new hidden = weights @ old hidden.

    Attributes:
        weights: f32 [B, M, V].
        valid: bool [B, M].
        gate: f32 [B, M] or None; see `TokenState.gate`.
        aux: auxiliary losses and metrics by name.
    """

    weights: Array
    valid: Array
    gate: Array | None = None
    aux: dict[str, Array] = struct.field(default_factory=dict)
