"""RandAugment (Cubuk et al., arXiv:1909.13719) with the ops of ViLT, METER and PuMer.

Ops work on uint8 images of any size, before they are resized. What leaves the image is
black.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

STRENGTHS = 30  # of magnitudes; 0 is the least of an op, this the most


@dataclasses.dataclass(frozen=True)
class Op:
    """One way to change an image.

    Attributes:
        apply: (image, value) -> image.
        least, most: values at magnitudes 0 and `STRENGTHS`.
        signed: whether the value is as often negative.
    """

    apply: Callable[[Image.Image, float], Image.Image]
    least: float = 0.0
    most: float = 1.0
    signed: bool = False


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """Some ops, drawn anew for each image; one may come twice.

    Attributes:
        ops: how many.
        magnitude: of all of them, of `STRENGTHS`.

    Raises:
        ValueError: impossible numbers.
    """

    ops: int = 2
    magnitude: float = 9

    def __post_init__(self):
        if self.ops < 1 or not 0 <= self.magnitude <= STRENGTHS:
            raise ValueError(
                f"RandAugment of {self.ops} ops of magnitude {self.magnitude}: one or "
                f"more, of 0 to {STRENGTHS}"
            )

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        for op in rng.choice(OPS, self.ops):
            value = op.least + (op.most - op.least) * self.magnitude / STRENGTHS
            if op.signed and rng.random() < 0.5:
                value = -value
            image = op.apply(image, value)
        return image


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix)


def _brighter(image: Image.Image, value: float) -> Image.Image:
    """`value` grey levels more, then what is bright inverted."""
    lighter = np.minimum(np.asarray(image, np.int16) + int(value), 255).astype(np.uint8)
    return ImageOps.solarize(Image.fromarray(lighter), 128)


def _enhanced(kind: type) -> Op:
    return Op(lambda image, value: kind(image).enhance(value), 0.1, 1.9)


OPS = (
    Op(lambda image, _: ImageOps.autocontrast(image)),
    Op(lambda image, _: ImageOps.equalize(image)),
    Op(lambda image, degrees: image.rotate(degrees), 0, 30, signed=True),
    Op(lambda image, bits: ImageOps.posterize(image, max(1, int(bits))), 0, 4),
    Op(lambda image, level: ImageOps.solarize(image, level), 0, 256),
    Op(_brighter, 0, 110),
    *map(
        _enhanced,
        (
            ImageEnhance.Color,
            ImageEnhance.Contrast,
            ImageEnhance.Brightness,
            ImageEnhance.Sharpness,
        ),
    ),
    Op(lambda image, shift: _affine(image, 1, shift, 0, 0, 1, 0), 0, 0.3, signed=True),
    Op(lambda image, shift: _affine(image, 1, 0, 0, shift, 1, 0), 0, 0.3, signed=True),
    Op(lambda image, x: _affine(image, 1, 0, x, 0, 1, 0), 0, 100, signed=True),
    Op(lambda image, y: _affine(image, 1, 0, 0, 0, 1, y), 0, 100, signed=True),
)
