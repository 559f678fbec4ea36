"""Where parameters come from: a checkpoint, folders of the hub, or a random key."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import logging
from flax import linen as nn
from flax import traverse_util
import jax

from lmm_jax import hub, partition, quantize, runs
from lmm_jax.experiment import Experiment
from lmm_jax.nn.apart import apart
from lmm_jax.objectives import TEACHER
from lmm_jax.partition import LAYERS


def initial(exp: Experiment, model: nn.Module) -> dict[str, Any]:
    """What a training starts from, each parameter made or read where it will live.

    Raises:
        ValueError, FileNotFoundError: a folder or run that does not fit; says why.
    """
    init = exp.config.init
    found: dict[str, Any] = {}
    if (teacher := exp.teacher(model)) is not None:
        itself = init.teacher == "start"
        path = (init.run or init.load) if itself else init.teacher
        found[TEACHER] = whole(exp, teacher, path)
    if init.run:
        loaded = runs.load_params(exp, model, init.run)
        return _completed(exp, model, {**loaded, **found})
    abstract = exp.placed_params(model.clone(spec=exp.spec))  # no folder has adapters
    if init.load:
        given = (*init.fresh, *filter(lambda name: getattr(init, name, ""), abstract))
        loaded = hub.load(hub.Folder(init.load), exp.spec, abstract, without=given)
        found = {**loaded, **found}
    if init.vision:
        found["vision"] = _read(init.vision, exp.spec.vision, abstract["vision"])
    if init.language:
        found["language"] = _read(
            init.language, exp.spec.language, abstract["language"]
        )
    return _completed(exp, model, found)


def source(exp: Experiment, *, text: bool = False) -> str:
    """Whose parameters are evaluated: the work directory's, else those `init` names.

    Args:
        text: whether a language model alone will do.

    Raises:
        ValueError: there are none.
    """
    init, workdir = exp.config.init, exp.config.workdir
    if has_checkpoint(exp):
        return workdir
    if found := init.run or init.load or (text and init.language):
        return found
    raise ValueError(
        f"{workdir} has no checkpoint: train first, or give --config.init.run=DIR of a "
        "run or --config.init.load=DIR of a LLaVA folder."
    )


def to_run(
    exp: Experiment, model: nn.Module, *, fresh: bool = False, text: bool = False
) -> dict[str, Any]:
    """The parameters of `source`, rounded if `eval.weights` says so; raises as it does.

    Args:
        fresh: random ones where there are none, for timings.
        text: see `source`.
    """
    if not fresh:
        source(exp, text=text)
    if has_checkpoint(exp):
        params = runs.load_params(exp, model, exp.config.workdir)
    else:
        params = initial(exp, model)
    if exp.config.eval.weights == "float":
        return params
    before, params = quantize.size(params), quantize.int8(params, exp.spec)
    after = quantize.size(params)
    logging.info("int8: %.1f MiB instead of %.1f", after / 2**20, before / 2**20)
    return params


def prepared(params: Mapping[str, Any]) -> Mapping[str, Any]:
    """Parameters as the device reads them fastest: on one CPU, layers apart."""
    devices = {device for x in jax.tree.leaves(params) for device in x.devices()}
    if len(devices) > 1 or devices.pop().platform != "cpu":
        return params

    def split(part: Any) -> Any:
        if not isinstance(part, Mapping):
            return part
        return {k: apart(x) if k == LAYERS else split(x) for k, x in part.items()}

    return split(params)


def has_checkpoint(exp: Experiment) -> bool:
    """Whether the work directory holds parameters."""
    return (Path(exp.config.workdir) / "checkpoints").is_dir()


def whole(exp: Experiment, model: nn.Module, path: str) -> dict[str, Any]:
    """All parameters of a model, from a run or from a folder of the hub."""
    if (Path(path) / "checkpoints").is_dir():
        return runs.load_params(exp, model, path)
    return hub.load(hub.Folder(path), exp.spec, exp.placed_params(model))


def _read(path: str, spec: Any, abstract: Any) -> dict[str, Any]:
    return hub.load(hub.Folder(path), spec, abstract)


def _completed(exp: Experiment, model: nn.Module, found: dict) -> dict[str, Any]:
    """Adds fresh values of what was not found or shall not be used; the compiler leaves
    the others out."""
    found = partition.flatten(found)
    abstract = partition.flatten(exp.placed_params(model))
    for pattern in exp.config.init.fresh:
        for path in partition.require(pattern, abstract):
            found.pop(path, None)
    missing = {path: x.sharding for path, x in abstract.items() if path not in found}

    def make(key):
        params = partition.flatten(exp.fresh(model, key))
        return {path: params[path] for path in missing}

    if found and missing:
        parts = sorted({path.split("/")[0] for path in missing})
        logging.info("random to begin with: %s", ", ".join(parts))
    key = jax.random.key(exp.config.train.seed)
    fresh = jax.jit(make, out_shardings=missing)(key) if missing else {}
    return traverse_util.unflatten_dict({**found, **fresh}, sep="/")
