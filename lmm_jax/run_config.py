"""The config of a run directory, for commands that are given nothing else."""

from __future__ import annotations

from lmm_jax.config import completed
from lmm_jax.runs import load_run
from lmm_jax.sections import Sections


def get_config(workdir: str):
    """Reads `workdir`/config.json."""
    return completed(Sections, load_run(workdir))
