"""Processes and meshes."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import math
import os

import jax
from jax.sharding import AxisType, Mesh


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one of them may be -1: all that remain.

    Attributes:
        data: rows are divided among them, parameters are not.
        fsdp: rows and parameters are.
        context: tokens of a row are, and parameters too.
        tensor: heads, the width of MLPs and the vocabulary are.
    """

    data: int = 1
    fsdp: int = -1
    context: int = 1
    tensor: int = 1


AXES = tuple(field.name for field in dataclasses.fields(MeshConfig))


def start_processes() -> None:
    """Joins the other processes of a job, if the environment says there are any.

    LMM_JAX_COORDINATOR, LMM_JAX_PROCESSES and LMM_JAX_PROCESS_ID name them explicitly; on
    TPU pods, GKE and SLURM they are found by `jax.distributed` itself when
    LMM_JAX_DISTRIBUTED is set. A process that is silent for LMM_JAX_HEARTBEAT seconds
    (100) is lost, and all others end. Must run before any device is touched.
    """
    coordinator = os.environ.get("LMM_JAX_COORDINATOR")
    patience = int(os.environ.get("LMM_JAX_HEARTBEAT", "100"))
    if coordinator:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            coordinator,
            int(os.environ["LMM_JAX_PROCESSES"]),
            int(os.environ["LMM_JAX_PROCESS_ID"]),
            heartbeat_timeout_seconds=patience,
        )
    elif os.environ.get("LMM_JAX_DISTRIBUTED"):
        jax.distributed.initialize(heartbeat_timeout_seconds=patience)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Builds the mesh.

    Raises:
        ValueError: the axes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = dataclasses.asdict(config)
    fixed = math.prod(size for size in sizes.values() if size > 0)
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or len(devices) % fixed or (not free and fixed != len(devices)):
        raise ValueError(
            f"mesh {sizes} does not fit {len(devices)} devices: the axes must multiply "
            "to that number, and one of them may be -1 (all that remain)."
        )
    shape = tuple(
        len(devices) // fixed if size == -1 else size for size in sizes.values()
    )
    # Auto axes: under explicit ones, jax.make_mesh's default, a constraint only asserts.
    return jax.make_mesh(
        shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )
