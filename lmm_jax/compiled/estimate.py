"""How long a step takes at least: a roofline of every instruction.

An instruction takes the longer of its products at peak and its traffic at full bandwidth.
Exchanges take what a ring takes along every axis of the torus at once. Those that run
beside other work cost only what they are longer. Nothing here has been timed: real steps
are slower, by what products lose to their shapes and by latencies.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
from typing import Any

from lmm_jax.compiled.tpu import Slice
from lmm_jax.compiled.work import COLLECTIVES, Op, Work


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of a step.

    Attributes:
        computing: of all instructions but exchanges.
        products: what the matrix products alone would take at peak.
        waiting: of exchanges for which everything else waits.
        beside: of exchanges beside which something else runs.
    """

    computing: float
    products: float
    waiting: float
    beside: float

    @property
    def step(self) -> float:
        return self.waiting + max(self.computing, self.beside)


def estimate(work: Work, chips: Slice, devices: Sequence[Any]) -> Estimate:
    """Args:
    devices: in the order in which the program counts them.
    """
    chip = chips.chip
    computing = products = waiting = beside = 0.0
    for op in work.ops:
        if op.kind in COLLECTIVES:
            seconds = op.times * exchange(op, chips, devices)
            waiting += seconds * op.waits
            beside += seconds * (not op.waits)
            continue
        product = op.flops / chip.flops
        products += op.times * product
        computing += op.times * max(product, op.bytes / chip.bandwidth)
    return Estimate(computing, products, waiting, beside)


def exchange(op: Op, chips: Slice, devices: Sequence[Any]) -> float:
    """Seconds of one exchange."""
    group = [devices[number] for number in op.group] or list(devices)
    share = (len(group) - 1) / len(group)
    factor = {
        "all-reduce": 2 * share,  # a sum in pieces, then all get all pieces
        "all-to-all": len(group) / 4,  # a quarter of the ring, on average
        "collective-permute": 1.0,
    }.get(op.kind, share)
    return factor * op.moved / chips.speed(group)
