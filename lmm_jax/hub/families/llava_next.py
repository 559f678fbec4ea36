"""LLaVA-NeXT (LLaVA-1.6) as `transformers` stores it: LLaVA-1.5 and a newline between rows
of tiles."""

from __future__ import annotations

import dataclasses
from typing import Any

from lmm_jax.hub.families import llava
from lmm_jax.hub.fields import Fields
from lmm_jax.models.specs import LMMSpec
from lmm_jax.nn.params import Param
from lmm_jax.strategies import anyres

KINDS = {"llava_next": ("LlavaNextForConditionalGeneration",)}
IMAGE_TOKEN = llava.IMAGE_TOKEN
IGNORED = llava.IGNORED
ALIASES = (*llava.ALIASES, (r"^model\.image_newline$", "image_newline"))
fused = llava.fused


def read(f: Fields) -> LMMSpec:
    """The spec of a config, tiles included.

    Raises:
        ValueError: as `llava.read`; tiles that are not of the tower's image size.
    """
    f.only("use_image_newline_parameter", True)
    pixels = f.take("image_grid_pinpoints")
    spec = llava.read(f)
    return dataclasses.replace(
        spec,
        own=(anyres.edits,),
        mode="anyres",
        pinpoints=grids(pixels, spec.vision.image),
        kind="llava_next",
    )


def grids(pixels: list[list[int]], size: int) -> tuple[tuple[int, int], ...]:
    """Grids (columns, rows) from resolutions (height, width).

    Raises:
        ValueError: a resolution that tiles of `size` pixels do not fill.
    """
    odd = [point for point in pixels if point[0] % size or point[1] % size]
    if odd:
        raise ValueError(
            f"image_grid_pinpoints has {odd[0]}, which tiles of {size} pixels do not "
            "fill; lmm_jax knows whole tiles only."
        )
    return tuple((width // size, height // size) for height, width in pixels)


def rows(spec: LMMSpec) -> tuple[Param, ...]:
    """Rows in the keys on disk."""
    newline = Param("strategy_anyres/newline", "embed", "image_newline", "embed")
    return (*llava.rows(spec), newline)


def config(spec: LMMSpec) -> dict[str, Any]:
    """A `config.json` from which `read` gives `spec` again."""
    size = spec.vision.image
    return {
        **llava.config(spec),
        "model_type": "llava_next",
        "architectures": ["LlavaNextForConditionalGeneration"],
        "image_grid_pinpoints": [
            [rows * size, columns * size] for columns, rows in spec.pinpoints
        ],
    }
