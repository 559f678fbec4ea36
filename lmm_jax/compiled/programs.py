"""The programs that training and answering run, lowered from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lmm_jax import decode, train
from lmm_jax.depth.cost import cost, train_flops
from lmm_jax.experiment import Conversing, Experiment
from lmm_jax.models import lmm

Name = Literal["update", "prefill", "decode"]
NAMES = ("update", "prefill", "decode")
NEW_TOKENS = 128  # slots for an answer where the config names no number


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A program before it is compiled.

    Attributes:
        program: lowered.
        held: bytes on one device by kind, of what is there before a step.
        examples: of a step.
        flops: that the model needs for a step, on all devices; recomputation does not
            count.
    """

    program: jax.stages.Lowered
    held: Mapping[str, int]
    examples: int
    flops: float


def lower(exp: Experiment, name: Name) -> Lowered:
    """A program of an experiment, for its devices.

    Raises:
        ValueError: an encoder has no such program.
    """
    if name == "update":
        return _update(exp)
    if not isinstance(exp, Conversing):
        raise ValueError(
            f"--program={name}: {exp.called} is an encoder, which decodes nothing; use "
            "--program=update."
        )
    return _prefill(exp) if name == "prefill" else _decode(exp)


def _update(exp: Experiment) -> Lowered:
    parts = train.make_parts(exp)
    batch = _placed(exp, exp.abstract_batch(parts.model))
    state, frozen = parts.abstract_state, parts.abstract_frozen
    held = {
        "parameters that learn": held_bytes(state.learning),
        "optimizer state": held_bytes(state.opt_state),
        "frozen parameters": held_bytes(frozen),
        "batch": held_bytes(batch),
    }
    size = exp.config.data.batch_size * exp.candidates
    flops = size * train_flops(parts.model.plan, exp.learns(state.learning))
    return Lowered(parts.update.lower(state, frozen, batch), held, size, flops)


def _prefill(exp: Conversing) -> Lowered:
    generator, params, batch, key = _prompts(exp)
    held = {"parameters": held_bytes(params), "batch": held_bytes(batch)}
    size = exp.config.eval.batch_size
    flops = size * cost(generator.model.plan).prefill
    program = generator.prefill.lower(params, batch, key)
    return Lowered(program, held, size, flops)


def _decode(exp: Conversing) -> Lowered:
    """The step from one token to the next, on the cache as prefill leaves it: prefill is
    compiled for its shardings."""
    generator, params, batch, key = _prompts(exp)
    prefill = generator.prefill.lower(params, batch, key)
    token, cache = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(generator.prefill, params, batch, key),
        prefill.compile().output_shardings,
    )
    held = {"parameters": held_bytes(params), "cache": held_bytes(cache)}
    size = exp.config.eval.batch_size
    flops = size * cost(generator.model.plan).decode
    program = generator.step.lower(params, token, cache, key)
    return Lowered(program, held, size, flops)


def _prompts(exp: Conversing):
    """A generator, and the shapes of what it reads."""
    model, told = exp.model(train=False), exp.config.eval
    slots = told.max_new_tokens or NEW_TOKENS
    generator = decode.Generator(model, slots, end=0, chunk=told.chunk)
    batch = _placed(exp, lmm.abstract_batch(model, told.batch_size))
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = key.update(sharding=exp.axes.sharding())
    return generator, exp.placed_params(model), batch, key


def _placed(exp: Experiment, batch: Mapping[str, Any]) -> dict[str, Any]:
    shardings = exp.axes.batch(batch)
    return {name: x.update(sharding=shardings[name]) for name, x in batch.items()}


def held_bytes(tree: Any) -> int:
    """On one device, of shapes with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize
        for x in jax.tree.leaves(tree)
    )
