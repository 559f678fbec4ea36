"""Parameter trees from and to the tensors that others publish, driven by `Param` rows."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
import math
from typing import Any, Protocol

import einops
from flax import traverse_util
import jax
from jax.experimental import multihost_utils
import numpy as np
from tqdm import tqdm

from lmm_jax.nn.params import Param

Tree = Mapping[str, Any]
Index = tuple[slice, ...]


class Tensor(Protocol):
    """What a published tensor must offer: a NumPy array does, and so does one that is
    still on disk."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def __getitem__(self, index: Index) -> np.ndarray: ...


def from_published(
    tensors: Mapping[str, Tensor],
    rows: Sequence[Param],
    abstract: Tree,
    *,
    cast: bool = True,
) -> dict[str, Any]:
    """Builds a parameter tree, reading no more than this process holds of it.

    On a terminal it shows how far it is.

    Args:
        tensors: published name -> tensor in the published layout.
        rows: of the model.
        abstract: tree of shapes and dtypes (`jax.eval_shape` of init); rows it lacks are
            skipped.
        cast: whether arrays on devices take the dtypes of `abstract`.

    Returns:
        Nested dict: arrays on their devices where `abstract` names a sharding, otherwise
        NumPy arrays; uncast and in NumPy, in the dtypes of `tensors`.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    shapes = flatten(abstract)
    found = [(row, shapes[row.path]) for row in rows if row.path in shapes]
    for row, leaf in found:
        _check(tensors, row, tuple(leaf.shape))
    out = {
        row.path: _load(tensors, row, leaf, cast)
        for row, leaf in progress(found, "reading", "parameter")
    }
    return traverse_util.unflatten_dict(out, sep="/")


def to_published(params: Tree, rows: Sequence[Param]) -> dict[str, np.ndarray]:
    """The inverse of `from_published`, bit for bit."""
    return dict(published(params, rows))


def published(params: Tree, rows: Sequence[Param]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, tensor) one by one, so that no second copy of a model is needed.

    Parameters spread over several processes are gathered, so all must consume it.
    """
    flat = flatten(params)
    for row in rows:
        if row.path not in flat:
            continue
        value, pattern = flat[row.path], f"{_inner(row)} -> {row.layout}"
        stacked = row.axes.startswith("layers")
        for layer, key in enumerate(_keys(row, value.shape)):
            part = _host(value[layer] if stacked else value)
            yield key, np.ascontiguousarray(einops.rearrange(part, pattern))


def progress(items: Collection | Iterator, what: str, unit: str, total=None) -> Any:
    """The same items, with a bar where process 0 has a terminal."""
    hidden = True if jax.process_index() else None
    return tqdm(items, desc=what, unit=unit, total=total, disable=hidden)


def names(rows: Sequence[Param], abstract: Tree) -> set[str]:
    """The published names of all parameters in a tree."""
    shapes = flatten(abstract)
    found = (_keys(row, shapes[row.path].shape) for row in rows if row.path in shapes)
    return {key for keys in found for key in keys}


def flatten(tree: Tree) -> dict[str, Any]:
    """ "/"-joined path -> leaf."""
    return traverse_util.flatten_dict(tree, sep="/")


def check_rows(rows: Sequence[Param], abstract: Tree) -> None:
    """Asserts that rows and parameters match one to one, axis by axis.

    Raises:
        ValueError: names what only one of them has.
    """
    flat = flatten(abstract)
    known = {row.path: row for row in rows}
    only = sorted(set(flat) ^ set(known))
    if only:
        raise ValueError(f"parameters and rows differ in {', '.join(only)}.")
    for path, row in known.items():
        if len(row.axes.split()) != len(flat[path].shape):
            raise ValueError(
                f"{path} has shape {flat[path].shape} but axes {row.axes!r}."
            )


