"""Selections over depth: the published lists, and rules that hold at every size."""

from __future__ import annotations

import pytest

from lmm_jax import region
from lmm_jax.region import METHODS, PRESETS, select


@pytest.mark.parametrize(
    ("name", "depth", "count", "layers"),
    [
        ("uniform", 32, 8, PRESETS["paper_32x8"]),
        ("shifted", 32, 8, PRESETS["released_32x8"]),
        ("uniform", 40, 9, PRESETS["ours_40x9"]),
        ("uniform", 32, 16, (*range(0, 15, 2), *range(16, 31, 2))),
        ("uniform", 32, 4, (0, 8, 22, 30)),
        ("uniform", 32, 2, (0, 30)),
        ("uniform", 32, 1, (16,)),
        ("bottom", 32, 8, tuple(range(8))),
        ("midbottom", 32, 8, tuple(range(8, 16))),
        ("midtop", 32, 8, tuple(range(16, 24))),
        ("top", 32, 8, tuple(range(24, 32))),
        ("hybrid", 32, 8, (0, 1, 2, 3, 28, 29, 30, 31)),
        ("top", 32, 0, tuple(range(24, 32))),
        ("paper_32x8", 32, 0, PRESETS["paper_32x8"]),
        ("0+4+31", 32, 0, (0, 4, 31)),
        ("all", 3, 0, (0, 1, 2)),
        ("none", 3, 0, ()),
    ],
)
def test_names(name, depth, count, layers):
    assert select(name, depth, count) == layers


@pytest.mark.parametrize("name", METHODS)
def test_as_many_as_asked_for_each_once_in_order(name):
    for depth in range(1, 81):
        for count in range(1, depth + 1):
            if name == "shifted" and depth in (count, 2):
                continue  # nothing above the last layer
            layers = select(name, depth, count)
            assert len(layers) == count
            assert region.checked(layers, depth) == layers


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("unifrom", 32), r"layers='unifrom': use one of uniform, .*0\+4\+8"),
        (("0+4+32", 32), r"layers \[32\] of \[0, 4, 32\] .* use 0..31"),
        (("4+0", 32), "must ascend: sort them"),
        (("paper_32x8", 24), r"layers \[26, 30\] .* use 0..23"),
        (("uniform", 8, 9), "count=9 of 8 layers: use 1 to 8"),
        (("shifted", 8, 8), r"layers \[8\] of .* use 0..7"),
    ],
)
def test_what_a_stack_does_not_have(arguments, says):
    with pytest.raises(ValueError, match=says):
        select(*arguments)


def test_a_pattern_names_the_layers():
    assert region.pattern((0, 4)) == "language/stack/layers[0,4]"
