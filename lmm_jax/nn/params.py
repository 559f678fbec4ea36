"""One row says everything about one parameter: where it is, how it is sharded, and how
it is called and laid out in the checkpoints that others publish."""

from __future__ import annotations

import dataclasses

from lmm_jax.depth import Plan


@dataclasses.dataclass(frozen=True)
class Param:
    """A parameter.

    Attributes:
        path: "/"-joined path in the parameter tree.
        axes: our axis names in order; sharding rules map them to mesh axes. A leading
            "layers" axis stacks the layers.
        key: name in the published checkpoint; `{layer}` runs over the layers. Empty if
            no published checkpoint has it.
        layout: the same axes as an einops pattern in the published order.
        layers: of a stacked parameter, the layers that have it; None: all.
    """

    path: str
    axes: str
    key: str
    layout: str
    layers: tuple[int, ...] | None = None

    def under(self, path: str, key: str) -> Param:
        """The same parameter inside a larger model."""
        return dataclasses.replace(self, path=path + self.path, key=key + self.key)


def of_ops(plan: Plan) -> tuple[Param, ...]:
    """Rows of the ops that have some; another's parameters are whole on every device."""
    found = []
    for edit in plan.edits:
        rows = getattr(getattr(edit, "op", None), "params", tuple)()
        found += [row.under(f"strategy_{edit.name}/", "") for row in rows]
    return tuple(found)
