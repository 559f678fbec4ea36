"""Several processes train like one; they end together and go on as another number."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from lmm_jax import train
from tests import flags
from tests.small import small_config, write_config

REPOSITORY = Path(__file__).parents[1]
PROCESSES, DEVICES = 2, 2
STEPS, EVERY = 12, 3
PATIENCE = 200  # seconds, on a busy machine


@contextlib.contextmanager
def job(config: Path, processes: int, log: Path):
    """Processes that train together, started by the launch script."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLA_FLAGS": flags.quick(),
        "PYTHONPATH": str(REPOSITORY),
        "LMM_JAX_HEARTBEAT": "10",
    }
    told = (f"--processes={processes}", f"--devices={DEVICES}")
    train = (sys.executable, "-m", "lmm_jax.train", f"--config={config}")
    with log.open("w") as file:
        started = subprocess.Popen(
            [REPOSITORY / "launch" / "local.sh", *told, "--", *train],
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield started
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)


def member(config: Path, number: int) -> int:
    """The process with this number in a job."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes()
            told = (folder / "environ").read_bytes().split(b"\0")
            own = f"LMM_JAX_PROCESS_ID={number}".encode() in told
            if own and b"-m\0lmm_jax.train" in words and str(config).encode() in words:
                return int(folder.name)
    raise AssertionError(f"no process {number}")


def reach(workdir: Path, step: int, started) -> None:
    """Waits until the metrics have so many steps."""
    deadline = time.time() + PATIENCE
    while max(losses(workdir), default=0) < step:
        assert started.poll() is None and time.time() < deadline
        time.sleep(0.05)


def losses(workdir: Path) -> dict[int, float]:
    file = workdir / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    return {row["step"]: row["train/loss"] for row in map(json.loads, lines)}


def saved(workdir: Path) -> int:
    return max(int(path.name) for path in (workdir / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[int, float]:
    """Losses of one process, whose devices share the batch."""
    config = small_config(tmp_path_factory.mktemp("alone"), steps=STEPS)
    config.checkpoint.every = STEPS
    train.train(config)
    return losses(Path(config.workdir))


def test_lost_asked_to_stop_and_gone_on_as_another_number(alone, tmp_path):
    config = small_config(tmp_path, steps=STEPS)
    config.checkpoint.every = EVERY
    # A mesh axis of tensors over all devices: processes hold the same rows.
    config.mesh.update(fsdp=1, tensor=-1)
    file, workdir = write_config(config, tmp_path / "config.py"), Path(config.workdir)

    lost, stopped, fewer = (tmp_path / name for name in ("lost", "stopped", "fewer"))
    with job(file, PROCESSES, lost) as started:
        reach(workdir, EVERY + 2, started)
        os.kill(member(file, PROCESSES - 1), signal.SIGKILL)
        assert started.wait(PATIENCE) == 128 + signal.SIGKILL
        before = losses(workdir)
    # Whichever comes first: the collective fails, or a heartbeat is missed.
    assert re.search("another (process of the job|task died)", lost.read_text())

    with job(file, PROCESSES, stopped) as started:
        reach(workdir, max(before) + 2, started)
        os.kill(member(file, PROCESSES - 1), signal.SIGTERM)
        assert started.wait(PATIENCE) == 143
    step, again = saved(workdir), losses(workdir)
    for number in range(PROCESSES):
        assert f"[{number}] stopped at step {step}" in stopped.read_text()
    assert {n: again[n] for n in before} == before  # bit by bit

    with job(file, 1, fewer) as started:
        assert started.wait(PATIENCE) == 0
    ours = losses(workdir)
    assert list(ours) == list(alone) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(list(ours.values()), list(alone.values()), rtol=1e-4)
