"""Parameter trees from and to the tensors that others publish, driven by `Param` rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import einops
from flax import traverse_util
import numpy as np

from lmm_jax.nn.params import Param

Tree = Mapping[str, Any]


def from_published(
    tensors: Mapping[str, np.ndarray], rows: Sequence[Param], abstract: Tree
) -> dict[str, Any]:
    """Builds a parameter tree.

    Args:
        tensors: published name -> array in the published layout.
        rows: of the model.
        abstract: tree of shapes (`jax.eval_shape` of init); rows it lacks are skipped.

    Returns:
        Nested dict of NumPy arrays in the dtypes of `tensors`.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    shapes = flatten(abstract)
    out = {}
    for row in rows:
        if row.path not in shapes:
            continue
        shape = tuple(shapes[row.path].shape)
        sizes = dict(zip(row.axes.split(), shape))
        depth = sizes.pop("layers", None)
        keys = [row.key] if depth is None else _layered(row.key, depth)
        missing = [key for key in keys if key not in tensors]
        if missing:
            raise ValueError(
                f"{row.path} needs {missing[0]!r}, which the checkpoint lacks "
                f"({len(missing)} of its {len(keys)} tensors are missing): is it of "
                "another model, or a part of it only?"
            )
        axes = " ".join(name for name in row.axes.split() if name != "layers")
        parts = [
            _to_ours(tensors[key], row.layout, axes, sizes, key, row.path)
            for key in keys
        ]
        out[row.path] = parts[0] if depth is None else np.stack(parts)
    return traverse_util.unflatten_dict(out, sep="/")


def to_published(params: Tree, rows: Sequence[Param]) -> dict[str, np.ndarray]:
    """The inverse of `from_published`, bit for bit."""
    flat = flatten(params)
    out = {}
    for row in rows:
        if row.path not in flat:
            continue
        value = np.asarray(flat[row.path])
        axes = " ".join(name for name in row.axes.split() if name != "layers")
        pattern = f"{axes} -> {row.layout}"
        if row.axes.startswith("layers"):
            for key, layer in zip(_layered(row.key, len(value)), value):
                out[key] = einops.rearrange(layer, pattern)
        else:
            out[row.key] = einops.rearrange(value, pattern)
    return out


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


def _layered(key: str, depth: int) -> list[str]:
    return [key.replace("{layer}", str(layer)) for layer in range(depth)]


def _to_ours(tensor, layout, axes, sizes, key, path) -> np.ndarray:
    try:
        value = einops.rearrange(tensor, f"{layout} -> {axes}", **sizes)
    except einops.EinopsError as error:
        raise ValueError(
            f"{key!r} has shape {tuple(tensor.shape)}, but {path} wants ({layout}) with "
            f"{sizes}: the checkpoint is of a model of another size."
        ) from error
    if value.shape != tuple(sizes.values()):
        raise ValueError(
            f"{key!r} becomes {value.shape}, but {path} has shape "
            f"{tuple(sizes.values())}: the checkpoint is of a model of another size."
        )
    return value