def _keys(row: Param, shape: Sequence[int]) -> list[str]:
    if not row.axes.startswith("layers"):
        return [row.key]
    layers = range(shape[0]) if row.layers is None else row.layers
    return [row.key.replace("{layer}", str(layer)) for layer in layers]


def _inner(row: Param) -> str:
    """The axes of one layer."""
    return row.axes.removeprefix("layers ")


def _check(tensors: Mapping[str, Tensor], row: Param, shape: tuple[int, ...]) -> None:
    keys = _keys(row, shape)
    missing = [key for key in keys if key not in tensors]
    if missing:
        raise ValueError(
            f"{row.path} needs {missing[0]!r}, which the checkpoint lacks "
            f"({len(missing)} of its {len(keys)} tensors are missing): is it of "
            "another model, or is this part in a folder of its own (init.vision, "
            "init.language)?"
        )
    sizes = dict(zip(row.axes.split(), shape))
    wanted = tuple(math.prod(sizes[a] for a in group) for group in _groups(row.layout))
    for key in keys:
        if tuple(tensors[key].shape) != wanted:
            raise ValueError(
                f"{key!r} has shape {tuple(tensors[key].shape)}, but {row.path} wants "
                f"({row.layout}) = {wanted}: the checkpoint is of a model of another size."
            )


def _host(value: Any) -> np.ndarray:
    if getattr(value, "is_fully_addressable", True):
        return np.asarray(value)
    return multihost_utils.process_allgather(value, tiled=True)


def _load(tensors: Mapping[str, Tensor], row: Param, leaf: Any, cast: bool) -> Any:
    shape = tuple(leaf.shape)
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        return _read(tensors, row, shape, tuple(slice(0, n) for n in shape))
    read = {}  # several devices may hold the same part

    def part(index: Index) -> np.ndarray:
        whole = tuple(slice(*s.indices(n)) for s, n in zip(index, shape))
        known = tuple((s.start, s.stop) for s in whole)
        if known not in read:
            value = _read(tensors, row, shape, whole)
            read[known] = value.astype(leaf.dtype) if cast else value
        return read[known]

    return jax.make_array_from_callback(shape, sharding, part)


def _read(
    tensors: Mapping[str, Tensor], row: Param, shape: tuple[int, ...], index: Index
) -> np.ndarray:
    """The part `index` of a parameter, from the parts of its tensors that hold it."""
    keys = _keys(row, shape)
    if row.axes.startswith("layers"):
        layers, *inner = index
        parts = [_read_one(tensors[k], row, shape[1:], inner) for k in keys[layers]]
        return np.stack(parts)
    return _read_one(tensors[keys[0]], row, shape, index)


def _read_one(
    tensor: Tensor, row: Param, shape: Sequence[int], index: Sequence[slice]
) -> np.ndarray:
    names = _inner(row).split()
    size, wanted = dict(zip(names, shape)), dict(zip(names, index))
    have, left, cut = {}, {}, []
    for first, *rest in _groups(row.layout):
        # Within a merged dimension only a range of its first axis is contiguous.
        stride = math.prod(size[name] for name in rest)
        rows = wanted[first]
        cut.append(slice(rows.start * stride, rows.stop * stride))
        have |= {first: rows.stop - rows.start, **{name: size[name] for name in rest}}
        left |= {first: slice(None), **{name: wanted[name] for name in rest}}
    read = einops.rearrange(
        tensor[tuple(cut)], f"{row.layout} -> {' '.join(names)}", **have
    )
    return read[tuple(left[name] for name in names)]


def _groups(layout: str) -> list[list[str]]:
    """Axes of each published dimension: "(a b) c" is [[a, b], [c]]."""
    groups, merged = [], False
    for word in layout.replace("(", "( ").replace(")", " )").split():
        if word == "(":
            groups.append([])
            merged = True
        elif word == ")":
            merged = False
        elif merged:
            groups[-1].append(word)
        else:
            groups.append([word])
    return groups
