"""Compiles a training step for a TPU slice that is not there: does it fit?

    python -m lmm_jax.aot --config=configs/deepstack.py --topology=v5e:16x16 \\
        --config.mesh.tensor=2

Needs the TPU compiler (`pip install libtpu`) and no TPU: shapes and shardings go in, the
memory of one chip comes out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import math
import os
import time
from typing import Any

from absl import flags
import jax
from jax.experimental import topologies

from lmm_jax import cli, experiment, train
from lmm_jax.experiment import Experiment

HBM = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}  # GiB a chip, of the product pages


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one chip.

    Attributes:
        held: by kind, what stays between steps.
        temporary: what a step needs beside it, at its peak.
    """

    held: Mapping[str, int]
    temporary: int

    @property
    def total(self) -> int:
        return sum(self.held.values()) + self.temporary


def slice_devices(topology: str) -> tuple[Any, ...]:
    """Devices of a slice such as "v5e:16x16".

    Raises:
        ValueError: an unknown generation or shape, or no TPU compiler.
    """
    generation, _, shape = topology.partition(":")
    if generation not in HBM or not shape:
        raise ValueError(
            f"topology {topology!r}: use GENERATION:SHAPE, for example v5e:16x16, with a "
            f"generation of {', '.join(HBM)}."
        )
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # nobody to ask about a real TPU
    try:
        described = topologies.get_topology_desc(topology, "tpu")
    except Exception as error:  # whatever the plugin raises
        raise ValueError(
            f"no description of {topology}: {error}; the TPU compiler comes with "
            "pip install libtpu, and one process may use it at a time."
        ) from error
    return tuple(described.devices)


def compiled(exp: Experiment) -> tuple[jax.stages.Compiled, Memory]:
    """The update of an experiment, compiled for its devices from shapes alone."""
    parts = train.make_parts(exp)
    batch = exp.abstract_batch(parts.model)
    placed = jax.tree.map(
        lambda x, s: x.update(sharding=s), batch, exp.axes.batch(batch)
    )
    state, frozen = parts.abstract_state, parts.abstract_frozen
    program = parts.update.lower(state, frozen, placed).compile()
    held = {
        "parameters that learn": _bytes(state.learning),
        "optimizer state": _bytes(state.opt_state),
        "frozen parameters": _bytes(frozen),
        "batch": _bytes(placed),
    }
    return program, Memory(held, program.memory_analysis().temp_size_in_bytes)


def _bytes(tree: Any) -> int:
    """On one device, of shapes with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def table(memory: Memory, available: int) -> str:
    """Memory by kind, in GiB, and whether it fits."""
    rows = [*memory.held.items(), ("activations and gradients", memory.temporary)]
    lines = [f"{name:26}{size / 2**30:8.2f} GiB" for name, size in rows]
    fits = memory.total <= available
    remedy = "fits" if fits else "does not fit: more chips, smaller batch, mesh.tensor"
    lines.append(
        f"{'of one chip':26}{memory.total / 2**30:8.2f} GiB of "
        f"{available / 2**30:.0f}: {remedy}"
    )
    return "\n".join(lines)


def main(argv: Sequence[str], config) -> None:
    topology = flags.FLAGS.topology
    exp = experiment.build(config, slice_devices(topology))
    start = time.perf_counter()
    _, memory = compiled(exp)
    batch = exp.config.data.batch_size
    print(f"{exp.config.name}: {exp.called}, a training step of {batch} on {topology}")
    print(f"compiled in {time.perf_counter() - start:.0f} s")
    print(table(memory, HBM[topology.partition(":")[0]] * 2**30))


if __name__ == "__main__":
    flags.DEFINE_string("topology", "v5e:16x16", "Generation and shape of the slice.")
    cli.run(main)
