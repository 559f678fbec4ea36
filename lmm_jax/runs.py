"""Run directories: what a run says of itself, and reading it back.

workdir/config.json, plan.txt, versions.json, tokenizer/    written at every start
workdir/sizes.json, preprocessor_config.json
    of a model that came from folders of the hub, which may be gone, or was pruned
workdir/checkpoints/, frozen/, training.json                what was learned
"""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
import platform
import sys
from typing import Any

from flax import linen as nn
import jax
from jax.experimental import multihost_utils
import ml_collections

from lmm_jax import config as configs
from lmm_jax import experiment, hub, lora, partition
from lmm_jax.checkpoint.state import CheckpointReader
from lmm_jax.depth.table import table
from lmm_jax.experiment import SIZES, Experiment
from lmm_jax.objectives import TEACHER
from lmm_jax.sections import Sections

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
SAME_RUN = ("model", "strategy", "text", "image", "lora")
EXECUTION = ("remat", "unroll", "dtype")  # of the model; may change between starts


def load_run(workdir: str | Path) -> ml_collections.ConfigDict:
    """The config that a run directory was made with.

    Raises:
        ValueError: the directory is not that of a run.
    """
    path = Path(workdir) / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{workdir} holds no config.json: give the work directory of a training run."
        )
    config = configs.from_json(path.read_text())
    config.workdir = str(workdir)
    return config


def claim(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Makes a run directory, or makes sure that it is that of the same run.

    Raises:
        ValueError: the directory cannot be made, or holds a run of another model.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(workdir, error) from error
    _refuse_other_run(workdir, config)


def must_be_new(target: str | Path) -> None:
    """Raises ValueError where something is already there."""
    path = Path(target)
    if path.exists() and any(path.iterdir()):
        raise ValueError(f"{target} is not empty; choose another --to.")
    if jax.process_count() > 1:  # all have looked before one writes
        multihost_utils.sync_global_devices("target")


def describe(
    experiment: Experiment, config: ml_collections.ConfigDict, workdir: Path
) -> None:
    """Writes what a run directory must say of itself: config, plan, tokenizer, versions.

    Raises:
        ValueError: the directory cannot be written.
    """
    try:
        (workdir / "config.json").write_text(configs.to_json(config))
        (workdir / "plan.txt").write_text(table(experiment.plan(train=False)) + "\n")
        experiment.tokenizer.save(workdir / "tokenizer")
        sizes = hub.pruned.fields(experiment.spec)  # of names, which say the others
        if experiment.sizes_from_folder:
            sizes = hub.model_config(experiment.spec, experiment.spec.kind)
            tower = experiment.spec.vision
            pixels = hub.processor_config(experiment.images, tower)
            (workdir / hub.PROCESSOR).write_text(json.dumps(pixels, indent=2) + "\n")
        if sizes:
            (workdir / SIZES).write_text(json.dumps(sizes, indent=2) + "\n")
        (workdir / "versions.json").write_text(json.dumps(versions(), indent=2) + "\n")
    except OSError as error:
        raise _unwritable(workdir, error) from error


def versions() -> dict[str, Any]:
    """Libraries and device, for whoever has to repeat a run."""
    found = {name: importlib.metadata.version(name) for name in LIBRARIES}
    device = jax.devices()[0]
    return {
        **found,
        "python": platform.python_version(),
        "device": device.device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "command": sys.argv,
    }


def load_params(exp: Experiment, model: nn.Module, run: str) -> dict[str, Any]:
    """Parameters of a run's latest checkpoint, on this experiment's mesh.

    Only parameters are read, no optimizer state. Adapters of that run are merged. What a
    strategy learns is left out if the run had no such strategy.

    Args:
        model: its own adapters are left out.
        run: a work directory, or what `lmm_jax.convert` wrote.

    Raises:
        ValueError: the directory is not that of a run.
        CheckpointError: no finished checkpoint, or one of another model.
    """
    path = Path(run)
    converted = (path / SIZES).is_file() and not (path / "config.json").is_file()
    made = None if converted else experiment.build(load_run(run))
    adapts = made is not None and made.config.lora.rank > 0
    spec = made.config.lora.applied(exp.spec) if adapts else exp.spec
    abstract = _known(made, exp.placed_params(model.clone(spec=spec)))
    # `lmm_jax.convert` knows of no learning: all is in one tree.
    selection = partition.select(abstract, made.learned if made else tuple(abstract))
    learning, frozen = partition.split(abstract, selection)
    checkpoints = CheckpointReader(run)
    try:
        learning = checkpoints.restore_part(learning, "learning")
        if frozen:
            frozen = checkpoints.restore_frozen(frozen)
    finally:
        checkpoints.close()

    def join(learning, frozen):
        params = partition.join(learning, frozen, selection)
        return lora.merged(params, spec.language.block.lora) if adapts else params

    plain = _known(made, exp.placed_params(model.clone(spec=exp.spec)))
    shardings = jax.tree.map(lambda x: x.sharding, plain)
    return jax.jit(join, out_shardings=shardings)(learning, frozen)


def _known(made: Experiment | None, abstract: dict[str, Any]) -> dict[str, Any]:
    """Without what the run, if it is one, does not have of strategies and teacher."""
    if made is None:
        return abstract
    theirs = made.abstract_params(made.model(train=True))
    optional = ("strategy_", TEACHER)
    return {
        name: x
        for name, x in abstract.items()
        if name in theirs or not name.startswith(optional)
    }


def load_learned(exp: Experiment, model: nn.Module, run: str) -> dict[str, Any]:
    """What a run of this experiment has learned, adapters not merged.

    Raises:
        CheckpointError: no finished checkpoint, or one of another model.
    """
    abstract = exp.placed_params(model)
    selection = partition.select(abstract, exp.learned)
    checkpoints = CheckpointReader(run)
    try:
        learning, _ = partition.split(abstract, selection)
        return checkpoints.restore_part(learning, "learning")
    finally:
        checkpoints.close()


def trained(run: str) -> dict[str, float]:
    """Steps and seconds that a run has trained."""
    path = Path(run) / "training.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _unwritable(workdir: Path, error: OSError) -> ValueError:
    return ValueError(
        f"cannot write to workdir {workdir}: {error.strerror}; choose another with "
        "--config.workdir=... or free space."
    )


def _refuse_other_run(workdir: Path, config: ml_collections.ConfigDict) -> None:
    """A work directory belongs to one model and strategy, of which the same learns."""
    path = workdir / "config.json"
    if not path.is_file():
        return
    old, new = _identity(path.read_text()), _identity(configs.to_json(config))
    for section in (*SAME_RUN, "train"):
        if old[section] != new[section]:
            raise ValueError(
                f"workdir {workdir} holds a run with {section}={old[section]}, this one "
                f"has {new[section]}: choose another --config.workdir, or delete it."
            )


def _identity(text: str) -> dict[str, Any]:
    # Older runs lack fields that came later.
    config = configs.completed(Sections, configs.from_json(text)).to_dict()
    kept = {section: dict(config.get(section) or {}) for section in SAME_RUN}
    for name in EXECUTION:
        kept["model"].pop(name, None)
    if not kept["lora"].get("rank"):
        kept["lora"] = {}  # off, whatever else it says
    kept["train"] = {"learn": config["train"]["learn"]}  # as many rows may be others
    return kept
