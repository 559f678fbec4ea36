"""What learns: parameters split into a learning and a frozen half, and joined again.

Parameters are nested dicts of arrays. Layers of a stack share one leaf with the layer
axis in front; its path has a component `layers`. A selection may take rows of such a
leaf, so gradients and optimizer state exist only for the layers that learn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import itertools
import math
import re
from typing import Any, NamedTuple

from flax import traverse_util
import jax
import jax.numpy as jnp

from lmm_jax.nn.halves import Halves

Tree = Mapping[str, Any]
Rows = tuple[int, ...]

LAYERS = "layers"
_SUFFIX = re.compile(rf"{LAYERS}\[([^\]]*)\]")


@dataclasses.dataclass(frozen=True)
class Selection:
    """The learning leaves of one parameter tree. Hashable: a static argument of jit.

    Attributes:
      leaves: sorted pairs (path, rows). `rows` are the learning layers of a stacked
        leaf, ascending, or None where the whole leaf learns. Other leaves are frozen.
    """

    leaves: tuple[tuple[str, Rows | None], ...]

    def paths(self) -> tuple[str, ...]:
        """Paths with at least one learning row."""
        return tuple(path for path, _ in self.leaves)


class Count(NamedTuple):
    """Numbers of scalar parameters."""

    learning: int
    frozen: int


def flatten(tree: Tree) -> dict[str, Any]:
    """Nested dict to {"a/b/c": leaf}."""
    return traverse_util.flatten_dict(tree, sep="/")


def matching(pattern: str, paths: Iterable[str]) -> list[str]:
    """Paths that the regex matches in full, or that lie below a branch it matches.

    Raises:
      ValueError: the pattern is not a regex.
    """
    try:
        regex = re.compile(f"(?:{pattern})(?:/.*)?")
    except re.error as error:
        raise ValueError(f"pattern {pattern!r} is not a regex: {error}") from error
    return [path for path in paths if regex.fullmatch(path)]


def require(pattern: str, paths: Iterable[str]) -> list[str]:
    """`matching`, but a pattern that matches nothing is an error.

    Raises:
      ValueError: the pattern matches no path, or is not a regex.
    """
    paths = list(paths)
    if found := matching(pattern, paths):
        return found
    top = sorted({"/".join(path.split("/")[:2]) for path in paths})
    raise ValueError(
        f"pattern {pattern!r} matches no parameter. Patterns are regexes on whole "
        f'"/"-joined paths; the tree starts with: {", ".join(top) or "nothing"}'
    )


def select(params: Tree, patterns: Sequence[str]) -> Selection:
    """Leaves and layers named by patterns; several patterns add up.

    A pattern is a regex on "/"-joined paths, matched in full; one that names a branch
    means all below it. `layers` may carry a slice or list of layers:

        "connector"   "language/layers[0::4]"   "language/layers[1,3,5]/mlp/.*"

    Args:
      params: nested dict of arrays or `ShapeDtypeStruct`s; only shapes are read.
      patterns: none at all selects nothing.

    Raises:
      ValueError: a pattern matches nothing, is malformed, or names absent layers.
    """
    if isinstance(patterns, str):
        raise ValueError(f"patterns must be a list of strings; write [{patterns!r}]")
    flat = flatten(params)
    chosen: dict[str, set[int] | None] = {}
    for pattern in patterns:
        regex, spec = _parse(pattern)
        for path in require(regex, flat):
            if spec is None or chosen.get(path, ()) is None:
                chosen[path] = None
                continue
            layers = _layers(pattern, spec, path, flat[path].shape)
            chosen[path] = chosen.get(path, set()) | layers
    return Selection(
        tuple(
            (path, _whole_is_none(rows, flat[path].shape))
            for path, rows in sorted(chosen.items())
        )
    )


def split(params: Tree, selection: Selection) -> tuple[dict, dict]:
    """(learning, frozen). A partly selected stack is in both, each with its own rows.

    Arrays, or `ShapeDtypeStruct`s, which keep their sharding (the layer axis is never
    sharded).

    Raises:
      ValueError: the selection was made for another tree.
    """
    flat, rows_of = flatten(params), dict(selection.leaves)
    if absent := sorted(rows_of.keys() - flat.keys()):
        raise ValueError(
            f"selected parameters {absent[:3]} are not in the tree; call select() on "
            "the same parameters"
        )
    learning, frozen = {}, {}
    for path, leaf in flat.items():
        if path not in rows_of:
            frozen[path] = leaf
        elif (rows := rows_of[path]) is None:
            learning[path] = leaf
        else:
            runs = _runs(rows, leaf.shape[0])
            learning[path] = _take(leaf, [r for r, learns in runs if learns])
            frozen[path] = _take(leaf, [r for r, learns in runs if not learns])
    return _nest(learning), _nest(frozen)


def join(learning: Tree, frozen: Tree, selection: Selection) -> dict:
    """The inverse of `split`, bit for bit; static slices and concatenation, for jit.

    A stack of which only some rows learn takes the dtype of the frozen ones.

    Raises:
      ValueError: the halves do not belong to this selection.
    """
    flat, partly = _united(learning, frozen, selection)
    for path, (learns, rests, rows) in partly.items():
        flat[path] = _interleave(learns, rests, rows)
    return _nest(flat)


def beside(learning: Tree, frozen: Tree, selection: Selection) -> dict:
    """The same for a training step: nothing is copied, each half keeps its dtype.

    Stacked leaves are `Halves`, unless all of their layers learn.

    Raises:
      ValueError: the halves do not belong to this selection.
    """
    flat, partly = _united(learning, frozen, selection)
    for path, leaf in flat.items():
        if stacked(path) and path not in dict(selection.leaves):
            flat[path] = Halves((), leaf, ())
    for path, (learns, rests, rows) in partly.items():
        _check_length(learns, rows)
        flat[path] = Halves.of(learns, rests, rows)
    return _nest(flat)


def learning_layers(
    patterns: Sequence[str], paths: Mapping[str, Iterable[int]], depth: int
) -> tuple[int, ...]:
    """Layers of a stack of which anything learns, ascending.

    Args:
      patterns: as of `select`; here they may match nothing.
      paths: leaves of the stack, and the layers that have each.
      depth: layers of the stack.

    Raises:
      ValueError: a pattern is malformed, or names absent layers.
    """
    layers: set[int] = set()
    for pattern in patterns:
        regex, spec = _parse(pattern)
        for path in matching(regex, paths):
            named = set(range(depth))
            if spec is not None:
                named = _layers(pattern, spec, path, (depth,))
            layers |= named.intersection(paths[path])
    return tuple(sorted(layers))


def stacked(path: str) -> bool:
    """Whether a leaf has a layer axis."""
    return LAYERS in path.split("/")


def count(params: Tree, selection: Selection) -> Count:
    """Numbers of learning and frozen scalar parameters."""
    learning, frozen = jax.eval_shape(lambda p: split(p, selection), params)
    return Count(_size(learning), _size(frozen))


def mark(tree: Tree, function: Callable[[str], Any]) -> dict:
    """A tree of the same structure whose leaves are `function(path)`."""
    return _nest({path: function(path) for path in flatten(tree)})


def _parse(pattern: str) -> tuple[str, str | None]:
    specs = _SUFFIX.findall(pattern)
    if len(specs) > 1:
        raise ValueError(f"pattern {pattern!r} has {len(specs)} layer lists; use one")
    return _SUFFIX.sub(LAYERS, pattern), specs[0] if specs else None


def _layers(pattern: str, spec: str, path: str, shape: Sequence[int]) -> set[int]:
    if not stacked(path) or not shape:
        raise ValueError(
            f"pattern {pattern!r} asks for layers of {path!r}, which is not stacked; "
            f"drop [{spec}]"
        )
    every = range(shape[0])
    try:
        if ":" in spec:
            bounds = [int(part) if part.strip() else None for part in spec.split(":")]
            chosen = set(every[slice(*bounds)])
        else:
            chosen = {every[int(part)] for part in spec.split(",")}
    except (ValueError, TypeError, IndexError) as error:
        raise ValueError(
            f"pattern {pattern!r}: [{spec}] must be a slice such as [0::4] or a list "
            f"such as [1,3] of the {shape[0]} layers of {path!r}"
        ) from error
    if not chosen:
        raise ValueError(f"pattern {pattern!r} selects none of {shape[0]} layers")
    return chosen


def _whole_is_none(rows: set[int] | None, shape: Sequence[int]) -> Rows | None:
    return None if rows is None or len(rows) == shape[0] else tuple(sorted(rows))


def _runs(rows: Rows, total: int) -> list[tuple[slice, bool]]:
    """Contiguous runs of learning and frozen layers, in layer order."""
    learns, runs = set(rows), []
    for flag, group in itertools.groupby(range(total), learns.__contains__):
        run = list(group)
        runs.append((slice(run[0], run[-1] + 1), flag))
    return runs


def _take(leaf: Any, runs: Sequence[slice]) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        length = sum(run.stop - run.start for run in runs)
        return leaf.update(shape=(length, *leaf.shape[1:]))
    return jnp.concatenate([leaf[run] for run in runs])


def _united(
    learning: Tree, frozen: Tree, selection: Selection
) -> tuple[dict[str, Any], dict[str, tuple[Any, Any, Rows]]]:
    """Leaves by path, and both halves and the rows of those in which only some learn."""
    learns, rests = flatten(learning), flatten(frozen)
    rows_of = dict(selection.leaves)
    if wrong := sorted(learns.keys() ^ rows_of.keys()):
        raise ValueError(
            f"learning parameters and selection differ at {wrong[:3]}; split() with "
            "the same selection first"
        )
    partly = {
        path: (learns[path], rests[path], rows)
        for path, rows in rows_of.items()
        if rows is not None
    }
    return {**rests, **learns}, partly


def _check_length(learning: Any, rows: Rows) -> None:
    if learning.shape[0] != len(rows):
        raise ValueError(
            f"the selection has {len(rows)} learning layers and the leaf "
            f"{learning.shape[0]}; split() with the same selection first"
        )


def _interleave(learning: Any, frozen: Any, rows: Rows) -> Any:
    _check_length(learning, rows)
    total = learning.shape[0] + frozen.shape[0]
    if isinstance(learning, jax.ShapeDtypeStruct):
        return frozen.update(shape=(total, *frozen.shape[1:]))
    halves, start, pieces = (frozen, learning.astype(frozen.dtype)), [0, 0], []
    for run, learns in _runs(rows, total):
        stop = start[learns] + run.stop - run.start
        pieces.append(halves[learns][start[learns] : stop])
        start[learns] = stop
    return jnp.concatenate(pieces)


def _size(tree: Tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _nest(flat: Mapping[str, Any]) -> dict:
    return traverse_util.unflatten_dict(dict(flat), sep="/")
