"""The planner: from edits to the steps that a network runs, before any array exists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import itertools
from typing import Literal

from lmm_jax.depth.edits import (
    CONNECTOR,
    Connect,
    Edit,
    Inject,
    Query,
    Reduce,
    Site,
    Tune,
)
from lmm_jax.depth.geometry import Geometry
from lmm_jax.depth.layout import Layout
from lmm_jax.depth.state import OBSERVABLE

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
    _check_names(edits)
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
        _check_reduce(edit, geometry)
    _check_sites(reduces)
    injects, stacked = _injects(edits, "language"), _injects(edits, "vision")
    for edit in injects:
        _check_inject(edit, geometry.language.depth)
        _check_taps(edit, geometry)
    for edit in stacked:
        _check_inject(edit, geometry.vision_layers)
        _check_fold(edit, geometry, (*stacked, *injects, *connects))

    queries = tuple(e for e in edits if isinstance(e, Query))
    for edit in queries:
        _check_query(edit, geometry, queries)

    compress = tuple(e for e in reduces if e.at == CONNECTOR)
    connected = connect.to if connect else geometry.visual_tokens
    visual = connected
    for edit in compress:
        _check_size(edit, visual)
        visual = edit.to
    # A mask keeps the storage; positions count only the tokens that a cut would leave.
    entrance = geometry.layout(visual if mode == "drop" else connected)

    in_language = [e for e in reduces if e.at.stack == "language"]
    tunes = [e for e in edits if isinstance(e, Tune)]
    for tune in tunes:
        _check_tune(tune, geometry)
    tuned = {x for t in tunes if t.stack == "language" for x in t.layers}
    edges = {edge for layer in tuned for edge in (layer, layer + 1)}
    language = _steps(geometry.language.depth, in_language, injects, edges, queries)
    if tuned:
        language = tuple(
            step
            if isinstance(step, Cut)
            else dataclasses.replace(step, learns=step.start in tuned)
            for step in language
        )
    return Plan(
        geometry=geometry,
        edits=(*connects, *stacked, *reduces, *injects, *queries, *tunes),
        vision=_vision_steps(geometry, stacked, injects),
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
    geometry: Geometry, stacked: Sequence[Inject], readers: Sequence[Inject]
) -> tuple[Step | Fold, ...]:
    """The vision stack, cut after each layer whose features are read."""
    ends = {tap + 1 for edit in readers for tap in edit.taps}
    steps = list(_steps(geometry.vision_layers, (), stacked, ends))
    for edit in stacked:
        first = next(i for i, step in enumerate(steps) if step.feeds)
        steps.insert(first, Fold(1 + geometry.crops, edit))
    return tuple(steps)


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
            _check_size(edit, alive.get(edit.span, 0))
            alive[edit.span] = edit.to
            if mode == "drop":
                layout = layout.resized(edit.span, edit.to)
        layouts.append(layout)
    return tuple(layouts)


def _check_names(edits: Sequence[Edit]) -> None:
    names = [e.name for e in edits if not isinstance(e, Tune)]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(
            f"two edits are called {', '.join(sorted(twice))}; names are parameter "
            "paths and must be unique in a plan: rename one."
        )


def _check_reduce(edit: Reduce, geometry: Geometry) -> None:
    if edit.to < 0:
        raise ValueError(f"{edit.name} keeps {edit.to} tokens; use 0 or more.")
    unknown = set(edit.observe) - set(OBSERVABLE)
    if unknown:
        raise ValueError(
            f"{edit.name} observes {', '.join(sorted(unknown))}; attention can show "
            f"{', '.join(OBSERVABLE)}."
        )
    if edit.at == CONNECTOR:
        if geometry.fixed_grid is None:
            raise ValueError(
                f"{edit.name} is placed at the connector, where images of their own size "
                "differ in tokens and have their coordinates already: place it before "
                "language layer 0 or later."
            )
        if edit.observe:
            raise ValueError(
                f"{edit.name} observes {', '.join(edit.observe)} at the connector, where "
                "no language layer has run: place it before a language layer >= 1."
            )
        return
    if edit.at.stack != "language":
        raise ValueError(
            f"{edit.name} is placed in the {edit.at.stack!r} stack; reductions run in "
            "'language' or at the connector."
        )
    depth = geometry.language.depth
    if not 0 <= edit.at.layer < depth:
        raise ValueError(
            f"{edit.name} is placed {edit.at}, but the stack has {depth} layers: use a "
            f"layer in 0..{depth - 1}."
        )
    if edit.at.phase == "before" and edit.at.layer == 0 and edit.observe:
        raise ValueError(
            f"{edit.name} observes {', '.join(edit.observe)} before layer 0, where no "
            f"attention has run yet: use a layer in 1..{depth - 1}."
        )
    if edit.at.phase == "inside" and geometry.language.parallel:
        raise ValueError(
            f"{edit.name} cuts inside layer {edit.at.layer}, but attention and MLP of "
            "this block are parallel, so nothing lies between them: cut before a layer."
        )


def _check_sites(reduces: Sequence[Reduce]) -> None:
    seen: dict[tuple[Site, str], str] = {}
    for edit in reduces:
        other = seen.setdefault((edit.at, edit.span), edit.name)
        if other != edit.name:
            raise ValueError(
                f"{other} and {edit.name} both cut {edit.span!r} at {edit.at}; move one "
                "to another layer, or write one op that composes them."
            )


def _check_inject(edit: Inject, depth: int) -> None:
    outside = [layer for layer in edit.layers if not 0 <= layer <= depth]
    if outside:
        raise ValueError(
            f"{edit.name} injects before layers {outside}, but the stack has {depth}: "
            f"use layers in 0..{depth - 1}, or {depth} for its end."
        )
    if list(edit.layers) != sorted(set(edit.layers)):
        raise ValueError(
            f"{edit.name} injects before layers {list(edit.layers)}; they must ascend "
            "without repeats, one per row of its buffer."
        )


def _check_query(edit: Query, geometry: Geometry, queries: Sequence[Query]) -> None:
    depth = geometry.language.depth
    if edit.at not in {Site("language", layer) for layer in range(depth)}:
        raise ValueError(
            f"{edit.name} reads {edit.at}: use before(layer) with a language layer in "
            f"0..{depth - 1}."
        )
    if edit.count < 1:
        raise ValueError(f"{edit.name} has {edit.count} tokens; use 1 or more.")
    if len(queries) > 1:
        names = " and ".join(query.name for query in queries)
        raise ValueError(f"{names} both put tokens after the question: keep one.")


def _check_taps(edit: Inject, geometry: Geometry) -> None:
    outside = [tap for tap in edit.taps if not 0 <= tap < geometry.vision_layers]
    if outside:
        raise ValueError(
            f"{edit.name} reads features after vision layers {outside}, but "
            f"{geometry.vision_layers} run: use layers in 0..{geometry.vision_layers - 1}."
        )
    if edit.taps and geometry.passes > 1:
        raise ValueError(
            f"{edit.name} reads features of inner vision layers, which a tower that reads "
            "a view at several scales does not join: choose another vision tower."
        )


def _check_fold(edit: Inject, geometry: Geometry, readers: Sequence[Edit]) -> None:
    others = [other.name for other in readers if other is not edit]
    if others:
        raise ValueError(
            f"{', '.join(others)} may read hi-res views, but {edit.name} ends them before "
            f"vision layer {edit.layers[0]}: remove one of them."
        )
    if geometry.fine:
        raise ValueError(
            f"{edit.name} stacks hi-res views, and finer ones (image.fine={geometry.fine}) "
            "would be read by nothing: use image.fine=0."
        )
    if geometry.fixed_grid is None or geometry.passes > 1:
        raise ValueError(
            f"{edit.name} stacks views inside the vision stack, which must read each of "
            "them once and at one size: choose another vision tower."
        )


def _check_tune(edit: Tune, geometry: Geometry) -> None:
    depth = {"vision": geometry.vision.depth, "language": geometry.language.depth}
    if edit.stack not in depth:
        raise ValueError(
            f"Tune names stack {edit.stack!r}; use one of {sorted(depth)}."
        )
    outside = [layer for layer in edit.layers if not 0 <= layer < depth[edit.stack]]
    if outside:
        raise ValueError(
            f"Tune names layers {outside} of {edit.stack}, which has "
            f"{depth[edit.stack]}: use layers in 0..{depth[edit.stack] - 1}."
        )


def _check_size(edit: Reduce, alive: int) -> None:
    if edit.to > alive:
        raise ValueError(
            f"{edit.name} keeps {edit.to} {edit.span} tokens, but only {alive} are alive "
            f"{edit.at}: keep at most {alive}."
        )
