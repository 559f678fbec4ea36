"""S2 against its definition in `torch`."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from lmm_jax import hub
from tests.hub.test_vision import TOWERS, abstract, features, scramble

SIDE, GRID, WIDTH = 12, 3, 8


def reference(tower, pixels: torch.Tensor, scales: tuple[int, ...]) -> torch.Tensor:
    """Scale by scale, tile by tile: [N, P, S * E] of normalised [N, 3, H, W]."""
    found = []
    for side in scales:
        image = interpolate(pixels, (side, side), mode="bicubic")
        n = side // SIDE
        mosaic = torch.zeros(len(pixels), WIDTH, n * GRID, n * GRID)
        for row in range(n):
            for column in range(n):
                at = slice(row * SIDE, row * SIDE + SIDE)
                tile = image[:, :, at, column * SIDE : column * SIDE + SIDE]
                hidden = tower(tile, output_hidden_states=True).hidden_states[-2]
                hidden = hidden[:, -GRID * GRID :]
                cells = hidden.transpose(1, 2).reshape(-1, WIDTH, GRID, GRID)
                to = slice(row * GRID, row * GRID + GRID)
                mosaic[:, :, to, column * GRID : column * GRID + GRID] = cells
        small = interpolate(mosaic, (GRID, GRID), mode="area")
        found.append(small.flatten(2).transpose(1, 2))
    return torch.cat(found, dim=-1)


@pytest.mark.parametrize("scales", [(12, 24, 36), (12, 36), (24,)])
@pytest.mark.parametrize("tower", TOWERS)
def test_equals_its_definition(tower, scales, tmp_path):
    make_config, make_model = TOWERS[tower]
    config = make_config(
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=SIDE // GRID,
    )
    model = scramble(make_model(config))
    model.save_pretrained(tmp_path)
    spec = dataclasses.replace(hub.tower_spec(tmp_path, -2), scales=scales)
    params = hub.load(hub.Folder(tmp_path), spec, abstract(spec))
    pixels = np.random.default_rng(0).normal(size=(2, 3, spec.view, spec.view))
    with torch.no_grad():
        theirs = reference(model, torch.tensor(pixels).float(), scales).numpy()
    ours = features(spec, params, pixels.transpose(0, 2, 3, 1).astype(np.float32))
    assert ours.shape == (2, GRID**2, len(scales) * WIDTH)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
