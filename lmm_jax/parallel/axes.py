"""From axis names to shardings: one rule per name, for parameters and activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import math
from typing import Any

from flax import traverse_util
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from lmm_jax.nn.params import Param

Array = jax.Array
Rules = tuple[tuple[str, tuple[str, ...]], ...]

# "embed" is the width of parameters; activations keep theirs whole ("act_embed" has no
# rule), so FSDP gathers weights and never activations. "act_heads" are those of attention
# while it has all tokens of a row ("row" has no rule either).
RULES: Rules = (
    ("batch", ("data", "fsdp")),
    ("views", ("data", "fsdp", "context")),
    ("tokens", ("context",)),
    ("embed", ("fsdp", "context")),
    ("vision_embed", ("fsdp", "context")),
    ("vocab", ("tensor",)),
    ("heads", ("tensor",)),
    ("act_heads", ("tensor", "context")),
    ("kv_heads", ("tensor",)),
    ("mlp", ("tensor",)),
)


@dataclasses.dataclass(frozen=True)
class Axes:
    """A mesh and the rules that map axis names to its axes. Hashable.

    An axis without a rule is replicated; "layers" never has one.
    """

    mesh: Mesh
    rules: Rules = RULES

    @property
    def platform(self) -> str:
        return self.mesh.devices.flat[0].platform

    def spec(self, names: str, shape: Sequence[int] | None = None) -> PartitionSpec:
        """Partition of an array whose axes are called `names` (space-separated).

        A mesh axis is used once per array, by the first name that claims it. With
        `shape`, mesh axes that do not divide evenly are left out, last ones first (two key
        heads on a mesh of four, the vocabulary of a tiny model).
        """
        rules, used, parts = dict(self.rules), set(), []
        for i, name in enumerate(names.split()):
            left = (a for a in rules.get(name, ()) if a not in used)
            axes = tuple(a for a in left if self.mesh.shape[a] > 1)
            while shape is not None and shape[i] % self._devices(axes):
                axes = axes[:-1]
            used.update(axes)
            parts.append(axes if len(axes) > 1 else next(iter(axes), None))
        return PartitionSpec(*parts)

    def parts(self, name: str) -> int:
        """Into how many an axis of that name is divided."""
        return self._devices(dict(self.rules).get(name, ()))

    def sharding(
        self, names: str = "", shape: Sequence[int] | None = None
    ) -> NamedSharding:
        return NamedSharding(self.mesh, self.spec(names, shape))

    def constrain(self, x: Array, names: str) -> Array:
        """Pins an activation inside a compiled function."""
        return jax.lax.with_sharding_constraint(x, self.sharding(names, x.shape))

    def mapped(
        self, run: Callable[..., Array], inputs: tuple[str, ...], output: str
    ) -> Callable[..., Array]:
        """`run` on each device's share of its arguments, for kernels that the compiler
        cannot divide. Axes are named as elsewhere; a result has the shape of the first
        argument."""

        def whole(*arrays):
            specs = tuple(self.spec(n, x.shape) for n, x in zip(inputs, arrays))
            out = self.spec(output, arrays[0].shape)
            one = jax.shard_map(
                run, mesh=self.mesh, in_specs=specs, out_specs=out, check_vma=False
            )
            return one(*arrays)

        return whole

    def batch(self, batch: Mapping[str, Any]) -> dict[str, NamedSharding]:
        """Shardings of a global batch: rows over the data axes.

        A batch that they do not divide, such as a single prompt, is held by every device.
        """
        return {name: self.sharding("batch", x.shape[:1]) for name, x in batch.items()}

    def own_rows(self, size: int) -> np.ndarray:
        """Rows of a global batch of `size` that devices of this process hold, ascending.

        They need not be neighbours, and where a mesh axis of tensors spans processes,
        several of them hold the same.

        Raises:
            ValueError: several processes, and a batch that the mesh does not divide.
        """
        unit = self.parts("batch")
        if jax.process_count() > 1 and size % unit:
            raise ValueError(
                f"a batch of {size} for {unit} shards of the mesh, on "
                f"{jax.process_count()} processes: use a multiple of {unit}."
            )
        held = self.sharding("batch", (size,)).addressable_devices_indices_map((size,))
        rows = [np.arange(size)[index] for index in held.values()]
        return np.unique(np.concatenate(rows))

    def place(self, rows: Mapping[str, np.ndarray]) -> dict[str, Array]:
        """Global arrays of a batch of which every process gives its `own_rows`."""
        if jax.process_count() == 1:
            return jax.device_put(dict(rows), self.batch(rows))
        unit = self.parts("batch")
        length = len(next(iter(rows.values())))
        size = length * unit // len(self.own_rows(unit))
        own = self.own_rows(size)

        def placed(x: np.ndarray) -> Array:
            def part(index):
                start, stop, _ = index[0].indices(size)
                return x[np.searchsorted(own, start) :][: stop - start]

            shape = size, *x.shape[1:]
            return jax.make_array_from_callback(
                shape, self.sharding("batch", shape), part
            )

        return {name: placed(x) for name, x in rows.items()}

    def whole(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """Global arrays, whole on every device, so that every process can read them. Not
        waited for."""
        return _same(dict(batch), self.sharding())

    def read(
        self, held: Mapping[str, Any], rows: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, Any]:
        """Global arrays, and all rows of batches of which every process has its own, on
        the host."""
        return jax.device_get(
            self.whole({**held, **(self.place(rows) if rows else {})})
        )

    def params(self, abstract: Mapping[str, Any], rows: Sequence[Param]) -> Any:
        """Shardings of a parameter tree, from its rows.

        Raises:
            ValueError: a parameter has no row.
        """
        names = {row.path: row.axes for row in rows}
        flat = traverse_util.flatten_dict(abstract, sep="/")
        missing = sorted(set(flat) - set(names))
        missing = [path for path in missing if not path.startswith("strategy_")]
        if missing:
            raise ValueError(
                f"no parameter row for {', '.join(missing)}; add it to the table of its "
                "model file."
            )
        shardings = {
            path: self.sharding(names.get(path, ""), leaf.shape)
            for path, leaf in flat.items()
        }
        return traverse_util.unflatten_dict(shardings, sep="/")

    def _devices(self, axes: Sequence[str]) -> int:
        return math.prod(self.mesh.shape[axis] for axis in axes)


@dataclasses.dataclass(frozen=True)
class Pins:
    """`Axes.constrain` as a value. Bound methods of equal axes are unequal, and so would be
    the models that hold them: each of them would be traced anew."""

    axes: Axes

    def __call__(self, x: Array, names: str) -> Array:
        return self.axes.constrain(x, names)


@functools.partial(jax.jit, static_argnums=1)
def _same(tree, sharding: NamedSharding):
    return jax.lax.with_sharding_constraint(tree, sharding)
