"""TPU slices by name, and what their chips can do.

Peak FLOP/s, memory and bandwidths are those of the product pages,
https://docs.cloud.google.com/tpu/docs (v4, v5e, v5p, v6e: "system architecture").
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import math
import os
import re
from typing import Any

from jax.experimental import topologies
import numpy as np


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip.

    Attributes:
        flops: bfloat16, a second.
        memory: GiB of HBM.
        bandwidth: bytes a second of HBM.
        link: bytes a second through one ICI port in one direction; the pages give the sum
            over 2 directions of all ports.
        axes: of the torus, 2 ports each.
        ring: an axis wraps around where its side is a multiple of this.
        cores: that a product name counts for each chip.
    """

    flops: float
    memory: float
    bandwidth: float
    link: float
    axes: int
    ring: int
    cores: int = 1


CHIPS = {
    "v4": Chip(275e12, 32, 1228e9, 50e9, axes=3, ring=4, cores=2),
    "v5e": Chip(197e12, 16, 819e9, 50e9, axes=2, ring=16),
    "v5p": Chip(459e12, 95, 2765e9, 100e9, axes=3, ring=4, cores=2),
    "v6e": Chip(918e12, 32, 1638e9, 100e9, axes=2, ring=16),
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips in a torus, or in a part of one.

    Attributes:
        generation: a key of `CHIPS`.
        shape: chips along each axis.
    """

    generation: str
    shape: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        return CHIPS[self.generation]

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.generation}:{'x'.join(map(str, self.shape))}"

    def devices(self) -> tuple[Any, ...]:
        """Described by the TPU compiler; no TPU is needed.

        Raises:
            ValueError: there is no TPU compiler, or no such slice.
        """
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # nobody to ask about a TPU
        try:
            described = topologies.get_topology_desc(str(self), "tpu")
        except Exception as error:  # whatever the plugin raises
            raise ValueError(
                f"no description of {self}: {error}; the TPU compiler comes with "
                "pip install 'jax[tpu]', and one process may use it at a time."
            ) from error
        return tuple(described.devices)

    def speed(self, group: Sequence[Any]) -> float:
        """Bytes a second that each chip of a group can receive from the others, along all
        axes on which they differ: 2 ports an axis where it is a ring, else 1, shared with
        the groups in between."""
        ports = 0.0
        for places, side in zip(np.array([x.coords for x in group]).T, self.shape):
            places = np.unique(places)
            if len(places) > 1:
                step = int(places[1] - places[0])
                ring = len(places) * step == side and side % self.chip.ring == 0
                ports += (1 + ring) / step
        return self.chip.link * (ports or 1.0)


def named(name: str) -> Slice:
    """The slice of a topology (`v5e:16x16`) or of a product name (`v5e-256`).

    Product names of v4 and v5p count TensorCores, two a chip: `v5p-128` has 64 chips.

    Raises:
        ValueError: an unknown generation, or neither form.
    """
    found = re.fullmatch(r"(\w+)(?::(\d+(?:x\d+)*)|-(\d+))", name)
    if not found or found[1] not in CHIPS:
        raise ValueError(
            f"topology {name!r}: use GENERATION:SHAPE, for example v5e:16x16, or a product "
            f"name such as v5e-256, with a generation of {', '.join(CHIPS)}."
        )
    generation, shape, cores = found.groups()
    if shape:
        return Slice(generation, tuple(map(int, shape.split("x"))))
    chip = CHIPS[generation]
    chips, rest = divmod(int(cores), chip.cores)
    least = 4 if chip.axes == 3 else 1
    if rest or chips < least or chips & (chips - 1):
        raise ValueError(
            f"product {name!r}: the number must be a power of two from "
            f"{least * chip.cores} on; other slices are named by their shape, such as "
            f"{generation}:{'x'.join(['4'] * chip.axes)}."
        )
    return Slice(generation, _balanced(chips, chip.axes))


def _balanced(chips: int, axes: int) -> tuple[int, ...]:
    """The standard shape: sides as equal as powers of two can be, ones last."""
    power, sides = chips.bit_length() - 1, []
    for left in range(axes, 0, -1):
        sides.append(2 ** (power // left))
        power -= power // left
    return tuple(sorted(sides, key=lambda side: (side == 1, side)))
