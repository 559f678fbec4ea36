"""Encoders with a head, by name, and what their kinds have in common."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from lmm_jax.models import meter, vilt
from lmm_jax.models.heads import head
from lmm_jax.models.meter import MeterSpec
from lmm_jax.models.specs import vit_block
from lmm_jax.models.vilt import ViltSpec

EncoderSpec = ViltSpec | MeterSpec
Encoder = vilt.Vilt | meter.Meter


def quickstart(task: str) -> ViltSpec:
    """A ViLT of 1 M parameters that learns within minutes on a CPU."""
    block = vit_block(96, 4, 256, "gelu", norm_eps=1e-6)
    found = head(task, block.width)
    vision = vilt.patches(64, 8, block)
    return ViltSpec(vision, block, 6, 512, 40, types=1 + found.images, head=found)


def tiny(task: str) -> ViltSpec:
    """A ViLT that trains within seconds, for tests."""
    block = vit_block(24, 2, 32, "gelu", norm_eps=1e-6)
    found = head(task, block.width)
    vision = vilt.patches(32, 8, block)
    return ViltSpec(vision, block, 2, 512, 40, types=1 + found.images, head=found)


NAMED: dict[str, Callable[[str], EncoderSpec]] = {
    "meter-b-16": meter.b_16,
    "quickstart-vilt": quickstart,
    "tiny-vilt": tiny,
    "vilt-b-32": vilt.b_32,
}


def named(name: str, task: str) -> EncoderSpec:
    """Sizes of an encoder with the head of a task.

    Raises:
        ValueError: no such encoder or task; lists those that exist.
    """
    if name not in NAMED:
        raise ValueError(f"model.encoder={name!r}: use one of {', '.join(NAMED)}.")
    return NAMED[name](task)


def headed(spec: EncoderSpec, task: str) -> EncoderSpec:
    """The same encoder with the head of a task, unless it has one, and with types for all
    images that this reads.

    Raises:
        ValueError: no such task.
    """
    if spec.head and spec.head.task == task:
        return spec
    found = head(task, spec.block.width)
    types = max(spec.types, 1 + found.images)
    return dataclasses.replace(spec, head=found, types=types)


def classes(spec: EncoderSpec, count: int) -> EncoderSpec:
    """The same encoder with a head of so many classes."""
    return dataclasses.replace(spec, head=dataclasses.replace(spec.head, outputs=count))


def family(spec: EncoderSpec) -> ModuleType:
    """The module of a spec: `geometry` and `params`."""
    return {ViltSpec: vilt, MeterSpec: meter}[type(spec)]


def build(spec: EncoderSpec, *arguments: Any) -> Encoder:
    """The model of a spec along a plan; see `Vilt`."""
    return {ViltSpec: vilt.Vilt, MeterSpec: meter.Meter}[type(spec)](spec, *arguments)


def abstract_batch(model: Encoder, size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the batch that a model reads, of images that fill their canvas."""
    g, patch = model.plan.geometry, model.spec.vision.patch
    height, width = (side * patch for side in g.grid)
    return {
        "images": jax.ShapeDtypeStruct((size, g.rows, height, width, 3), jnp.uint8),
        "tokens": jax.ShapeDtypeStruct((size, g.prefix), jnp.int32),
        "valid": jax.ShapeDtypeStruct((size, g.prefix), bool),
    }


def init(model: Encoder, rng: jax.Array) -> dict[str, Any]:
    """Fresh parameters. Call it under `jax.jit` or `jax.eval_shape`."""
    abstract = abstract_batch(model, 1)
    batch = {name: jnp.zeros(x.shape, x.dtype) for name, x in abstract.items()}

    def run(model, batch):
        pooled = model.pooled(model(batch).state)
        return model.head(pooled) if model.spec.head else pooled

    return model.init(rng, batch, method=run)["params"]
