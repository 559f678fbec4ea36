"""Some layers learn: what moves, what is kept, and what a training step computes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from lmm_jax import bench, experiment, partition, region, runs, train
from lmm_jax.checkpoint.compare import CheckpointError
from lmm_jax.checkpoint.state import CheckpointReader, Checkpoints
from lmm_jax.config import to_json
from lmm_jax.depth.cost import train_flops
from lmm_jax.partition import flatten
from tests.small import small_config
from tests.test_full_size import ONE, get_config, traced_update
from tests.test_train import same, updated

STACK = "language/stack/layers"
CHOSEN = (1, 4)
FEW = ("connector", region.pattern(CHOSEN))


def small(*learn: str, **lora) -> experiment.Experiment:
    config = small_config(Path("unwritten"), "llava", learn=learn)
    config.text.update(suffix=24)
    config.data.batch_size = 2
    config.lora.update(lora)
    return experiment.build(config, (jax.devices()[0],))


@pytest.fixture(scope="module")
def steps():
    """The parts of a run with weight decay, and its states before and after 3 updates."""
    exp = small(*FEW)
    parts = train.make_parts(exp)
    state, frozen = train.initial_state(exp, parts)
    before = jax.device_get((state.learning, frozen))
    for _ in range(3):
        batch = bench.random_batch(exp, parts.model, 2, learns=True)
        state, _ = parts.update(state, frozen, batch)
    return parts, before, jax.device_get((state.learning, frozen)), state


def test_all_that_learns_moves_and_nothing_else(steps):
    _, (learning, frozen), (after, rest), _ = steps
    jax.tree.map(np.testing.assert_array_equal, rest, frozen)
    for path, leaf in flatten(after).items():
        moved = np.abs(leaf - flatten(learning)[path])
        rows = moved.reshape(len(leaf), -1) if partition.stacked(path) else moved[None]
        assert np.all(rows.max(axis=tuple(range(1, rows.ndim))) > 0), path
    assert flatten(after)[f"{STACK}/q/kernel"].shape[0] == len(CHOSEN)


def test_only_what_learns_has_moments_in_float32(steps):
    parts, *_, state = steps
    learned = sum(x.size for x in jax.tree.leaves(state.learning))
    stored = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.opt_state))
    assert stored == pytest.approx(2 * 4 * learned, abs=100)  # and counters
    layers = [step for step in parts.model.plan.language if step.learns]
    assert [(step.start, step.stop) for step in layers] == [(1, 2), (4, 5)]
    assert not any(step.learns for step in parts.model.plan.vision)


def test_gradients_are_those_of_a_run_in_which_all_layers_learn():
    """A step of plain descent changes what learns as if all did."""
    few, all_ = small(*FEW), small("connector", STACK)
    batch = few.noise(few.model(train=True), 2, learns=True)
    (ours, _), (theirs, _) = (updated(exp, batch) for exp in (few, all_))
    ours, theirs = flatten(ours), flatten(theirs)
    for path, leaf in ours.items():
        right = (
            theirs[path][np.array(CHOSEN)] if partition.stacked(path) else theirs[path]
        )
        np.testing.assert_allclose(leaf, right, rtol=0, atol=1e-6)


def test_all_layers_by_name_and_none_are_the_ordinary_stages():
    """Not only equal in result: the same plan, selection and program."""
    every, none = region.pattern(range(6)), small("connector")
    one, other = (train.make_parts(small("connector", x)) for x in (every, STACK))
    assert one.model.plan == other.model.plan and one.selection == other.selection
    parts = train.make_parts(none)
    assert set(parts.abstract_state.learning) == {"connector"}
    assert not any(step.learns for step in parts.model.plan.language)


def test_a_checkpoint_holds_the_layers_that_learn_and_no_others(steps, tmp_path):
    parts, *_, state = steps
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, state)
    checkpoints.wait()
    same(checkpoints.restore(parts.abstract_state).state, state)
    checkpoints.close()
    other = train.make_parts(small("connector", region.pattern((1, 3, 4))))
    with pytest.raises(CheckpointError, match=r"q/kernel"):
        CheckpointReader(tmp_path).restore(other.abstract_state)


def test_a_workdir_in_which_as_many_other_layers_learn_is_refused(tmp_path):
    config = small_config(tmp_path, "llava", learn=FEW)
    runs.claim(config, tmp_path)
    (tmp_path / "config.json").write_text(to_json(config))
    runs.claim(config, tmp_path)
    config.train.learn = ("connector", region.pattern((1, 3)))
    with pytest.raises(ValueError, match=r"holds a run with train=.*layers\[1,4\]"):
        runs.claim(config, tmp_path)


# --- What a step computes ---------------------------------------------------------------


def products(jaxpr) -> float:
    """FLOPs of all products of a traced program, loops as often as they run."""
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            left, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
            total += 2.0 * np.prod(out) * np.prod([left[i] for i in contracted])
        times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        total += times * sum(map(products, _inner(eqn.params)))
    return total


def _inner(params) -> Iterator:
    for value in jax.tree.leaves(params, is_leaf=lambda x: hasattr(x, "eqns")):
        found = getattr(value, "jaxpr", value)
        if hasattr(found, "eqns"):
            yield found


def measured(argument: str, *learn: str, remat: str = "none") -> tuple[float, float]:
    """FLOPs of an example in a step of Vicuna-7B: traced, and by the plan."""
    config = get_config("visual_region", f"lm=vicuna-7b,{argument}")
    config.text.update(prefix=0, suffix=16)  # attention is not what theory speaks of
    config.model.remat = remat
    config.train.learn = learn or config.train.learn
    exp = experiment.build(config, ONE)
    parts, traced = traced_update(exp)
    learns = exp.learns(parts.abstract_state.learning)
    plan = train_flops(parts.model.plan, learns, pairs="all")
    return products(traced.jaxpr.jaxpr) / 2, plan


@pytest.fixture(scope="module")
def whole() -> dict[str, float]:
    """Where all layers learn, by what is recomputed."""
    kinds = ("none", "full")
    return {remat: measured("mode=full,layers=all", remat=remat)[0] for remat in kinds}


# The share of a layer's products that the backward pass repeats: all but the last.
AGAIN = {"none": 0.0, "full": 1 - 11_008 / (4 * 4096 + 3 * 11_008)}


def theory(lowest: int, learning: int, again: float) -> float:
    """Forward, gradients of inputs down to the lowest layer that must have them, gradients
    of the weights that learn, in units of the products of one of 32 layers."""
    return 32 + (1 + again) * (32 - lowest) + learning


@pytest.mark.parametrize(
    ("layers", "projector", "remat"),
    [
        ("uniform", True, "none"),
        ("top", True, "full"),
        ("top", False, "none"),
        ("top", False, "full"),
    ],
)
def test_a_step_computes_what_theory_says(whole, layers, projector, remat):
    chosen = region.select(layers, 32)
    learn = (*(["connector"] if projector else []), region.pattern(chosen))
    found, by_plan = measured("mode=full", *learn, remat=remat)
    again, lowest = AGAIN[remat], 0 if projector else chosen[0]
    ratio = theory(lowest, len(chosen), again) / theory(0, 32, again)
    assert found / whole[remat] == pytest.approx(ratio, rel=0.02)
    if remat == "none":
        assert ratio == (0.75 if projector else 0.5)
        assert found == pytest.approx(by_plan, rel=0.01)


@pytest.mark.parametrize("layers", ["all", "paper"])
def test_a_step_with_adapters_computes_what_the_plan_says(layers):
    found, by_plan = measured(f"layers={layers}")
    assert found == pytest.approx(by_plan, rel=0.01)
