"""Training state on disk: Orbax checkpoints, always restored against an abstract tree.

    workdir/checkpoints/STEP/{state,meta}    state, a JSON object
    workdir/frozen                           parameters that never change, once

The place in the data is the step (`lmm_jax.data.pipeline.train_batches`).
An abstract tree has a `jax.ShapeDtypeStruct` with a sharding for every array. Its mesh
is today's, so a run may go on with another number of devices. Directories without
Orbax's commit marker or with a temporary name, as a killed save leaves them, are not
checkpoints and are never read. Work directories may be gs:// paths.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import contextlib
import logging
from os import PathLike
from typing import Any, NamedTuple

from etils import epath
import jax
import orbax.checkpoint as ocp

from lmm_jax.checkpoint.compare import CheckpointError, check

Tree = Any
_EXACT = ("shape", "dtype")
_CAST = ("shape",)


class Restored(NamedTuple):
    """A full checkpoint. `meta` is the JSON object saved with it, {} if none."""

    step: int
    state: Tree
    meta: dict[str, Any]


class CheckpointReader:
    """Reads the checkpoints of a run that may still be training; never writes."""

    def __init__(self, workdir: str | PathLike) -> None:
        """Opens the work directory of a run.

        Raises:
          CheckpointError: it has no finished checkpoint.
        """
        options = ocp.CheckpointManagerOptions(
            create=False, enable_async_checkpointing=False
        )
        self._open(workdir, options)
        self.resolve(None)

    @property
    def latest_step(self) -> int | None:
        """The newest finished checkpoint on disk, None if there is none."""
        return max(self.steps, default=None)

    @property
    def steps(self) -> list[int]:
        """Finished checkpoints on disk, ascending."""
        self._manager.reload()
        return sorted(self._manager.all_steps())

    def resolve(self, step: int | None) -> int:
        """The given step or the latest, as long as it exists.

        Raises:
          CheckpointError: no such checkpoint.
        """
        steps = self.steps
        if not steps:
            raise CheckpointError(
                f"no finished checkpoint in {self._workdir}; is it a run's directory?"
            )
        if step is not None and step not in steps:
            raise CheckpointError(
                f"no checkpoint of step {step} in {self._workdir}; there are {steps}"
            )
        return steps[-1] if step is None else step

    def restore(self, abstract: Tree, *, step: int | None = None) -> Restored:
        """The state of `step`, by default the latest, on the shardings of `abstract`.

        Args:
          abstract: the state's tree; same paths, shapes and dtypes as the saved one.

        Raises:
          CheckpointError: nothing to restore, or the state is another one; the message
            has the first differences.
        """
        step = self.resolve(step)
        saved = self._manager.item_metadata(step)
        check(abstract, saved["state"].tree, where=self._where(step), attributes=_EXACT)
        items = {"state": _restore_args(abstract)}
        if "meta" in saved:
            items["meta"] = ocp.args.JsonRestore()
        with _explained(f"reading {self._where(step)} failed"):
            found = self._manager.restore(step, args=ocp.args.Composite(**items))
        return Restored(step, found["state"], dict(found.get("meta") or {}))

    def restore_part(
        self, abstract: Tree, part: str, *, step: int | None = None
    ) -> Tree:
        """One branch of the state, such as "params" or "params/connector".

        The rest, above all the optimizer's state, is not read. Values are cast to the
        dtypes of `abstract`.

        Raises:
          CheckpointError: nothing to restore, or the branch is another one.
        """
        step = self.resolve(step)
        for name in reversed(part.split("/")):
            abstract = {name: abstract}
        saved = self._manager.item_metadata(step)["state"].tree
        where, inside = self._where(step), f"{part}/"
        check(abstract, saved, where=where, attributes=_CAST, inside=inside)
        items = ocp.args.Composite(state=_restore_args(abstract, partial=True))
        with _explained(f"reading {self._where(step)} failed"):
            tree = self._manager.restore(step, args=items)["state"]
        for name in part.split("/"):
            tree = tree[name]
        return tree

    def dtypes(self, part: str) -> Tree:
        """The dtypes in which one branch of the latest state is stored."""
        tree = self._manager.item_metadata(self.resolve(None))["state"].tree
        for name in part.split("/"):
            tree = tree[name]
        return jax.tree.map(lambda leaf: leaf.dtype, tree)

    def restore_frozen(self, abstract: Tree) -> Tree:
        """What `save_frozen` wrote, cast to the dtypes of `abstract`.

        Raises:
          CheckpointError: nothing there, or the tree is another one.
        """
        path = self._workdir / "frozen"
        if not path.exists():
            raise CheckpointError(f"no frozen parameters at {path}; load them anew")
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            saved = checkpointer.metadata(path).item_metadata.tree
            check(abstract, saved, where=path, attributes=_CAST)
            return checkpointer.restore(path, args=_restore_args(abstract))

    def close(self) -> None:
        """Stops the background threads."""
        self._manager.close()

    def _open(
        self, workdir: str | PathLike, options: ocp.CheckpointManagerOptions
    ) -> None:
        logging.getLogger("absl").addFilter(_worth_reading)  # twice is like once
        self._workdir = epath.Path(workdir).expanduser().resolve()
        handlers = {
            "state": ocp.PyTreeCheckpointHandler(),
            "meta": ocp.JsonCheckpointHandler(),
        }
        with _explained(f"opening checkpoints in {self._workdir} failed"):
            self._manager = ocp.CheckpointManager(
                self._workdir / "checkpoints", options=options, item_handlers=handlers
            )

    def _where(self, step: int) -> epath.Path:
        return self._workdir / "checkpoints" / str(step)


class Checkpoints(CheckpointReader):
    """The checkpoints of a run that writes them.

    Attributes:
      every: steps between two checkpoints, see `due`.
    """

    def __init__(
        self, workdir: str | PathLike, *, keep: int = 3, every: int = 1000
    ) -> None:
        """Creates the directory and clears what killed saves left in it.

        Args:
          keep: so many of the newest checkpoints stay.

        Raises:
          CheckpointError: the directory cannot be created.
          ValueError: `keep` or `every` is below 1.
        """
        if keep < 1 or every < 1:
            raise ValueError(f"keep={keep} and every={every} must be at least 1")
        self.every = every
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, cleanup_tmp_directories=True
        )
        self._open(workdir, options)

    def due(self, step: int) -> bool:
        """True every `every` steps."""
        return step % self.every == 0

    def save(
        self,
        step: int,
        state: Tree,
        *,
        meta: Mapping[str, Any] | None = None,
    ) -> None:
        """Starts writing in the background; `state` may be donated when this returns.

        Waits for the previous save first and reports its failure.

        Args:
          step: finished steps; not yet on disk.
          state: nested dict, tuple or flax.struct dataclass of jax Arrays.
          meta: what JSON can hold.

        Raises:
          CheckpointError: this or the previous save failed; older ones are intact.
        """
        items = {"state": ocp.args.PyTreeSave(state)}
        if meta is not None:
            items["meta"] = ocp.args.JsonSave(dict(meta))
        with self._saving():
            self._manager.wait_until_finished()
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def save_frozen(self, tree: Tree) -> None:
        """Writes what never changes. Beside a checkpoint it only checks that it fits.

        Without a checkpoint, what an earlier start left there is replaced.

        Raises:
          CheckpointError: writing failed, or other frozen parameters are there.
        """
        path = self._workdir / "frozen"
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            if path.exists() and self.steps:
                saved = checkpointer.metadata(path).item_metadata.tree
                check(tree, saved, where=path, attributes=_EXACT)
                return
            with self._saving():
                checkpointer.save(path, args=ocp.args.PyTreeSave(tree), force=True)

    def wait(self) -> None:
        """Returns when the last save is on disk.

        Raises:
          CheckpointError: it failed; older ones are intact.
        """
        with self._saving():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then stops the background threads; raises as `wait`."""
        # Orbax waits for the cleaning it starts with only when it saves.
        cleaning = getattr(self._manager, "_cleanup_tmp_directory_future", None)
        try:
            self.wait()
            if cleaning is not None:
                cleaning.result()
        finally:
            super().close()

    def _saving(self) -> contextlib.AbstractContextManager[None]:
        return _explained(
            f"saving to {self._workdir} failed; older checkpoints are intact. Make "
            "room or set permissions there and start the same command again"
        )


@contextlib.contextmanager
def _explained(text: str) -> Iterator[None]:
    try:
        yield
    # Orbax and TensorStore report a full disk as OSError, ValueError or bare Exception.
    except Exception as error:
        raise CheckpointError(f"{text}: {type(error).__name__}: {error}") from error


def _restore_args(abstract: Tree, *, partial: bool = False) -> ocp.args.PyTreeRestore:
    return ocp.args.PyTreeRestore(
        item=abstract,
        restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
        partial_restore=partial,
    )


def _worth_reading(record: logging.LogRecord) -> bool:
    """Drops Orbax's dozens of INFO lines per save; its warnings and ours stay."""
    chatty = "orbax" in record.pathname or "grain" in record.pathname
    return record.levelno >= logging.WARNING or not chatty
