"""Compiles a program for a TPU slice that is not there: does it fit, what does it cost?

    python -m lmm_jax.aot --config=configs/deepstack.py --topology=v5e-256 \\
        --config.mesh.tensor=2
    python -m lmm_jax.aot --config=configs/fastv.py --program=prefill --topology=v5e:2x4
    python -m lmm_jax.aot --config=configs/deepstack.py --topology=v5p-128 --sweep \\
        --tensor=1,2,4 --remat=dots,full --json=sweep.json

Needs the TPU compiler (`pip install 'jax[tpu]'`) and no TPU: shapes and shardings go in;
out come the memory of one chip, FLOPs, traffic and exchanges with loops counted as often as
they run, and a time that no step can beat (see `lmm_jax.compiled.estimate`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import dataclasses
import json
from pathlib import Path
from typing import Any

from absl import flags

from lmm_jax import cli, experiment
from lmm_jax.compiled import programs, tpu
from lmm_jax.compiled.report import Report, compile_for, table
from lmm_jax.compiled.tpu import Slice
from lmm_jax.experiment import Conversing, Experiment


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a sweep varies.

    Attributes:
        tensor: size of that mesh axis; fsdp takes the rest.
        remat: see `LayerStack`.
        accumulate: micro-batches of an update.
    """

    tensor: int
    remat: str
    accumulate: int

    def of(self, exp: Experiment) -> Experiment:
        """The experiment, so set."""
        c = exp.config
        mesh = dataclasses.replace(c.mesh, data=1, fsdp=-1, tensor=self.tensor)
        model = dataclasses.replace(c.model, remat=self.remat)
        train = dataclasses.replace(c.train, accumulate=self.accumulate)
        config = dataclasses.replace(c, mesh=mesh, model=model, train=train)
        return dataclasses.replace(exp, config=config)


def with_layers(exp: Experiment, depth: int) -> Experiment:
    """The experiment with another number of language layers, to see what does not grow.

    Raises:
        ValueError: an encoder, whose layers are its name's.
    """
    if not isinstance(exp, Conversing):
        raise ValueError(
            f"--depth={depth}: {exp.called} has no language layers apart; leave it out."
        )
    language = dataclasses.replace(exp.spec.language, depth=depth)
    return dataclasses.replace(exp, language=language)


def setting(exp: Experiment) -> Setting:
    """What the config says."""
    config = exp.config
    tensor = exp.axes.mesh.shape["tensor"]
    return Setting(tensor, config.model.remat, config.train.accumulate)


def compiled(exp: Experiment, name: programs.Name, chips: Slice) -> Report:
    """Compiles a program of an experiment for its devices, which are those of a slice."""
    lowered = programs.lower(exp, name)
    return compile_for(lowered, chips, tuple(exp.axes.mesh.devices.flat))


def undivided(exp: Experiment, name: programs.Name) -> str:
    """Why each data device would hold more rows than its share; "" where it does not."""
    c, shape = exp.config, exp.axes.mesh.shape
    rows, parts = c.eval.batch_size, shape["data"] * shape["fsdp"]
    if name == "update":
        rows = c.data.batch_size // c.train.accumulate
    if rows % parts == 0:
        return ""
    return (
        f"{rows} rows at a time cannot be divided among {parts} data devices: use a larger "
        "batch, less accumulation, or a larger mesh.tensor."
    )


def remedy(exp: Experiment, name: programs.Name, report: Report) -> str:
    """What to change where a program does not fit, cheapest first."""
    if told := undivided(exp, name):
        return told
    held, room = sum(report.memory.held.values()), report.chips.chip.memory * 2**30
    if held > 0.8 * room:
        return "what is held alone fills a chip: use more chips, or a larger mesh.fsdp."
    if name != "update":
        return "use a smaller eval.batch_size, eval.chunk=512, or a larger mesh.tensor."
    if exp.config.model.remat != "full":
        return "use model.remat=full."
    more = dataclasses.replace(setting(exp), accumulate=2 * setting(exp).accumulate)
    if not undivided(more.of(exp), name):
        return f"use train.accumulate={more.accumulate}, or a larger mesh.tensor."
    return (
        "use a larger mesh.context or mesh.tensor, a smaller data.batch_size, or more "
        "chips."
    )


