"""Trains several strategies under one budget and puts accuracy beside cost.

    python -m lmm_jax.compare --config=configs/quickstart.py \\
        --strategies=llava,deepstack,llava_hires --seeds=3

Every run is `lmm_jax.train` with `--config=FILE:strategy=NAME,seed=N`, so a config takes
part by having these two arguments. Finished runs are not repeated. Writes `table.md`,
`results.json` and `pareto.png`.
"""

from __future__ import annotations

from pathlib import Path
import subprocess
import sys

from absl import flags

from lmm_jax import cli, experiment
from lmm_jax.eval import report

_STRATEGIES = flags.DEFINE_list("strategies", ["llava"], "Names, comma-separated.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Seeds 0..N-1 of each.", lower_bound=1)
_OUT = flags.DEFINE_string("out", "runs/compare", "Where runs and results go.")
_CATEGORY = flags.DEFINE_string("category", "total", "What the plot shows.")


def compare(source: str, names: list[str], seeds: int, out: Path, extra: list[str]):
    """Runs what is missing; returns all records.

    Args:
        source: `--config` value: a file, with or without arguments of its own.
        extra: further `--config.x=y` overrides for every run.

    Raises:
        ValueError: a run failed; says which and shows its last words.
    """
    records = []
    for seed in range(seeds):
        for name in names:
            workdir = out / f"{name}-seed{seed}"
            results = workdir / "results.json"
            if not results.is_file():
                _train(source, name, seed, workdir, extra)
            records += report.read_results(results)
            report.write_results(out / "results.json", records)
    return records


def _train(source: str, name: str, seed: int, workdir: Path, extra: list[str]) -> None:
    """One run in a process of its own: memory and compiled programs go with it."""
    file, _, arguments = source.partition(":")
    chosen = ",".join(filter(None, (arguments, f"strategy={name}", f"seed={seed}")))
    command = [
        sys.executable,
        "-m",
        "lmm_jax.train",
        f"--config={file}:{chosen}",
        f"--config.workdir={workdir}",
        *extra,
    ]
    print(" ".join(command[1:]), flush=True)
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / "log.txt").open("w") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
        last = (workdir / "log.txt").read_text().strip().split("\n")[-3:]
        raise ValueError(
            f"{name}, seed {seed} ended with code {code}:\n" + "\n".join(last)
        )


def main(argv: list[str], config) -> None:
    experiment.build(config)  # a mistake shows before the first run, not after it
    source = next(a.partition("=")[2] for a in sys.argv if a.startswith("--config="))
    extra = [a for a in sys.argv if a.startswith("--config.")]
    out = Path(_OUT.value)
    records = compare(source, _STRATEGIES.value, _SEEDS.value, out, extra)
    table = report.markdown(records)
    (out / "table.md").write_text(table)
    task = records[0].task
    report.plot(
        records,
        out / "pareto.png",
        task=task,
        metric=records[0].metric,
        category=_CATEGORY.value,
    )
    print(table)
    print(f"{out}/table.md, results.json and pareto.png written")


if __name__ == "__main__":
    cli.run(main)
