"""The planner: from edits to the steps that a network runs, before any array exists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import itertools
from typing import Literal

from lmm_jax.depth import check
from lmm_jax.depth.edits import (
    CONNECTOR,
    Connect,
    Edit,
    Inject,
    Query,
    Reduce,
    Tune,
)
from lmm_jax.depth.geometry import Geometry
from lmm_jax.depth.layout import Layout

Mode = Literal["drop", "mask"]


@dataclasses.dataclass(frozen=True)
class Feed:
    """Rows of `Context.aligned[source]` that a step adds to the visual span."""

    source: str
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Scan:
    """One `lax.scan` over layers [start, stop), `period` layers a body.

    Before the first layer of body i, row `feed.start + i` of each feed is added. Layers
    that do not learn get no weight gradients.
    """

    start: int
    stop: int
    period: int = 1
    feeds: tuple[Feed, ...] = ()
    learns: bool = True


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer on its own: it is observed, or cut between attention and MLP."""

    index: int
    observe: tuple[str, ...] = ()
    between: tuple[Reduce, ...] = ()
    feeds: tuple[Feed, ...] = ()
    learns: bool = True

    @property
    def start(self) -> int:
        return self.index

    @property
    def stop(self) -> int:
        return self.index + 1


@dataclasses.dataclass(frozen=True)
class Cut:
    """Between two layers, or after the last: reductions, all reading the same state and
    observation, then additions of one row of each feed, then queries."""

    edits: tuple[Reduce, ...] = ()
    feeds: tuple[Feed, ...] = ()
    queries: tuple[Query, ...] = ()


Step = Scan | Layer | Cut


