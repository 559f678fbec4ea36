"""Trains a model along a depth plan.

    python -m lmm_jax.train --config=configs/quickstart.py
    python -m lmm_jax.train --config=configs/deepstack.py:lm=vicuna-13b

The story, top to bottom: set up, read data, build the state, compile one update, loop.
Started again with the same work directory it goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import json
from pathlib import Path
import sys
import time
from typing import Any

from absl import logging
from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp
import ml_collections
import optax

from lmm_jax import (
    cli,
    evaluate,
    experiment,
    metrics,
    optim,
    partition,
    runs,
    weights,
)
from lmm_jax.checkpoint.state import Checkpoints
from lmm_jax.data import pipeline
from lmm_jax.depth.cost import train_flops
from lmm_jax.depth.table import table
from lmm_jax.eval import report
from lmm_jax.experiment import Experiment
from lmm_jax.objectives import Objective
from lmm_jax.parallel import overlap
from lmm_jax.parallel.stop import Stopping
from lmm_jax.sections import InitConfig, TrainConfig

Array = jax.Array


@struct.dataclass
class TrainState:
    """What a training step changes.

    Attributes:
        step: int32 [], updates done.
        learning: parameters that learn (rows of stacked layers where only some do).
        opt_state: of the learning parameters only.
    """

    step: Array
    learning: Any
    opt_state: Any


# --- The update ---------------------------------------------------------------------


def make_update(
    objective: Objective,
    selection: partition.Selection,
    transform: optax.GradientTransformation,
    config: TrainConfig,
) -> Callable[[TrainState, Any, dict[str, Array]], tuple[TrainState, dict[str, Array]]]:
    """The one update of all models and strategies: (state, frozen, batch) -> (state,
    scalars).

    Pure and uncompiled: training jits it, ahead-of-time compilation lowers it.
    """

    def loss_fn(learning, frozen, batch, rng, share):
        params = partition.beside(learning, frozen, selection)
        loss, scalars = objective(params, batch, rng)
        return share * loss, scalars

    def update(state, frozen, batch):
        rng = jax.random.fold_in(jax.random.key(config.seed), state.step)
        total = objective.weight(batch)

        def gradients(batch, rng):
            targets = objective.weight(batch)
            share = 1.0 / config.accumulate
            if (
                config.loss_shards == 1
            ):  # one mean over all targets of all micro-batches
                share = targets / jnp.maximum(total, 1)
            grads, scalars = jax.grad(loss_fn, has_aux=True)(
                state.learning, frozen, batch, rng, share
            )
            counted = {name: share * x for name, x in scalars.items()}
            return grads, {**counted, objective.unit: targets}

        grads, scalars = _accumulated(gradients, batch, rng, config.accumulate)
        scalars["grad_norm"] = optax.global_norm(grads)
        updates, opt_state = transform.update(grads, state.opt_state, state.learning)
        learning = optax.apply_updates(state.learning, updates)
        return TrainState(state.step + 1, learning, opt_state), scalars

    return update


def _accumulated(gradients, batch, rng, count: int):
    """Sums gradients and scalars over `count` micro-batches, one after the other."""
    if count == 1:
        return gradients(batch, rng)
    micro = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]), batch)
    micro = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), micro)

    def body(total, xs):
        part = gradients(*xs)
        return jax.tree.map(jnp.add, total, part), None

    keys = jax.random.split(rng, count)
    shapes = jax.eval_shape(gradients, jax.tree.map(lambda x: x[0], micro), keys[0])
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(body, zeros, (micro, keys))[0]


# --- The state ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Parts:
    """Everything a run needs that exists before its arrays do.

    Attributes:
        model: along the training plan.
        selection: what learns.
        update: compiled on first call; donates the state.
        abstract_state, abstract_frozen: shapes, dtypes and shardings.
        schedule: learning rate by update.
    """

    model: nn.Module
    selection: partition.Selection
    transform: optax.GradientTransformation
    schedule: optax.Schedule
    update: Callable
    abstract_state: TrainState
    abstract_frozen: Any


def make_parts(exp: Experiment) -> Parts:
    """Builds the parts of a run from abstract values alone."""
    config, axes = exp.config, exp.axes
    model = exp.model(train=True)
    abstract = exp.placed_params(model)
    selection = partition.select(abstract, exp.learned)
    learning, frozen = partition.split(abstract, selection)
    learning = jax.tree.map(lambda x: x.update(dtype=jnp.float32), learning)
    transform, schedule = optim.make(config.optim, config.train.steps, learning)
    opt_state = jax.eval_shape(transform.init, learning)
    state = TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32, sharding=axes.sharding()),
        learning=learning,
        opt_state=_like_params(opt_state, learning, axes.sharding()),
    )
    objective = exp.objective(model)
    update = make_update(objective, selection, transform, config.train)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    device = axes.mesh.devices.flat[0]
    update = jax.jit(
        update,
        donate_argnums=0,
        out_shardings=(shardings, None),
        compiler_options=overlap.options(device) if config.train.overlap else None,
    )
    return Parts(model, selection, transform, schedule, update, state, frozen)


def initial_state(exp: Experiment, parts: Parts) -> tuple[TrainState, Any]:
    """Fresh parameters, or what `init` names; each is made where it will live."""
    shardings = jax.tree.map(
        lambda x: x.sharding, (parts.abstract_state, parts.abstract_frozen)
    )

    def make(params):
        learning, frozen = partition.split(params, parts.selection)
        learning = jax.tree.map(lambda x: x.astype(jnp.float32), learning)
        step = jnp.zeros((), jnp.int32)
        return TrainState(step, learning, parts.transform.init(learning)), frozen

    if exp.config.init != InitConfig():
        params = weights.initial(exp, parts.model)
        return jax.jit(make, out_shardings=shardings, donate_argnums=0)(params)

    def fresh(key):
        return make(exp.fresh(parts.model, key))

    key = jax.random.key(exp.config.train.seed)
    return jax.jit(fresh, out_shardings=shardings)(key)


def _like_params(opt_state, learning, replicated):
    """Moments are sharded like their parameters, everything else is replicated."""
    by_path = {
        tuple(path): leaf.sharding
        for path, leaf in jax.tree_util.tree_flatten_with_path(learning)[0]
    }

    def place(path, leaf):
        tails = (tuple(path[i:]) for i in range(len(path)))
        sharding = next((by_path[t] for t in tails if t in by_path), replicated)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, opt_state)


# --- The loop -----------------------------------------------------------------------


def train(config: ml_collections.ConfigDict) -> Path:
    """Runs or resumes a training; returns its work directory."""
    began = time.perf_counter()
    exp = experiment.build(config)
    settings = exp.config.train
    workdir = Path(exp.config.workdir)
    chief = jax.process_index() == 0
    experiment.prepare_data(exp)  # it may say how many classes there are
    plan = exp.plan(train=True)
    if chief:
        print(table(plan), flush=True)
    if chief:
        runs.claim(config, workdir)

    source = pipeline.open_sources(exp.config.data)
    samples = exp.samples(plan)
    ledger = pipeline.SkipLedger(exp.config.data.max_skipped, source, samples)

    parts = make_parts(exp)
    checkpoints = Checkpoints(
        workdir, keep=exp.config.checkpoint.keep, every=exp.config.checkpoint.every
    )
    try:
        state, frozen, meta = _restore_or_init(exp, parts, checkpoints)
    except BaseException:
        checkpoints.close()  # what its threads still had to do would drown the message
        raise
    if chief:  # not before: a start that failed must not shape the next one
        runs.describe(exp, config, workdir)
    step, before = int(state.step), float(meta.get("seconds", 0.0))
    batches = pipeline.train_batches(
        source,
        samples,
        exp.config.data,
        start=step,
        own=exp.axes.own_rows(exp.config.data.batch_size),
    )
    if chief:
        counts = [_count(tree) for tree in (state.learning, frozen)]
        print(f"parameters: {counts[0]:,} learn, {counts[1]:,} frozen", flush=True)
        if step == 0:
            print(_preview(exp, source, plan), flush=True)

    flops = train_flops(plan, exp.learns(parts.abstract_state.learning))
    rows = exp.config.data.batch_size * exp.candidates
    tokens = rows * plan.entrance.length
    work = metrics.Work.on_devices(tokens, rows * flops)
    shown = metrics.Progress(settings.steps, start=step, every=settings.log_every)
    writers = metrics.Writers(workdir, settings.writers)
    rates, late = metrics.Rates(work, began), metrics.Late()
    trace = metrics.Trace(workdir, settings.profile)
    stopping = Stopping()
    start = time.perf_counter()

    def seconds() -> float:
        return before + time.perf_counter() - start

    def report(done):
        if done is None:
            return
        at, scalars, beside = done
        for _, name, reason in ledger.observe(beside):
            if chief:
                logging.warning("skipped %s: %s", name, reason)
        values = metrics.tagged("train", scalars) | rates.tick(at)
        if chief:
            shown.show(at, values)
            if at % settings.log_every == 0 or at == settings.steps:
                values["train/learning_rate"] = float(parts.schedule(at - 1))
                writers.write(at, values)

    def save():
        report(late.flush())  # a state that led to NaN must not become a checkpoint
        meta = {"seconds": seconds(), "skipped": sorted(ledger.reasons)}
        checkpoints.save(step, state, meta=meta)
        rates.pause()  # the wait is not training speed

    try:
        while step < settings.steps:
            with rates.waiting():
                batch = next(batches)
            skipped = exp.gathered({"skipped": batch["skipped"]})
            arrays = exp.place(batch)
            trace.before(step + 1)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, scalars = parts.update(state, frozen, arrays)
            step += 1
            trace.after(step, state)
            report(late.push(step, scalars, skipped))
            if stopping.at(step) and step < settings.steps:
                save()
                checkpoints.wait()
                print(f"stopped at step {step}; the same command resumes", flush=True)
                sys.exit(143)
            if checkpoints.due(step) or step == settings.steps:
                save()
        report(late.flush())
        if chief:
            record = {"steps": step, "seconds": seconds()}
            (workdir / "training.json").write_text(json.dumps(record) + "\n")
    finally:
        stopping.restore()
        shown.close()
        writers.close()
        checkpoints.close()
        batches.close()
    return workdir


def _restore_or_init(exp, parts, checkpoints):
    """A checkpoint in the work directory comes first, then `init`, then fresh arrays."""
    if checkpoints.latest_step is None:
        state, frozen = initial_state(exp, parts)
        if jax.tree.leaves(frozen):
            checkpoints.save_frozen(frozen)
        return state, frozen, {}
    restored = checkpoints.restore(parts.abstract_state)
    frozen = parts.abstract_frozen
    if jax.tree.leaves(frozen):
        frozen = checkpoints.restore_frozen(frozen)
    logging.info("resumed at step %d", restored.step)
    return restored.state, frozen, restored.meta


def _preview(exp: Experiment, source, plan) -> str:
    """The first samples with what is supervised in colour, before the first step."""
    shown = []
    for index in range(min(2, len(source))):
        try:
            shown.append(exp.preview(source[index], plan))
        except pipeline.BadRecord:
            continue
    return "supervised tokens in colour:\n" + "\n---\n".join(shown)


def _count(tree) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


def main(argv: list[str], config: ml_collections.ConfigDict) -> None:
    workdir = train(config)
    exp = experiment.build(config)
    if exp.config.eval.after_training:
        records = evaluate.evaluate(exp)
        if jax.process_index() == 0:
            print(report.markdown(records))
    if jax.process_index() == 0:
        print(_next_commands(exp, workdir))


def _next_commands(exp: Experiment, workdir: Path) -> str:
    """What a user may want to type now."""
    return f"""
results     {workdir}/results.json, metrics.jsonl, plan.txt
{exp.next_commands()}
evaluate    python -m lmm_jax.evaluate --config.workdir={workdir}
its depth   python -m lmm_jax.depth.plan --config.workdir={workdir}
curves      tensorboard --logdir={workdir}"""


if __name__ == "__main__":
    cli.run(main)
