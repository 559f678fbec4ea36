"""Seconds of work whose parts are known."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lmm_jax.compiled.estimate import estimate
from lmm_jax.compiled.tpu import Slice
from lmm_jax.compiled.work import Op, Work

SLICE = Slice("v5e", (4, 4))
DEVICES = [SimpleNamespace(coords=(i, j)) for i in range(4) for j in range(4)]


def found(*ops: Op):
    return estimate(Work(ops, 0), SLICE, DEVICES)


def test_an_instruction_takes_the_longer_of_products_and_traffic():
    bound = Op("fusion", 2, flops=197e9, bytes=1)  # 1 ms each
    slow = Op("copy", 3, bytes=819e6)
    told = found(bound, slow)
    assert told.computing == pytest.approx(5e-3)
    assert told.products == pytest.approx(2e-3)
    assert told.step == told.computing


@pytest.mark.parametrize(
    ("kind", "share"), [("all-gather", 3 / 4), ("all-reduce", 6 / 4), ("all-to-all", 1)]
)
def test_exchanges_are_those_of_a_ring(kind, share):
    op = Op(kind, 1, moved=50_000_000, group=(0, 1, 2, 3))  # 1 ms through a port
    assert found(op).waiting == pytest.approx(1e-3 * share)


def test_what_runs_beside_costs_only_what_is_longer():
    gather = Op("all-gather", 1, moved=100_000_000, group=(0, 1), waits=False)  # 1 ms
    short, long = (Op("fusion", n, flops=197e8) for n in (5, 20))  # 0.1 ms each
    assert found(gather, short).step == pytest.approx(1e-3)
    assert found(gather, long).step == pytest.approx(2e-3)
