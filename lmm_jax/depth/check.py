"""What a plan refuses: edits that cannot be placed, each with its name and the remedy.

Every function raises ValueError.
"""

from __future__ import annotations

from collections.abc import Sequence

from lmm_jax.depth.edits import CONNECTOR, Edit, Inject, Query, Reduce, Site, Tune
from lmm_jax.depth.geometry import Geometry
from lmm_jax.depth.state import OBSERVABLE

ACROSS = {"text_attention", "keys", "queries"}  # what two streams show of `OBSERVABLE`


def names(edits: Sequence[Edit]) -> None:
    """They are unique."""
    given = [e.name for e in edits if not isinstance(e, Tune)]
    twice = {name for name in given if given.count(name) > 1}
    if twice:
        raise ValueError(
            f"two edits are called {', '.join(sorted(twice))}; names are parameter "
            "paths and must be unique in a plan: rename one."
        )


def reduce(edit: Reduce, geometry: Geometry) -> None:
    """A place where there is something to cut and to observe."""
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


def sites(reduces: Sequence[Reduce]) -> None:
    """One reduction of a span at a site."""
    seen: dict[tuple[Site, str], str] = {}
    for edit in reduces:
        other = seen.setdefault((edit.at, edit.span), edit.name)
        if other != edit.name:
            raise ValueError(
                f"{other} and {edit.name} both cut {edit.span!r} at {edit.at}; move one "
                "to another layer, or write one op that composes them."
            )


def streams(edits: Sequence[Edit]) -> None:
    """Between two streams nothing but reductions, of what their attentions show."""
    for edit in edits:
        if isinstance(edit, Tune):
            continue
        if not isinstance(edit, Reduce) or edit.at == CONNECTOR:
            raise ValueError(
                f"{edit.name} acts on the one sequence of a language model, and this model "
                "has a stream for the text and one for the image: use reductions before or "
                "inside its layers."
            )
        if missing := set(edit.observe) - ACROSS:
            raise ValueError(
                f"{edit.name} observes {', '.join(sorted(missing))}, but streams that "
                f"attend to each other show {', '.join(sorted(ACROSS))}."
            )


def inject(edit: Inject, depth: int) -> None:
    """Layers of the stack, in ascending order."""
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


def taps(edit: Inject, geometry: Geometry) -> None:
    """Vision layers that run, in a tower that shows them."""
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


def fold(edit: Inject, geometry: Geometry, readers: Sequence[Edit]) -> None:
    """No other edit reads the views that it ends."""
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


def query(edit: Query, geometry: Geometry, queries: Sequence[Query]) -> None:
    """A layer to read before, and no other tokens after the question."""
    depth = geometry.language.depth
    if edit.at not in {Site("language", layer) for layer in range(depth)}:
        raise ValueError(
            f"{edit.name} reads {edit.at}: use before(layer) with a language layer in "
            f"0..{depth - 1}."
        )
    if edit.count < 1:
        raise ValueError(f"{edit.name} has {edit.count} tokens; use 1 or more.")
    if len(queries) > 1:
        called = " and ".join(query.name for query in queries)
        raise ValueError(f"{called} both put tokens after the question: keep one.")


def tune(edit: Tune, geometry: Geometry, tunes: Sequence[Tune]) -> None:
    """Layers of a stack that there is, said once."""
    depth = {"vision": geometry.vision.depth, "language": geometry.language.depth}
    if edit.stack not in depth:
        raise ValueError(
            f"Tune names stack {edit.stack!r}; use one of {sorted(depth)}."
        )
    if sum(other.stack == edit.stack for other in tunes) > 1:
        raise ValueError(f"two Tunes name layers of {edit.stack}: make them one.")
    outside = [layer for layer in edit.layers if not 0 <= layer < depth[edit.stack]]
    if outside:
        raise ValueError(
            f"Tune names layers {outside} of {edit.stack}, which has "
            f"{depth[edit.stack]}: use layers in 0..{depth[edit.stack] - 1}."
        )


def size(edit: Reduce, alive: int) -> None:
    """No more tokens than are alive."""
    if edit.to > alive:
        raise ValueError(
            f"{edit.name} keeps {edit.to} {edit.span} tokens, but only {alive} are alive "
            f"{edit.at}: keep at most {alive}."
        )