@dataclasses.dataclass(frozen=True)
class Fold:
    """In the vision stack: `edit` reads all `views` of every image. Those of the whole
    images go on alone, and later steps feed them what it made."""

    views: int
    edit: Inject


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is run. Hashable: a static argument of every compiled function.

    Attributes:
        geometry: the sizes that the plan was made for.
        edits: the strategy, ordered by site.
        vision, language: steps of the two stacks.
        layouts: storage order of the language stack after each of its steps.
        entrance: storage order at its first layer.
        tokens_per_image: visual tokens per image that the prompt counts positions for.
        connect: the connector's edit; None is the plain projection.
        compress: reductions at the connector, per image.
        mode: "drop" removes tokens; "mask" only hides them (ablations; never faster).
    """

    geometry: Geometry
    edits: tuple[Edit, ...]
    vision: tuple[Step | Fold, ...]
    language: tuple[Step, ...]
    layouts: tuple[Layout, ...]
    entrance: Layout
    tokens_per_image: int
    connect: Connect | None
    compress: tuple[Reduce, ...]
    mode: Mode = "drop"

    @property
    def injects(self) -> tuple[Inject, ...]:
        """Those of the language stack."""
        return _injects(self.edits, "language")

    @property
    def row_wide(self) -> tuple[Reduce, ...]:
        """Reductions that choose among all tokens of a row, not image by image."""
        reduces = (e for e in self.edits if isinstance(e, Reduce))
        return tuple(e for e in reduces if e.at != CONNECTOR)

    @property
    def queries(self) -> tuple[Query, ...]:
        """Those after every question, in the order of their layers."""
        found = (e for e in self.edits if isinstance(e, Query))
        return tuple(sorted(found, key=lambda e: (e.at, e.name)))

    @property
    def taps(self) -> tuple[int, ...]:
        """Vision layers after which features are read."""
        return tuple(sorted({tap for edit in self.injects for tap in edit.taps}))


def make_plan(
    geometry: Geometry, edits: Sequence[Edit], *, mode: Mode = "drop"
) -> Plan:
    """Orders edits along depth and cuts the stacks where shapes change.

    Raises:
        ValueError: an edit cannot be placed; the message names it and the remedy.
    """
    check.names(edits)
    connects = [e for e in edits if isinstance(e, Connect)]
    if len(connects) > 1:
        names = " and ".join(e.name for e in connects)
        raise ValueError(
            f"{names} both replace the connector; a plan has one: remove all but one."
        )
    connect = connects[0] if connects else None
    reduces = sorted(
        (e for e in edits if isinstance(e, Reduce)), key=lambda e: (e.at, e.name)
    )
    for edit in reduces:
        check.reduce(edit, geometry)
    check.sites(reduces)
    if geometry.language.cross:
        check.streams(edits)
    injects, stacked = _injects(edits, "language"), _injects(edits, "vision")
    for edit in injects:
        check.inject(edit, geometry.language.depth)
        check.taps(edit, geometry)
    for edit in stacked:
        check.inject(edit, geometry.vision_layers)
        check.fold(edit, geometry, (*stacked, *injects, *connects))

    queries = tuple(e for e in edits if isinstance(e, Query))
    for edit in queries:
        check.query(edit, geometry, queries)

    compress = tuple(e for e in reduces if e.at == CONNECTOR)
    connected = connect.to if connect else geometry.visual_tokens
    visual = connected
    for edit in compress:
        check.size(edit, visual)
        visual = edit.to
    # A mask keeps the storage; positions count only the tokens that a cut would leave.
    entrance = geometry.layout(visual if mode == "drop" else connected)

    in_language = [e for e in reduces if e.at.stack == "language"]
    tunes = [e for e in edits if isinstance(e, Tune)]
    for tune in tunes:
        check.tune(tune, geometry, tunes)
    depth = geometry.language.depth
    frozen = _frozen(tunes, "language", depth)
    language = _steps(depth, in_language, injects, _edges(frozen), queries)
    language = _marked(language, frozen)
    return Plan(
        geometry=geometry,
        edits=(*connects, *stacked, *reduces, *injects, *queries, *tunes),
        vision=_vision_steps(geometry, stacked, injects, tunes),
        language=language,
        layouts=_layouts(entrance, language, mode),
        entrance=entrance,
        tokens_per_image=visual,
        connect=connect,
        compress=compress,
        mode=mode,
    )


def _injects(edits: Sequence[Edit], stack: str) -> tuple[Inject, ...]:
    """The injections into one stack, in the order of their layers."""
    found = (e for e in edits if isinstance(e, Inject) and e.stack == stack)
    return tuple(sorted(found, key=lambda e: (e.layers, e.name)))


def _vision_steps(
    geometry: Geometry,
    stacked: Sequence[Inject],
    readers: Sequence[Inject],
    tunes: Sequence[Tune],
) -> tuple[Step | Fold, ...]:
    """The vision stack, cut after each layer whose features are read."""
    frozen = _frozen(tunes, "vision", geometry.vision_layers)
    ends = {tap + 1 for edit in readers for tap in edit.taps} | _edges(frozen)
    steps = list(_steps(geometry.vision_layers, (), stacked, ends))
    steps = list(_marked(steps, frozen))
    for edit in stacked:
        first = next(i for i, step in enumerate(steps) if step.feeds)
        steps.insert(first, Fold(1 + geometry.crops, edit))
    return tuple(steps)


def _frozen(tunes: Sequence[Tune], stack: str, depth: int) -> tuple[bool, ...]:
    """Of each layer, whether it does not learn."""
    layers = next((tune.layers for tune in tunes if tune.stack == stack), range(depth))
    return tuple(layer not in layers for layer in range(depth))


def _edges(frozen: Sequence[bool]) -> set[int]:
    """Layers before which learning layers end or begin."""
    return {i for i in range(1, len(frozen)) if frozen[i] != frozen[i - 1]}


def _marked(steps: Sequence[Step], frozen: Sequence[bool]) -> tuple[Step, ...]:
    """Steps that know whether their layers learn."""
    return tuple(
        step
        if isinstance(step, Cut) or not frozen[step.start]
        else dataclasses.replace(step, learns=False)
        for step in steps
    )


def _steps(
    depth: int,
    reduces: Sequence[Reduce],
    injects: Sequence[Inject],
    edges: set[int],
    queries: Sequence[Query] = (),
) -> tuple[Step, ...]:
    """Cuts a stack at its reductions, queries, observed layers and learning edges."""
    asked: dict[int, tuple[Query, ...]] = {}
    for edit in queries:
        asked[edit.at.layer] = (*asked.get(edit.at.layer, ()), edit)
    cuts: dict[int, list[Reduce]] = {}
    between: dict[int, list[Reduce]] = {}
    observe: dict[int, set[str]] = {}
    for edit in reduces:
        layer = edit.at.layer
        (cuts if edit.at.phase == "before" else between).setdefault(layer, []).append(
            edit
        )
        if edit.observe:
            seen_at = layer - 1 if edit.at.phase == "before" else layer
            observe.setdefault(seen_at, set()).update(edit.observe)
    alone = set(between) | set(observe)
    feeds = _feeds(injects)
    behind = (layer + 1 for layer in alone)
    hard = sorted({0, depth, *cuts, *asked, *edges, *alone, *behind})

    steps: list[Step] = []
    for start, stop in itertools.pairwise(hard):
        if start in cuts or start in asked:
            cut = tuple(cuts.get(start, ()))
            steps.append(Cut(cut, queries=asked.get(start, ())))
        if start in alone:
            steps.append(
                Layer(
                    start,
                    tuple(sorted(observe.get(start, ()))),
                    tuple(between.get(start, ())),
                    _rows(feeds, start),
                )
            )
        else:
            steps.extend(_scans(start, stop, feeds))
    if depth in feeds:
        steps.append(Cut(feeds=_rows(feeds, depth)))
    return tuple(steps)


def _rows(feeds: Mapping[int, Sequence[tuple[str, int]]], layer: int):
    return tuple(Feed(source, row, row + 1) for source, row in feeds.get(layer, ()))


def _feeds(injects: Sequence[Inject]) -> dict[int, tuple[tuple[str, int], ...]]:
    """(buffer, row) pairs added before each layer."""
    feeds: dict[int, tuple[tuple[str, int], ...]] = {}
    for edit in injects:
        for row, layer in enumerate(edit.layers):
            feeds[layer] = (*feeds.get(layer, ()), (edit.name, row))
    return feeds


def _scans(
    start: int, stop: int, feeds: dict[int, tuple[tuple[str, int], ...]]
) -> list[Scan]:
    """Runs of layers in which injections recur with one period.

    The rows of a run enter its scan as scanned operands. Indexing one closed-over buffer
    by layer would make the backward pass add a cotangent of the whole buffer in every
    layer of the stack.
    """
    scans: list[Scan] = []
    at = start
    while at < stop:
        later = [layer for layer in sorted(feeds) if at < layer < stop]
        if at not in feeds:
            end = later[0] if later else stop
            scans.append(Scan(at, end))
            at = end
            continue
        period = later[0] - at if later else 1
        bodies = 1
        while _continues(feeds, at, bodies, period, later, stop):
            bodies += 1
        if bodies == 1:
            period = 1
        rows = tuple(Feed(s, r, r + bodies) for s, r in feeds[at])
        scans.append(Scan(at, at + bodies * period, period, rows))
        at += bodies * period
    return scans


def _continues(feeds, at, bodies, period, later, stop) -> bool:
    """Whether body number `bodies` of a run feeds the next rows of the same buffers."""
    layer = at + bodies * period
    expected = tuple((source, row + bodies) for source, row in feeds[at])
    gap = any(layer < other < layer + period for other in later)
    return feeds.get(layer) == expected and layer + period <= stop and not gap


def _layouts(entrance: Layout, steps: Sequence[Step], mode: Mode) -> tuple[Layout, ...]:
    layouts, layout, alive = [], entrance, {s.name: s.length for s in entrance.spans}
    for step in steps:
        edits = step.edits if isinstance(step, Cut) else ()
        edits = step.between if isinstance(step, Layer) else edits
        for edit in edits:
            check.size(edit, alive.get(edit.span, 0))
            alive[edit.span] = edit.to
            if mode == "drop":
                layout = layout.resized(edit.span, edit.to)
        layouts.append(layout)
    return tuple(layouts)
