"""The config of a run directory, for commands that are given nothing else."""

from __future__ import annotations

from lmm_jax.runs import load_run


def get_config(workdir: str):
    """Reads `workdir`/config.json."""
    return load_run(workdir)
