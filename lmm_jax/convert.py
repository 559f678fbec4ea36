"""Between LLaVA folders of the hub and parameters that runs start from.

    python -m lmm_jax.convert --from=HF_DIR --to=DIR     then --config.init.run=DIR
    python -m lmm_jax.convert --from=RUN --to=HF_DIR     opened by transformers

Values keep their dtype and their bits, there and back.
"""

from __future__ import annotations

import json
from pathlib import Path
import shutil
import sys

from absl import app, flags
from flax import traverse_util
import jax

from lmm_jax import cli, experiment, hub, runs
from lmm_jax.checkpoint.params import flatten
from lmm_jax.checkpoint.state import CheckpointReader, Checkpoints
from lmm_jax.data.tokenizer import Tokenizer
from lmm_jax.depth import make_plan
from lmm_jax.experiment import SIZES
from lmm_jax.models import lmm
from lmm_jax.models.specs import LMMSpec

flags.DEFINE_string("from", None, "Folder, run or converted.", required=True)
_TO = flags.DEFINE_string("to", None, "What is written; must not exist.", required=True)


def from_hub(source: str | Path, target: str | Path) -> None:
    """Writes the parameters of a LLaVA folder as a checkpoint that `init.run` reads.

    Raises:
        FileNotFoundError, ValueError: the folder does not fit, or the target exists.
    """
    _must_be_new(target)
    folder, spec = hub.Folder(source), hub.lmm_spec(source)
    flat = flatten(hub.load(folder, spec, _abstract(spec)))
    for path in list(flat):  # one by one: never two copies of the model
        flat[path] = jax.device_put(flat.pop(path))
    params = traverse_util.unflatten_dict(flat, sep="/")
    checkpoints = Checkpoints(target)
    checkpoints.save(0, {"learning": params})
    checkpoints.close()
    _copy_tokenizer(folder.path, Path(target) / "tokenizer")
    _copy_processor(folder.path, target)
    # Last: what has it is complete.
    sizes = hub.model_config(spec, spec.kind) | _tokens(folder.config)
    (Path(target) / SIZES).write_text(json.dumps(sizes, indent=2) + "\n")


def to_hub(source: str | Path, target: str | Path) -> None:
    """Writes a run's parameters, or converted ones, as a folder that transformers opens.

    Raises:
        ValueError: nothing to convert, parameters that the layout has no place for, or
            the target exists.
    """
    _must_be_new(target)
    sizes = Path(source) / SIZES
    if (Path(source) / "config.json").is_file():
        exp = experiment.build(runs.load_run(source))
        spec = exp.spec
        params = runs.load_params(exp, exp.model(train=False), str(source))
    elif sizes.is_file():
        spec = hub.read_spec(hub.read_json(sizes), source)
        params = _converted(source, spec)
    else:
        raise ValueError(f"{source} is neither a run nor a converted model.")
    extra = sorted(set(params) - hub.branches(spec))
    if extra:
        raise ValueError(
            f"{source} has parameters of {', '.join(extra)}, for which the layout of "
            f"{spec.kind} has no place: export the run without that strategy."
        )
    tokens = _tokens(hub.read_json(sizes)) if sizes.is_file() else {}
    _copy_tokenizer(Path(source) / "tokenizer", Path(target))
    hub.save(target, spec, params, kind=spec.kind, config=tokens)
    _copy_processor(source, target)


def _abstract(spec: LMMSpec):
    sizes = lmm.geometry(
        spec, images=1, crops=0, prefix=0, suffix=2, pinpoints=spec.pinpoints
    )
    model = lmm.LMM(spec, make_plan(sizes, lmm.own_edits(spec, sizes)))
    return jax.eval_shape(lambda key: lmm.init(model, key), jax.random.key(0))


def _converted(source: str | Path, spec: LMMSpec):
    checkpoints = CheckpointReader(source)
    try:
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        dtypes = flatten(checkpoints.dtypes("learning"))

        def place(path: str, x):
            return jax.ShapeDtypeStruct(x.shape, dtypes[path], sharding=device)

        wanted = {path: place(path, x) for path, x in flatten(_abstract(spec)).items()}
        abstract = traverse_util.unflatten_dict(wanted, sep="/")
        return checkpoints.restore_part(abstract, "learning")
    finally:
        checkpoints.close()


def _tokens(config: dict) -> dict:
    """Ids that belong to the vocabulary and not to the model."""
    names = ("image_token_index", "image_token_id", "pad_token_id")
    return {name: config[name] for name in names if config.get(name) is not None}


def _copy_tokenizer(source: Path, target: Path) -> None:
    if any((source / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        Tokenizer.load(source).save(target)


def _copy_processor(source: str | Path, target: str | Path) -> None:
    if (Path(source) / hub.PROCESSOR).is_file():
        shutil.copy(Path(source) / hub.PROCESSOR, target)


def _must_be_new(target: str | Path) -> None:
    path = Path(target)
    if path.exists() and any(path.iterdir()):
        raise ValueError(f"{target} is not empty; choose another --to.")


def main(_: list[str]) -> None:
    source, target = flags.FLAGS["from"].value, _TO.value
    try:
        if (Path(source) / "checkpoints").is_dir():
            to_hub(source, target)
        else:
            from_hub(source, target)
    except cli.EXPECTED as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    print(f"{target} written")


if __name__ == "__main__":
    app.run(main)
