"""Trains several strategies under one budget and puts accuracy beside cost.

    python -m lmm_jax.compare --config=configs/quickstart.py \\
        --strategies=llava,deepstack,llava_hires --seeds=3

Every run is `lmm_jax.train` with `--config=FILE:strategy=NAME,seed=N`, so a config takes
part by having these two arguments; its section `compare` says what is trained where the
flags do not. Finished runs are not repeated. Writes `table.md`, `results.json` and
`pareto.png`.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
from pathlib import Path
import subprocess
import sys

from absl import flags

from lmm_jax import cli, experiment
from lmm_jax.eval import report

_STRATEGIES = flags.DEFINE_list("strategies", [], "Names, comma-separated.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Seeds 0..N-1 of each.", lower_bound=1)
_OUT = flags.DEFINE_string("out", "runs/compare", "Where runs and results go.")
_CATEGORY = flags.DEFINE_string("category", "", "What the plot shows.")


@dataclasses.dataclass(frozen=True)
class Trainings:
    """The runs of one comparison.

    Attributes:
        source: `--config` value: a file, with or without arguments of its own.
        out: folder of the runs and their results.
        base: name of a run whose parameters those of the same seed start from, "" for
            none. It is trained first and is not part of the results.
        extra: further `--config.x=y` overrides for every run.
    """

    source: str
    out: Path
    base: str = ""
    extra: tuple[str, ...] = ()

    def workdir(self, name: str, seed: int) -> Path:
        return self.out / f"{name}-seed{seed}"

    def command(self, name: str, seed: int) -> list[str]:
        """What trains and evaluates one of them."""
        file, _, arguments = self.source.partition(":")
        chosen = (arguments, f"strategy={name}", f"seed={seed}")
        command = [
            *(sys.executable, "-m", "lmm_jax.train"),
            f"--config={file}:{','.join(filter(None, chosen))}",
            f"--config.workdir={self.workdir(name, seed)}",
            *self.extra,
        ]
        if self.base and name != self.base:
            command.append(f"--config.init.run={self.workdir(self.base, seed)}")
        return command

    def results(self, name: str, seed: int) -> list[report.Record]:
        """Of one run, which is trained now if it is not finished; under the run's name, as
        several may have one strategy.

        Raises:
            ValueError: it failed; says which and shows its last words.
        """
        workdir = self.workdir(name, seed)
        if not (workdir / "results.json").is_file():
            command = self.command(name, seed)
            print(" ".join(command[1:]), flush=True)
            workdir.mkdir(parents=True, exist_ok=True)
            # In a process of its own: memory and compiled programs go with it.
            with (workdir / "log.txt").open("w") as log:
                done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT)
            if done.returncode:
                last = (workdir / "log.txt").read_text().strip().split("\n")[-3:]
                raise ValueError(
                    f"{name}, seed {seed} ended with code {done.returncode}:\n"
                    + "\n".join(last)
                )
        records = report.read_results(workdir / "results.json")
        return [dataclasses.replace(record, strategy=name) for record in records]


def compare(
    runs: Trainings, names: Sequence[str], seeds: int, category: str = "total"
) -> str:
    """Runs what is missing, seed after seed; writes the results and returns the table.

    Raises:
        ValueError: a run failed.
    """
    records = []
    for seed in range(seeds):
        if runs.base:
            runs.results(runs.base, seed)
        for name in names:
            records += runs.results(name, seed)
            report.write_results(runs.out / "results.json", records)
    table = report.comparison(records)
    (runs.out / "table.md").write_text(table)
    task, metric = records[0].task, records[0].metric
    plot = runs.out / "pareto.png"
    report.plot(records, plot, task=task, metric=metric, category=category)
    return table


def main(argv: list[str], config) -> None:
    # A mistake shows before the first run, not after it.
    section = experiment.build(config).config.compare
    names = _STRATEGIES.value or section.strategies
    if not names:
        raise ValueError("nothing to compare: use --strategies=NAME,NAME.")
    source, overrides = cli.told()
    runs = Trainings(source, Path(_OUT.value), section.base, tuple(overrides))
    category = _CATEGORY.value or section.category
    print(compare(runs, names, _SEEDS.value, category))
    print(f"{runs.out}/table.md, results.json and pareto.png written")


if __name__ == "__main__":
    cli.run(main)
