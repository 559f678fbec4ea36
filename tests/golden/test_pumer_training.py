"""Losses, rates and decay of PuMer's fine-tuning against the reference implementation."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmm_jax import losses, optim
from lmm_jax.checkpoint.params import flatten
from lmm_jax.depth import make_plan
from lmm_jax.hub.families import meter as meter_family
from lmm_jax.hub.families import vilt_original
from lmm_jax.models import encoders, meter, vilt
from tests.golden import meter as golden_meter
from tests.golden import reference
from tests.golden import vilt as golden
from tests.test_full_size import build

CLOSE = dict(rtol=1e-5, atol=1e-6)


def both(loss, f, student):
    """A task's loss and distillation, as one sum with its gradient."""

    def total(student):
        task, _ = loss(student)
        kl = losses.distillation(student, f["in/teacher_logits"])
        return task + kl, (task, kl)

    (value, parts), grad = jax.value_and_grad(total, has_aux=True)(student)
    np.testing.assert_allclose(value, f["out/loss"], **CLOSE)
    np.testing.assert_allclose(parts[0], f["out/loss_task"], **CLOSE)
    np.testing.assert_allclose(parts[1], f["out/loss_logits"], **CLOSE)
    np.testing.assert_allclose(grad, f["grad/student_logits"], **CLOSE)


def test_many_labels():
    f = reference.load("pumer/losses_vqa")
    student, targets = jnp.asarray(f["in/student_logits"]), f["in/labels"]
    both(lambda x: losses.labels(x, targets), f, student)
    count = f.meta["config"]["num_labels"]
    loss, scalars = losses.labels(student, targets, scale=count)
    np.testing.assert_allclose(loss, f["out/loss_task_times_labels"], **CLOSE)
    np.testing.assert_allclose(scalars["accuracy"], f["out/accuracy"], **CLOSE)


def test_accuracy_is_the_target_of_the_highest_logit():
    targets = np.array([[0, 0.3, 1], [0.6, 0.9, 0]], np.float32)
    logits = np.array([[0, 2, 1], [1, 3, 2]], np.float32)
    assert losses.labels(logits, targets)[1]["accuracy"] == pytest.approx(0.6)


@pytest.mark.parametrize("task", ["nlvr2", "ve"])
def test_one_class(task):
    f = reference.load(f"pumer/losses_{task}")
    student, targets = jnp.asarray(f["in/student_logits"]), f["in/labels"]
    both(lambda x: losses.classes(x, targets), f, student)
    hits = (f["in/student_logits"].argmax(-1) == targets).mean()
    assert losses.classes(student, targets)[1]["accuracy"] == pytest.approx(hits)


def test_retrieval():
    f = reference.load("pumer/losses_retrieval")
    c = f.meta["config"]
    shape = c["groups"], c["pairs"]
    student, match = map(jnp.asarray, (f["in/student_rank_logits"], f["in/itm_logits"]))

    def total(student, match):
        rank, _ = losses.ranking(student.reshape(shape))
        itm, _ = losses.classes(match, f["in/itm_labels"])
        return rank + c["itm_loss_scale"] * itm, (rank, itm)

    grad = jax.value_and_grad(total, (0, 1), has_aux=True)
    (value, (rank, itm)), (to_student, to_match) = grad(student, match)
    np.testing.assert_allclose(value, f["out/loss"], **CLOSE)
    np.testing.assert_allclose(rank, f["out/loss_rank"], **CLOSE)
    np.testing.assert_allclose(itm, f["out/loss_itm"], **CLOSE)
    np.testing.assert_allclose(to_student, f["grad/student_rank_logits"], **CLOSE)
    np.testing.assert_allclose(to_match, f["grad/itm_logits"], **CLOSE)
    teacher = f["in/teacher_rank_logits"].reshape(shape)
    kl = losses.distillation(student.reshape(shape), teacher)
    np.testing.assert_allclose(kl, f["out/kl_over_candidates"], **CLOSE)
    with pytest.raises(ValueError, match="side by side"):
        losses.distillation(student, f["in/teacher_rank_logits"])


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_a_student_that_is_its_teacher_learns_nothing(temperature):
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, 9)), jnp.float32)

    def loss(student):
        return losses.distillation(student, logits, temperature=temperature)

    value, grad = jax.value_and_grad(loss)(logits)
    np.testing.assert_allclose(value, 0, atol=1e-6)
    np.testing.assert_allclose(grad, 0, atol=1e-6)


@pytest.mark.parametrize("kind", ["plain", "pumer"])
def test_losses_of_a_whole_model(kind):
    f = reference.load("pumer/vilt_vqa_a")
    loss, _ = losses.labels(f[f"out/{kind}.logits"], f["in/labels"])
    np.testing.assert_allclose(loss, f[f"out/{kind}.loss_task"], **CLOSE)
    kl = losses.distillation(f["out/pumer.logits"], f["out/plain.logits"])
    np.testing.assert_allclose(kl, f["out/kl_teacher_plain_student_pumer"], **CLOSE)


MODELS = {
    "vilt": (vilt, golden.spec, vilt.Vilt, vilt_original),
    "meter": (meter, golden_meter.spec, meter.Meter, meter_family),
}


def recipe(model: str) -> optim.OptimConfig:
    """What the config of this model trains with."""
    return build("pumer", f"model={model},task=vqav2").config.optim


def last_layers(key: str) -> bool:
    """Of layers after the first of their stack, which ours holds in one array."""
    return re.search(r"(blocks|layers?)\.[1-9]", key) is not None


@pytest.mark.parametrize("name", MODELS)
def test_rates_and_decay_of_every_parameter(name):
    """In their code all that is called norm is spared, but not the norms of CLIP, called
    ln, nor that of a classifier, which has a number there for a name."""
    f = reference.load("pumer/optimizer_groups")
    module, sizes, kind, family = MODELS[name]
    spec = sizes(reference.load(f"pumer/{name}_vqa_a"))
    model = kind(spec, make_plan(module.geometry(spec, text=10), ()))
    abstract = jax.eval_shape(lambda k: encoders.init(model, k), jax.random.key(0))
    factors = flatten(optim.lr_factors(recipe(name), abstract))
    decays = flatten(optim.decay_mask(recipe(name), abstract))
    parts = f[f"out/{name}_vqa.lr_mult"], f[f"out/{name}_vqa.weight_decay"]
    theirs = dict(zip(f[f"in/{name}_vqa.names"].tolist(), zip(*parts)))
    fused = family.fused(spec).items()
    whole = {part: key for key, parts in fused for part, _ in parts}
    checked = set()
    for row in family.rows(spec):
        key = row.key.format(layer=0)
        key = whole.get(key, key)
        factor, decay = theirs[key]
        assert factors[row.path] == factor, key
        assert decays[row.path] == (decay > 0), key
        checked.add(key)
    assert checked == {key for key in theirs if not last_layers(key)}


def test_the_schedule():
    f = reference.load("pumer/optimizer_groups")
    c = f.meta["config"]["schedule"]
    schedule = optim.make_schedule(recipe("vilt"), c["total_steps"])
    ours = np.array([schedule(step) for step in range(len(f["out/lr_schedule"]))])
    np.testing.assert_allclose(ours, f["out/lr_schedule"][:, 1], rtol=1e-4, atol=1e-12)
    np.testing.assert_allclose(10 * ours, f["out/lr_schedule"][:, 0], rtol=1e-4)


@pytest.mark.parametrize("model", MODELS)
def test_every_model_ends_at_one_rate(model):
    o = recipe(model)
    assert optim.make_schedule(o, 10)(10) == pytest.approx(1e-7)
