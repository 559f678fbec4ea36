"""Slices by name, and how fast their chips exchange."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest

from lmm_jax.compiled import tpu
from lmm_jax.compiled.tpu import Slice


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("v5e-256", "v5e:16x16"),
        ("v5e-8", "v5e:2x4"),
        ("v6e-1", "v6e:1x1"),
        ("v5p-8", "v5p:2x2x1"),  # 4 chips of two cores
        ("v5p-128", "v5p:4x4x4"),
        ("v4-256", "v4:4x4x8"),
        ("v5p:4x4x12", "v5p:4x4x12"),
    ],
)
def test_product_names_are_standard_shapes(name, shape):
    assert str(tpu.named(name)) == shape


@pytest.mark.parametrize("name", ["v5e", "v9:2x2", "", "v5e-256-2", "v5e:16x"])
def test_unknown_slices_are_refused(name):
    with pytest.raises(ValueError, match="GENERATION:SHAPE, for example v5e:16x16"):
        tpu.named(name)


@pytest.mark.parametrize("name", ["v5p-4", "v5p-129", "v5e-12"])
def test_impossible_products_are_refused(name):
    with pytest.raises(ValueError, match="power of two"):
        tpu.named(name)


def chips(*axes):
    return [SimpleNamespace(coords=at) for at in itertools.product(*axes)]


@pytest.mark.parametrize(
    ("group", "ports"),
    [
        (chips(range(16), range(16)), 4),
        (chips(range(16), [3]), 2),  # a whole ring
        (chips([0, 1], [3]), 1),  # neighbours
        (chips(range(8), [3]), 1),  # a line
        (chips(range(0, 16, 2), [3]), 1),  # a ring that two groups share
    ],
)
def test_a_group_receives_along_every_axis_it_spans(group, ports):
    whole = Slice("v5e", (16, 16))
    assert whole.speed(group) == ports * whole.chip.link
