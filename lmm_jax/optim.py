"""The optimizer: AdamW, warm-up and decay of the rate, clipping, rates per part."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import math
from typing import Any, Literal

import jax
import optax

from lmm_jax import partition


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule; the defaults are LLaVA-1.5's (arXiv:2310.03744).

    Attributes:
      lr: peak learning rate.
      warmup_ratio: share of the steps that warm up, rounded up to whole steps.
      warmup_steps: the same in steps; give at most one of the two.
      schedule: shape of the decay after the warm-up.
      final_lr_ratio: rate after the last step as a share of `lr`.
      weight_decay: decoupled decay, times the learning rate.
      no_decay: patterns (`partition.matching`) of parameters without decay; a pattern
        without a match is fine here.
      clip: largest global norm of a gradient, or None for no clipping.
      lr_scale: pattern -> factor on the rate, for parts with a rate of their own.
      mu_dtype: dtype of the first moment, such as "bfloat16"; None: the parameter's.
    """

    lr: float
    warmup_ratio: float = 0.0
    warmup_steps: int = 0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final_lr_ratio: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    no_decay: tuple[str, ...] = ("(.*/)?(bias|scale)", "(.*/)?[^/]*embed[^/]*")
    clip: float | None = None
    lr_scale: Mapping[str, float] = dataclasses.field(default_factory=dict)
    mu_dtype: str | None = None

    def __post_init__(self) -> None:
        if self.warmup_ratio and self.warmup_steps:
            raise ValueError(
                f"warmup_ratio={self.warmup_ratio} and warmup_steps="
                f"{self.warmup_steps}: give one of them"
            )
        if not 0 <= self.warmup_ratio < 1 or self.warmup_steps < 0:
            raise ValueError(
                f"warmup_ratio={self.warmup_ratio} must be in [0, 1) and warmup_steps="
                f"{self.warmup_steps} at least 0"
            )
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"clip={self.clip} must be positive; None turns it off")


def make(
    config: OptimConfig, steps: int, params: partition.Tree
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """(transformation, schedule) for a run of `steps` updates.

    The schedule maps the number of past updates to the rate, without `lr_scale`.

    Args:
      params: the learning parameters, arrays or abstract; only paths are read.

    Raises:
      ValueError: no parameter learns, the warm-up fills the run, or a pattern of
        `lr_scale` matches nothing or what another one matches.
    """
    if not jax.tree.leaves(params):
        raise ValueError("no parameter learns; name some in the selection")
    schedule = make_schedule(config, steps)
    parts = [
        optax.adamw(
            schedule,
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            mu_dtype=config.mu_dtype,
            weight_decay=config.weight_decay,
            mask=decay_mask(config, params),
        )
    ]
    if config.clip is not None:
        parts.insert(0, optax.clip_by_global_norm(config.clip))
    if config.lr_scale:
        parts.append(_scaled(lr_factors(config, params)))
    transformation = optax.chain(*parts)
    return transformation, schedule


def make_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then the decay; it reaches its end after the last step.

    Raises:
      ValueError: the warm-up leaves no step, or the schedule's name is unknown.
    """
    # 0.07 * 100 is 7.000000000000001 and warms up for 8 steps, as in the reference.
    warmup = config.warmup_steps or math.ceil(config.warmup_ratio * steps)
    rest = steps - warmup
    if rest < 1:
        raise ValueError(
            f"{warmup} warm-up steps leave nothing of {steps} steps; train longer or "
            "set warmup_ratio=0"
        )
    end = config.lr * config.final_lr_ratio
    match config.schedule:
        case "cosine":
            decay = optax.cosine_decay_schedule(config.lr, rest, config.final_lr_ratio)
        case "linear":
            decay = optax.linear_schedule(config.lr, end, rest)
        case "constant":
            decay = optax.constant_schedule(config.lr)
        case other:
            raise ValueError(f"schedule {other!r}: use cosine, linear or constant")
    if not warmup:
        return decay
    rise = optax.linear_schedule(0.0, config.lr, warmup)
    return optax.join_schedules([rise, decay], [warmup])


def decay_mask(config: OptimConfig, params: partition.Tree) -> dict:
    """True where weight decay applies: not on biases, norm scales and embeddings."""
    paths = partition.flatten(params)
    spared = {
        path
        for pattern in config.no_decay
        for path in partition.matching(pattern, paths)
    }
    return partition.mark(params, lambda path: path not in spared)


def lr_factors(config: OptimConfig, params: partition.Tree) -> dict:
    """The factor on the learning rate of every parameter.

    Raises:
      ValueError: a pattern matches nothing, or two match the same parameter.
    """
    paths, factors, owner = partition.flatten(params), {}, {}
    for pattern, factor in config.lr_scale.items():
        for path in partition.require(pattern, paths):
            if path in owner:
                raise ValueError(
                    f"lr_scale: {owner[path]!r} and {pattern!r} both match {path!r}; "
                    "make them disjoint"
                )
            owner[path], factors[path] = pattern, factor
    return partition.mark(params, lambda path: factors.get(path, 1.0))


def _scaled(factors: Any) -> optax.GradientTransformation:
    def scale(updates, params=None):
        del params
        return jax.tree.map(lambda update, factor: update * factor, updates, factors)

    return optax.stateless(scale)
