"""Tiles and the order of their tokens against `transformers`."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest
import torch
import transformers
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

from lmm_jax.data.images import ImageSpec, choose_grid, rows

SIDE, SIZE = 3, 12  # patches and pixels along a side of a view
GRIDS = ((2, 1), (1, 2), (2, 2), (1, 3), (3, 1))
PIXELS = [[rows_ * SIZE, columns * SIZE] for columns, rows_ in GRIDS]
SPEC = ImageSpec(SIZE, "anyres", pinpoints=GRIDS, patches=SIDE)


def packed(wh: tuple[int, int]) -> list[int]:
    """The reference arranges features; here they are their own numbers."""
    vision = transformers.CLIPVisionConfig(image_size=SIZE, patch_size=SIZE // SIDE)
    config = transformers.LlavaNextConfig(
        vision_config=vision, image_grid_pinpoints=PIXELS
    )
    columns, lines = choose_grid(wh, GRIDS, SIZE)
    used, views = 1 + columns * lines, SPEC.views
    features = torch.arange(used * SIDE**2).reshape(used, SIDE**2, 1)
    model = LlavaNextModel.__new__(LlavaNextModel)
    torch.nn.Module.__init__(model)
    model.config = config
    found, _ = model.pack_image_features(
        [features], [wh[::-1]], "default", torch.tensor([views * SIDE**2])
    )
    return found[0][:, 0].tolist()


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000))
def test_order_of_tokens_equals_transformers(width, height):
    assert rows((width, height), SPEC).tolist() == packed((width, height))


def test_rounding_before_cutting_off():
    """Sizes of the mosaic's own aspect, where 11.999999999 must count as 12."""
    for factor in range(1, 400):
        for columns, lines in GRIDS:
            wh = columns * factor, lines * factor
            assert rows(wh, SPEC).tolist() == packed(wh)


def test_a_square_of_the_published_size():
    spec = ImageSpec(336, "anyres", pinpoints=GRIDS, patches=24)
    assert len(rows((672, 672), spec)) == 576 + 48 * 49
    assert spec.views == 5


@pytest.mark.parametrize("wh", [(1, 4000), (4000, 1)])
def test_slivers(wh):
    assert rows(wh, SPEC).tolist() == packed(wh)
