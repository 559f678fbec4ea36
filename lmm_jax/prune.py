"""Removes the layers of a language model that it needs least.

    python -m lmm_jax.prune --config.workdir=RUN --count=4 --to=DIR
    python -m lmm_jax.prune --config.workdir=RUN --layers=13,14,20 --protect= --to=DIR

DIR is the directory of a run with fewer layers: `evaluate`, `generate` and `convert` read
it, and a training that heals it starts with `--config.init.run=DIR`. Layers that RUN has
tuned, its region, stay unless `--protect` says otherwise. All layers are named by their
numbers in the model that was pruned first.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from absl import flags
import jax
import ml_collections

from lmm_jax import cli, experiment, importance, pruning, runs, weights
from lmm_jax.depth.table import table
from lmm_jax.experiment import Conversing

_TO = flags.DEFINE_string("to", None, "What is written; must not exist.", required=True)
_COUNT = flags.DEFINE_integer("count", 0, "Layers to remove.", lower_bound=0)
_CRITERION = flags.DEFINE_enum(
    "criterion",
    "angular_hidden",
    [*importance.METHODS, "reverse_order", "random"],
    "What tells how much a layer is needed.",
)
_MODE = flags.DEFINE_enum(
    "mode",
    "independent",
    list(pruning.MODES),
    "Least needed layers, or block of layers, or one after the other, scored anew.",
)
_PROTECT = flags.DEFINE_list("protect", ["region"], "Layers that stay, or `region`.")
_LAYERS = flags.DEFINE_list("layers", [], "Removes these in place of --count others.")
_SAMPLES = flags.DEFINE_integer("samples", 256, "Prompts of the data.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of --criterion=random.")
_BASE = flags.DEFINE_string("base", "", "What RUN was tuned from.")
_REVERT = flags.DEFINE_list(
    "revert", [], "Layers that are put back to those of --base."
)


def main(argv: list[str], config: ml_collections.ConfigDict) -> None:
    exp = importance.scored(experiment.build(config))
    experiment.prepare_data(exp)
    to = Path(_TO.value)
    runs.must_be_new(to)
    params = weights.to_run(exp, exp.model(train=False))
    if _REVERT.value:
        back = pruning.indices(exp.spec.language.numbers, _REVERT.value)
        params = pruning.revert_layers(params, base(exp), back)
    spared = pruning.protected(exp, _PROTECT.value)
    gone = removed(exp, params, spared)
    smaller, params = pruning.without(exp, params, gone, spared)
    pruning.write(smaller, config, params, to)
    if jax.process_index() == 0:
        kept = smaller.spec.language.numbers
        print(table(smaller.plan(train=False)))
        print(f"{to} written: {len(kept)} layers, {', '.join(map(str, kept))}")


def removed(exp: Conversing, params, spared: Sequence[int]) -> tuple[int, ...]:
    """Indices of the layers to remove; no number in `spared` is theirs.

    Raises:
        ValueError: there are not so many, or a listed one is protected or not there.
    """
    language = exp.spec.language
    if _LAYERS.value:
        return pruning.listed(language.numbers, _LAYERS.value, spared)
    protect = [i for i, number in enumerate(language.numbers) if number in spared]
    criterion, free = _CRITERION.value, pruning.by_number(language.depth, _SEED.value)
    score = free.get(criterion)
    if score is None:
        compares = importance.METHODS[criterion].program is None
        compared = {"base": base(exp)} if compares else {}
        score = pruning.scorer(
            exp, params, criterion, samples=_SAMPLES.value, **compared
        )
    return pruning.choose(score, language.depth, _COUNT.value, protect, _MODE.value)


def base(exp: Conversing):
    """Parameters that those of the run are compared with, or put back to.

    Raises:
        ValueError: none are named.
    """
    path = importance.base_of(exp, _BASE.value)
    if not path:
        raise ValueError("there is nothing to compare with: give --base=RUN.")
    return weights.whole(exp, exp.model(train=False), path)


if __name__ == "__main__":
    cli.run(main)
