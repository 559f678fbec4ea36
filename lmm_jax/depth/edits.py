"""The vocabulary of strategies: edits to the token set, and the sites where they act."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import Literal, Protocol

from lmm_jax.depth.state import (
    Array,
    Context,
    Keep,
    Mix,
    Observation,
    TokenState,
    VisionFeatures,
)

Project = Callable[
    [Array], Array
]  # [..., E] -> [..., D], the connector, token by token


@dataclasses.dataclass(frozen=True, order=True)
class Site:
    """A place along depth.

    Attributes:
        stack: "vision", "language", or "connector" (between the two).
        layer: 0-based layer of the stack.
        phase: "before" the layer, or "inside" it: between attention and MLP.
    """

    stack: str
    layer: int = 0
    phase: Literal["before", "inside"] = "before"

    def __str__(self) -> str:
        if self == CONNECTOR:
            return "the connector"
        return f"{self.phase} {self.stack} layer {self.layer}"


CONNECTOR = Site("connector")


def before(layer: int, stack: str = "language") -> Site:
    return Site(stack, layer, "before")


def inside(layer: int, stack: str = "language") -> Site:
    return Site(stack, layer, "inside")


class ReduceOp(Protocol):
    """Decides a cut: returns an assignment of old tokens to new ones, never tokens."""

    def __call__(
        self, state: TokenState, seen: Observation, ctx: Context
    ) -> Keep | Mix: ...


@dataclasses.dataclass(frozen=True)
class Reduce:
    """`span` shrinks to `to` tokens at `at`.

    Attributes:
        name: unique in a plan.
        at: where.
        to: tokens that stay (per example, all images together).
        op: what decides.
        observe: fields of `Observation`, taken from the last attention before the cut.
        span: the span that shrinks.
    """

    name: str
    at: Site
    to: int
    op: ReduceOp
    observe: tuple[str, ...] = ()
    span: str = "visual"


@dataclasses.dataclass(frozen=True)
class Inject:
    """Adds `op(vision, project)[i]` to the visual span before `layers[i]`.

    In the vision stack the op reads all views as they are before `layers[0]`. There the
    hi-res ones end: the view of the whole image goes on alone, with what the op made of
    them. Nothing is projected yet, so `project` is the identity.

    Attributes:
        name: unique in a plan; also the name of the buffer in `Context.aligned`.
        layers: ascending layers of the stack, one per row of the buffer; the number of
            layers that run means after the last of them.
        op: `VisionFeatures, Project -> [len(layers), B, V, D]`, evaluated once.
        projects: tokens per image that pass a projector for it, which is its cost.
        weights: entries of the matrices of that projector, if not the connector's.
        taps: vision layers after which it reads features (`VisionFeatures.taps`).
        stack: where it acts; at most one per plan in "vision".
    """

    name: str
    layers: tuple[int, ...]
    op: Callable[[VisionFeatures, Project], Array]
    projects: int = 0
    weights: int | None = None
    taps: tuple[int, ...] = ()
    stack: Literal["language", "vision"] = "language"


@dataclasses.dataclass(frozen=True)
class Connect:
    """Vision features become the visual span. At most one per plan.

    Attributes:
        name: unique in a plan.
        to: visual tokens per image.
        op: `VisionFeatures, Project -> [B, I, to, D]`.
        varies: an image fills the slots that `VisionFeatures.rows` says, not all.
        weights: entries of the matrices that one of them passes, if not the connector's.
    """

    name: str
    to: int
    op: Callable[[VisionFeatures, Project], Array]
    varies: bool = False
    weights: int | None = None


class QueryOp(Protocol):
    """Learned tokens: what they are, and what they read."""

    def enter(
        self, words: Array, tokens: Array, role: Array, embed: Callable[[Array], Array]
    ) -> Array:
        """Embeddings [B, T, D] of the text with those of its query tokens; where `role` is
        QUERY, `tokens` says which of them it is."""

    def __call__(self, state: TokenState, ctx: Context) -> TokenState:
        """The tokens after they have read; only query tokens may differ."""

    def flops(self, text: int) -> float:
        """Of reading once, in an example with so many text tokens."""


@dataclasses.dataclass(frozen=True)
class Query:
    """Learned tokens after every question, which read question and image once, at `at`.

    They occupy text slots, with positions and caches like any other token, so decoding
    knows nothing of them.

    Attributes:
        name: unique in a plan.
        at: before a language layer.
        count: tokens after each question.
        op: what they are and how they read; `Context.memory` is what there is to see.
    """

    name: str
    at: Site
    count: int
    op: QueryOp


@dataclasses.dataclass(frozen=True)
class Tune:
    """Only `layers` of `stack` learn, or none; the others run in scans of their own,
    frozen. At most one per stack and plan; without one, all of its layers may learn."""

    stack: str
    layers: tuple[int, ...]


Edit = Reduce | Inject | Connect | Query | Tune
