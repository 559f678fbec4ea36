"""What removing layers costs, of several trained models, over seeds.

    python benchmarks/pruning_curve.py --runs=runs/region \\
        --models=all:0+1+2+3,uniform:0+1+2+3+6 --counts=1,2,3 --seeds=3 --category=hires

`--runs` is what `lmm_jax.compare` wrote; behind the name of each model are the layers that
stay. Of the others the least needed are removed (`lmm_jax.prune`), nothing heals, and the
rest is evaluated. Writes `table.md`, `results.json` and `pareto.png` below `--out`;
what is there already is not done again.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
import subprocess
import sys

from absl import app, flags

from lmm_jax.eval import report

_RUNS = flags.DEFINE_string("runs", None, "Folder of the runs.", required=True)
_MODELS = flags.DEFINE_list("models", None, "NAME:LAYER+LAYER ...", required=True)
_COUNTS = flags.DEFINE_list("counts", ["1", "2", "3"], "Numbers of layers removed.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Seeds 0..N-1 of each.")
_CATEGORY = flags.DEFINE_string("category", "total", "What the plot shows.")
_OUT = flags.DEFINE_string("out", "runs/pruning", "Where results go.")


def pruned(run: Path, count: int, stay: str, to: Path) -> Path:
    """A run without its `count` least needed layers, evaluated."""
    if (to / "results.json").is_file():
        return to
    about = (f"--count={count}", f"--protect={stay}", f"--to={to}", "--samples=64")
    for words in (
        ("lmm_jax.prune", f"--config.workdir={run}", *about),
        ("lmm_jax.evaluate", f"--config.workdir={to}"),
    ):
        subprocess.run([sys.executable, "-m", *words], check=True)
    return to


def records(name: str, stay: str, seed: int) -> list[report.Record]:
    """Of one model with all its layers, and without some."""
    run, found = Path(_RUNS.value) / f"{name}-seed{seed}", []
    for count in (0, *map(int, _COUNTS.value)):
        to = Path(_OUT.value) / f"{name}-seed{seed}-{count}"
        of = pruned(run, count, stay, to) if count else run
        told = dict(strategy=name, setting=f"{count} removed")
        read = report.read_results(of / "results.json")
        found += [dataclasses.replace(record, **told) for record in read]
    return found


def main(argv: list[str]) -> None:
    out, found = Path(_OUT.value), []
    for model in _MODELS.value:
        name, _, stay = model.partition(":")
        for seed in range(_SEEDS.value):
            found += records(name, stay.replace("+", ","), seed)
    report.write_results(out / "results.json", found)
    (out / "table.md").write_text(report.comparison(found))
    metric = dict(task=found[0].task, metric=found[0].metric)
    report.plot(found, out / "pareto.png", category=_CATEGORY.value, **metric)
    print(report.comparison(found))


if __name__ == "__main__":
    app.run(main)