def sweep(
    exp: Experiment,
    name: programs.Name,
    chips: Slice,
    *,
    tensor: Sequence[int],
    remat: Sequence[str],
    accumulate: Sequence[int],
) -> Iterator[tuple[Setting, Report]]:
    """Compiles every setting that divides the batch; more micro-batches only where fewer
    do not fit, as each of them gathers the parameters again."""
    for size in tensor:
        for policy in remat:
            for count in sorted(accumulate):
                tried = Setting(size, policy, count)
                if chips.count % size or undivided(tried.of(exp), name):
                    continue
                report = compiled(tried.of(exp), name, chips)
                yield tried, report
                if report.fits:
                    break


def heading(exp: Experiment, name: programs.Name, report: Report) -> str:
    mesh = ", ".join(f"{axis} {size}" for axis, size in exp.axes.mesh.shape.items())
    now = setting(exp)
    return (
        f"{exp.config.name}: {exp.called}, {name} of {report.examples} on {report.chips}\n"
        f"mesh {mesh}; remat {now.remat}; accumulate {now.accumulate}; "
        f"compiled in {report.seconds:.0f} s\n"
    )


def line(tried: Setting, report: Report) -> str:
    """A row of a sweep."""
    told = f"tensor {tried.tensor}  remat {tried.remat:5} accumulate {tried.accumulate}"
    told += f"  {report.share:5.0%} of memory"
    if not report.fits:
        return f"{told}  does not fit"
    step = report.estimate.step
    return f"{told}  {step:7.3f} s  utilisation {report.utilisation:.0%}"


def _sweep(exp: Experiment, chips: Slice, asked: Any) -> list[dict[str, Any]]:
    found = []
    choices = dict(
        tensor=[int(size) for size in asked.tensor],
        remat=asked.remat,
        accumulate=[int(count) for count in asked.accumulate],
    )
    for tried, report in sweep(exp, asked.program, chips, **choices):
        print(line(tried, report), flush=True)
        found.append((tried, report))
    fitting = [pair for pair in found if pair[1].fits]
    if not fitting:
        raise ValueError(
            f"no setting of {len(found)} fits {chips}: more chips, a smaller batch, or "
            "more of --tensor and --accumulate."
        )
    best, report = min(fitting, key=lambda pair: pair[1].estimate.step)
    print(f"\nbest: {heading(best.of(exp), asked.program, report)}")
    print(table(report))
    return [dataclasses.asdict(t) | r.record() for t, r in found]


def main(argv: Sequence[str], config) -> None:
    asked = flags.FLAGS
    chips = tpu.named(asked.topology)
    exp = experiment.build(config, chips.devices())
    if asked.depth:
        exp = with_layers(exp, asked.depth)
    if asked.sweep:
        records = _sweep(exp, chips, asked)
    else:
        report = compiled(exp, asked.program, chips)
        print(heading(exp, asked.program, report))
        print(table(report))
        if not report.fits or undivided(exp, asked.program):
            print(remedy(exp, asked.program, report))
        records = [dataclasses.asdict(setting(exp)) | report.record()]
    if asked.json:
        Path(asked.json).write_text(json.dumps(records, indent=2) + "\n")


if __name__ == "__main__":
    flags.DEFINE_string(
        "topology", "v5e:16x16", "GENERATION:SHAPE, or a product name such as v5e-256."
    )
    flags.DEFINE_enum("program", "update", programs.NAMES, "What is compiled.")
    flags.DEFINE_integer("depth", 0, "Language layers, if not the model's (0).")
    flags.DEFINE_bool("sweep", False, "Try the settings below and print the best.")
    flags.DEFINE_list("tensor", ["1", "2", "4"], "Sizes of mesh.tensor in a sweep.")
    flags.DEFINE_list("remat", ["dots", "full"], "Policies in a sweep.")
    flags.DEFINE_list("accumulate", ["1", "2", "4"], "Micro-batches in a sweep.")
    flags.DEFINE_string("json", "", "File for the same as JSON.")
    cli.run(main)
