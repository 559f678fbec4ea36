"""Does a checkpoint fit the tree that is asked for? Compared by path, before reading."""

from __future__ import annotations

from os import PathLike
from typing import Any

import jax

Tree = Any
SHOWN = 8


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, found, or does not fit what is asked for."""


def check(
    wanted: Tree,
    found: Tree,
    *,
    where: PathLike,
    attributes: tuple[str, ...],
    inside: str = "",
) -> None:
    """Passes if the trees agree; arguments as in `differences`.

    Raises:
      CheckpointError: they do not; names `where` and the first differences. Or a leaf
        of `wanted` has no sharding.
    """
    for path, leaf in by_path(wanted).items():
        if getattr(leaf, "sharding", None) is None:
            raise CheckpointError(f"{path!r} has no sharding; give one to every array")
    lines = differences(wanted, found, attributes=attributes, inside=inside)
    if lines:
        more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        listed = "\n  ".join(lines[:SHOWN] + more)
        raise CheckpointError(
            f"{where} is a checkpoint of another model or optimizer:\n  {listed}\n"
            "Use the config of that run, or another work directory and initialise from "
            "its parameters."
        )


def by_path(tree: Tree) -> dict[str, Any]:
    """{"params/connector/kernel": leaf}, in the tree's order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    keystr = jax.tree_util.keystr
    return {keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def differences(
    wanted: Tree, found: Tree, *, attributes: tuple[str, ...], inside: str = ""
) -> list[str]:
    """One line per path that is missing, left over or of other `attributes`.

    Args:
      wanted, found: trees of anything with the attributes: arrays, abstract arrays,
        Orbax metadata.
      attributes: what must be equal: "shape", "dtype".
      inside: only paths of `found` with this beginning count.
    """

    def text(leaf: Any) -> str:
        return " ".join(str(getattr(leaf, name)) for name in attributes)

    want = {path: text(leaf) for path, leaf in by_path(wanted).items()}
    have = {path: text(leaf) for path, leaf in by_path(found).items()}
    have = {path: leaf for path, leaf in have.items() if path.startswith(inside)}
    lines = []
    for path in sorted(want.keys() | have.keys()):
        if path not in have:
            lines.append(f"{path}: not in the checkpoint, want {want[path]}")
        elif path not in want:
            lines.append(f"{path}: only in the checkpoint, {have[path]}")
        elif have[path] != want[path]:
            lines.append(f"{path}: found {have[path]}, want {want[path]}")
    return lines
