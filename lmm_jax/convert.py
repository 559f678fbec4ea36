"""Between LLaVA folders of the hub and parameters that runs start from.

    python -m lmm_jax.convert --from=HF_DIR --to=DIR     then --config.init.run=DIR
    python -m lmm_jax.convert --from=RUN --to=HF_DIR     opened by transformers
    python -m lmm_jax.convert --from=RUN --to=DIR --kind=bunny-phi     by Bunny's own code
    python -m lmm_jax.convert --from=LORA_RUN --to=DIR --adapter     opened by peft

Values keep their dtype and their bits, there and back; adapters are merged. Every process
of a job reads and writes its part of the parameters, on all devices there are.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import json
from pathlib import Path
import shutil
import sys

from absl import app, flags
from flax import traverse_util
import jax
import jax.numpy as jnp

from lmm_jax import cli, experiment, hub, runs
from lmm_jax.checkpoint.params import flatten
from lmm_jax.checkpoint.state import CheckpointReader, Checkpoints
from lmm_jax.data.tokenizer import Tokenizer
from lmm_jax.depth import make_plan
from lmm_jax.experiment import SIZES
from lmm_jax.models import lmm
from lmm_jax.models.specs import LMMSpec
from lmm_jax.parallel.axes import Axes
from lmm_jax.parallel.mesh import MeshConfig, make_mesh, start_processes

flags.DEFINE_string("from", None, "Folder, run or converted.", required=True)
_TO = flags.DEFINE_string("to", None, "What is written; must not exist.", required=True)
_UNUSED = flags.DEFINE_multi_string(
    "allow_unused", [], "Pattern of tensors that may be left out; may be repeated."
)
_KIND = flags.DEFINE_string("kind", "", "Model type that is written, if not its own.")
_ADAPTER = flags.DEFINE_bool("adapter", False, "What a LoRA run learned, unmerged.")
_BASE = flags.DEFINE_string("base", "", "With --adapter: name or folder of its base.")


def from_hub(
    source: str | Path, target: str | Path, *, allow_unused: Sequence[str] = ()
) -> None:
    """Writes the parameters of a LLaVA folder as a checkpoint that `init.run` reads.

    Raises:
        FileNotFoundError, ValueError: the folder does not fit, or the target exists.
    """
    runs.must_be_new(target)
    folder, spec = hub.Folder(source), hub.lmm_spec(source)
    params = hub.load(folder, spec, placed(spec), cast=False, allow_unused=allow_unused)
    checkpoints = Checkpoints(target)
    checkpoints.save(0, {"learning": params})
    checkpoints.close()
    if jax.process_index():
        return
    if words := _tokenizer(folder.path):
        words.save(Path(target) / "tokenizer")
    _copy_processor(folder.path, target)
    # Last: what has it is complete.
    sizes = hub.model_config(spec, spec.kind) | _tokens(folder.config)
    (Path(target) / SIZES).write_text(json.dumps(sizes, indent=2) + "\n")


def to_hub(source: str | Path, target: str | Path, kind: str = "") -> None:
    """Writes a run's parameters, or converted ones, as a folder of the hub.

    Args:
        kind: model type, by default its own, which `transformers` opens.

    Raises:
        ValueError: nothing to convert, parameters that the layout has no place for, or
            the target exists.
    """
    runs.must_be_new(target)
    source, sizes = Path(source), Path(source) / SIZES
    found = hub.read_json(sizes) if sizes.is_file() else {}
    words, tokens = _tokenizer(source / "tokenizer"), _tokens(found)
    if (source / "config.json").is_file():
        exp = _run(source)
        spec = exp.whole if kind else exp.spec
        params = runs.load_params(exp, exp.model(train=False), str(source))
        if marker := hub.image_token(kind or spec.kind):
            words, image = words.extended(marker)
            tokens = {"image_token_index": image, "pad_token_id": words.pad_id}
            spec, params = grown(spec, params, image + 1)
    elif found:
        spec = hub.read_spec(found, source)
        params = _converted(source, spec)
    else:
        raise ValueError(f"{source} is neither a run nor a converted model.")
    extra = sorted(set(params) - hub.branches(spec, kind or spec.kind))
    if extra:
        raise ValueError(
            f"{source} has parameters of {', '.join(extra)}, for which the layout of "
            f"{kind or spec.kind} has no place: export the run without that strategy."
        )
    if spec.language.head_bias and not kind:
        raise ValueError(
            f"{source} has a bias in its head, for which {spec.kind} in transformers has "
            "no place: export it in the original layout, --kind=bunny-phi."
        )
    kind, tokens = (kind, {}) if kind else (spec.kind, tokens)
    hub.model_config(spec, kind)  # refuses before anything is written
    chief = jax.process_index() == 0
    if words and chief:
        words.save(target)
    hub.save(target, spec, params, kind=kind, config=tokens)
    if chief:
        _copy_processor(source, target)


def to_adapter(source: str | Path, target: str | Path, base: str) -> None:
    """Writes what a LoRA run has learned as a folder that `peft` puts on its base.

    Raises:
        ValueError: it is no LoRA run, or learned more than adapters and projector; or
            the target exists.
    """
    runs.must_be_new(target)
    exp = _run(source)
    model = exp.model(train=True)
    learned = runs.load_learned(exp, model, str(source))
    hub.save_adapter(target, model.spec, learned, base=base)


def grown(spec: LMMSpec, params: dict, vocab: int) -> tuple[LMMSpec, dict]:
    """The same model with rows for `vocab` tokens, if it has not as many.

    New rows are the mean of the others, and their number a multiple of 64 in all, as in
    the published LLaVA-1.5.
    """
    have = spec.language.vocab
    if vocab <= have:
        return spec, params
    size, flat = -(-vocab // 64) * 64, flatten(params)
    for row in lmm.params(spec):
        if "vocab" in row.axes.split():
            axis, old = row.axes.split().index("vocab"), flat[row.path]
            mean = jnp.mean(old, axis, jnp.float32, keepdims=True).astype(old.dtype)
            new = jnp.repeat(mean, size - have, axis)
            flat[row.path] = jnp.concatenate([old, new], axis)
    language = dataclasses.replace(spec.language, vocab=size)
    params = traverse_util.unflatten_dict(flat, sep="/")
    return dataclasses.replace(spec, language=language), params


def _run(source: str | Path) -> experiment.Experiment:
    """A run on the devices there are, whatever it was trained on."""
    config = runs.load_run(source)
    config.mesh = dataclasses.asdict(MeshConfig())
    return experiment.build(config)


def placed(spec: LMMSpec):
    """All parameters, spread over all devices."""
    views = dict(crops=spec.crops, pinpoints=spec.pinpoints, fine=spec.fine)
    sizes = lmm.geometry(spec, images=1, prefix=0, suffix=2, **views)
    model = lmm.LMM(spec, make_plan(sizes, lmm.own_edits(spec, sizes)))
    abstract = jax.eval_shape(lambda key: lmm.init(model, key), jax.random.key(0))
    shardings = Axes(make_mesh(MeshConfig())).params(abstract, lmm.params(spec))
    return jax.tree.map(lambda x, s: x.update(sharding=s), abstract, shardings)


def _converted(source: str | Path, spec: LMMSpec):
    checkpoints = CheckpointReader(source)
    try:
        dtypes = flatten(checkpoints.dtypes("learning"))
        wanted = flatten(placed(spec))
        kept = {path: x.update(dtype=dtypes[path]) for path, x in wanted.items()}
        abstract = traverse_util.unflatten_dict(kept, sep="/")
        return checkpoints.restore_part(abstract, "learning")
    finally:
        checkpoints.close()


def _tokens(config: dict) -> dict:
    """Ids that belong to the vocabulary and not to the model."""
    names = ("image_token_index", "image_token_id", "pad_token_id")
    return {name: config[name] for name in names if config.get(name) is not None}


def _copy_processor(source: str | Path, target: str | Path) -> None:
    if (Path(source) / hub.PROCESSOR).is_file():
        shutil.copy(Path(source) / hub.PROCESSOR, target)


def _tokenizer(folder: Path) -> Tokenizer | None:
    files = (folder / name for name in ("tokenizer.json", "tokenizer.model"))
    return Tokenizer.load(folder) if any(map(Path.is_file, files)) else None


def main(_: list[str]) -> None:
    source, target = flags.FLAGS["from"].value, _TO.value
    start_processes()
    try:
        if _ADAPTER.value:
            to_adapter(source, target, _BASE.value)
        elif (Path(source) / "checkpoints").is_dir():
            to_hub(source, target, _KIND.value)
        else:
            from_hub(source, target, allow_unused=_UNUSED.value)
    except cli.EXPECTED as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    if jax.process_index() == 0:
        print(f"{target} written")


if __name__ == "__main__":
    app.run(main)
