"""Comparisons: what is run, what is not run again, and what comes of it."""

from __future__ import annotations

import dataclasses

import pytest

from lmm_jax.compare import Trainings, compare
from lmm_jax.eval import report


def finished(runs: Trainings, name: str, seed: int, value: float) -> None:
    """What a run leaves behind; all have one strategy."""
    record = report.Record("stacked", "pages", "accuracy", value, 10, 5, 1.0, 16, 2.0)
    folder = runs.workdir(name, seed)
    records = [dataclasses.replace(record, seed=seed)]
    report.write_results(folder / "results.json", records)


def test_runs_start_from_the_base_of_their_seed_and_keep_the_overrides(tmp_path):
    runs = Trainings("c.py:steps=3", tmp_path, "read", ("--config.optim.lr=0.1",))
    ours, base = runs.command("depth", 1), runs.command("read", 1)
    assert "--config=c.py:steps=3,strategy=depth,seed=1" in ours
    assert f"--config.workdir={tmp_path}/depth-seed1" in ours
    assert f"--config.init.run={tmp_path}/read-seed1" in ours
    assert {"--config.optim.lr=0.1"} <= set(ours) & set(base)
    assert not any("init.run" in word for word in base)


def test_finished_runs_are_not_repeated(tmp_path):
    runs = Trainings("no-such-config.py", tmp_path, base="read")
    for seed in (0, 1):
        finished(runs, "read", seed, 9.0)
        for name, value in (("depth", 60.0), ("low-res", 20.0)):
            finished(runs, name, seed, value + 4 * seed)
    table = compare(runs, ("depth", "low-res"), 2)
    assert "| pages | depth |  | 2 | 62.0 ± 2.8 | 16 |" in table and "read" not in table
    assert table == (tmp_path / "table.md").read_text()
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert len(report.read_results(tmp_path / "results.json")) == 4


def test_a_run_that_fails_is_named_with_its_last_words(tmp_path):
    runs = Trainings("no-such-config.py", tmp_path)
    with pytest.raises(ValueError, match=r"(?s)depth, seed 0 .*no-such-config.py"):
        compare(runs, ("depth",), 1)
    assert (tmp_path / "depth-seed0/log.txt").is_file()
