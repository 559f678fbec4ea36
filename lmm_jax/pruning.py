"""Layers of a language model that it needs least, and the model without them.

Gromov et al., arXiv:2403.17887; Visual Region, arXiv:2412.12785, section on pruning. Layers
have an index in the model as it is, and a number, their index in the model that was pruned
first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
import dataclasses
from pathlib import Path
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from lmm_jax import importance, runs, weights
from lmm_jax.checkpoint.state import Checkpoints
from lmm_jax.depth import Edit, Inject, Plan, Query, Reduce, Tune
from lmm_jax.experiment import Conversing
from lmm_jax.lora import LoraConfig
from lmm_jax.partition import LAYERS
from lmm_jax.sections import InitConfig

Tree = Mapping[str, Any]
# (indices of the layers that are left, layers of a block) to a score of each block
Score = Callable[[Sequence[int], int], np.ndarray]
MODES = ("independent", "contiguous", "greedy")
TRAINED = "training.json"


# --- What is removed --------------------------------------------------------------------


def region(exp: Conversing) -> tuple[int, ...]:
    """Numbers of the layers that a run has tuned, or that an earlier pruning spared."""
    language = exp.spec.language
    if language.kept:
        return language.region
    tunes = (edit for edit in exp.plan(train=True).edits if isinstance(edit, Tune))
    of_language = (tune.layers for tune in tunes if tune.stack == "language")
    return next(of_language, tuple(range(language.depth)))


def choose(
    score: Score, depth: int, count: int, protect: Collection[int], mode: str
) -> tuple[int, ...]:
    """Indices of `count` layers to remove, ascending; ties go to the lower one.

    Args:
        score: called once, in mode "greedy" before every removal.
        protect: indices of layers that stay.

    Raises:
        ValueError: there are not so many, or not so many side by side.
    """
    free = sorted(set(range(depth)) - set(protect))
    if count > len(free):
        raise ValueError(
            f"{count} layers to remove, but only {len(free)} of {depth} are not protected: "
            "use a smaller --count, or protect fewer (--protect=LIST)."
        )
    if not count:
        return ()
    left = list(range(depth))
    if mode == "contiguous":
        found = score(left, count)
        starts = [i for i in free if set(range(i, i + count)) <= set(free)]
        if not starts:
            raise ValueError(
                f"no {count} layers side by side without one of {sorted(protect)}, which "
                "are protected: use a smaller --count, or --mode=independent."
            )
        start = min(starts, key=lambda i: found[i])
        return tuple(range(start, start + count))
    at_once = 1 if mode == "greedy" else count
    for _ in range(0, count, at_once):
        found = dict(zip(left, score(left, 1)))
        least = sorted((i for i in left if i in free), key=found.get)[:at_once]
        left = [i for i in left if i not in least]
    return tuple(sorted(set(range(depth)) - set(left)))


def scorer(
    exp: Conversing,
    params: Tree,
    criterion: str,
    *,
    samples: int,
    base: Tree | None = None,
) -> Score:
    """Scores of a model with some of its layers; see `importance.scores`."""

    def score(left: Sequence[int], block: int) -> np.ndarray:
        smaller = _with(exp, left)
        compared = None if base is None else keep_layers(base, left)
        return importance.scores(
            smaller,
            smaller.model(train=False),
            keep_layers(params, left),
            criterion,
            samples=samples,
            base=compared,
            block=block,
        )

    return score


def by_number(depth: int, seed: int) -> dict[str, Score]:
    """Criteria that need no model: the last layers first, or any."""
    drawn = np.random.default_rng(seed).permutation(depth)
    values = {"reverse_order": -np.arange(depth), "random": drawn}

    def score(of: np.ndarray) -> Score:
        return lambda left, block: np.convolve(of[left], np.ones(block), "valid")

    return {name: score(of) for name, of in values.items()}


def listed(
    numbers: Sequence[int], words: Sequence[str], spared: Collection[int]
) -> tuple[int, ...]:
    """`indices` of layers to remove.

    Raises:
        ValueError: as there, or some of them are spared.
    """
    gone = indices(numbers, words)
    if held := sorted({numbers[i] for i in gone} & set(spared)):
        raise ValueError(f"layers {held} are protected: leave them out, or --protect=.")
    return gone


def protected(exp: Conversing, words: Sequence[str]) -> tuple[int, ...]:
    """Numbers of layers: those listed, and the region where one says so."""
    numbers = exp.spec.language.numbers
    listed = indices(numbers, [word for word in words if word != "region"])
    found = {numbers[i] for i in listed}
    if "region" in words:
        found.update(region(exp))
    return tuple(sorted(found))


def indices(numbers: Sequence[int], words: Sequence[str]) -> tuple[int, ...]:
    """Where layers of these numbers are now.

    Raises:
        ValueError: a word that is no number, or no layer has it.
    """
    try:
        return tuple(sorted(numbers.index(int(word)) for word in words))
    except ValueError:
        raise ValueError(
            f"layers {','.join(words)}: there are {','.join(map(str, numbers))}."
        ) from None


# --- What is left -----------------------------------------------------------------------


def without(
    exp: Conversing, params: Tree, gone: Collection[int], region: Sequence[int] = ()
) -> tuple[Conversing, Tree]:
    """An experiment and its parameters without some layers.

    Args:
        params: all of them, adapters merged.
        gone: indices of layers.
        region: numbers of layers that later prunings are to spare.

    Raises:
        ValueError: an edit of its plan would act elsewhere.
    """
    left = [i for i in range(exp.spec.language.depth) if i not in gone]
    smaller = _with(exp, left, region)
    model = smaller.model(train=False)
    check_edits(exp.plan(train=False), model.plan, left)
    placed = smaller.placed_params(model)
    shardings = {
        name: jax.tree.map(lambda x: x.sharding, placed[name]) for name in params
    }
    keep = jax.jit(lambda params: keep_layers(params, left), out_shardings=shardings)
    return smaller, keep(params)


def _with(exp: Conversing, left: Sequence[int], region: Sequence[int] = ()):
    language = exp.spec.language.left(left, region)
    return dataclasses.replace(exp, language=language)


def check_edits(plan: Plan, smaller: Plan, left: Sequence[int]) -> None:
    """Passes if all edits act where they did.

    Raises:
        ValueError: one does not; says which layers must stay for it.
    """
    for edit, other in zip(plan.edits, smaller.edits):
        held = _below(edit)
        if not set(range(held)) <= set(left) or _below(other) != held:
            raise ValueError(
                f"{edit.name} acts before or at layer {held}, which would be another one: "
                f"--protect all below ({','.join(map(str, range(held)))}) too, or prune a "
                "run without it."
            )


def _below(edit: Edit) -> int:
    """How many of the first language layers must stay where they are for an edit."""
    if isinstance(edit, Inject):
        return max(edit.layers) if edit.stack == "language" else 0
    if isinstance(edit, Reduce | Query) and edit.at.stack == "language":
        return edit.at.layer + (edit.at.phase == "inside")
    return 0


def write(exp: Conversing, config: ml_collections.ConfigDict, params, to: Path) -> None:
    """The run directory of a pruned model.

    Args:
        exp, params: as `without` returns them.
        config: that of the run.
    """
    checkpoints = Checkpoints(to)
    checkpoints.save(0, {"learning": params})
    checkpoints.close()
    if jax.process_index():
        return
    source = Path(weights.source(exp)) / TRAINED
    if source.is_file():
        shutil.copy(source, to)
    config = config.copy_and_resolve_references()
    # All parameters are in one checkpoint, whatever has learned before.
    config.workdir, config.train.learn = str(to), tuple(sorted(params))
    config.init = dataclasses.asdict(InitConfig())
    config.lora = dataclasses.asdict(LoraConfig())
    runs.describe(exp, config, to)


# --- Parameters ---------------------------------------------------------------------


def keep_layers(params: Tree, layers: Sequence[int]) -> dict[str, Any]:
    """Parameters of a whole model with these layers of its language model, bit for bit.

    Args:
        params: adapters merged.
        layers: indices, ascending; all of them give the same arrays.
    """
    rows = jnp.asarray(layers, jnp.int32)

    def kept(x):
        return x if len(layers) == len(x) else x[rows]

    return _layers(params, lambda stack: jax.tree.map(kept, stack))


def revert_layers(tuned: Tree, base: Tree, layers: Sequence[int]) -> dict[str, Any]:
    """Parameters of `tuned`, whose layers of these indices are those of `base`."""
    rows = jnp.asarray(layers, jnp.int32)
    before = base["language"]["stack"][LAYERS]

    def reverted(stack):
        return jax.tree.map(
            lambda x, y: jnp.asarray(x).at[rows].set(y[rows]), stack, before
        )

    return _layers(tuned, reverted)


def _layers(params: Tree, change: Callable[[Tree], Tree]) -> dict[str, Any]:
    language = params["language"]
    stack = {**language["stack"], LAYERS: change(language["stack"][LAYERS])}
    return {**params, "language": {**language, "stack": stack}}
