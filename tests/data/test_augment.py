"""What the ops do to pixels, and that a draw is a function of its generator."""

from __future__ import annotations

import numpy as np
from PIL import Image
import pytest

from lmm_jax.data.augment import OPS, RandAugment

NAMES = ["autocontrast", "equalize", "rotate", "posterize", "solarize", "solarize_add"]
NAMES += ["color", "contrast", "brightness", "sharpness"]
NAMES += ["shear_x", "shear_y", "translate_x", "translate_y"]


def ramp() -> Image.Image:
    values = np.linspace(40, 200, 24 * 20).reshape(20, 24, 1)
    return Image.fromarray((values * [1.0, 0.9, 0.8]).astype(np.uint8))


def applied(name: str, magnitude: float = 9, negative: bool = False) -> np.ndarray:
    op = OPS[NAMES.index(name)]
    value = op.least + (op.most - op.least) * magnitude / 30
    return np.asarray(op.apply(ramp(), -value if negative else value), int)


BEFORE = np.asarray(ramp(), int)


def test_values_at_magnitude_nine():
    assert set(np.unique(applied("posterize"))) == {0, 128}  # one bit
    bright = BEFORE >= 77  # 76.8
    np.testing.assert_array_equal(
        applied("solarize"), np.where(bright, 255 - BEFORE, BEFORE)
    )
    raised = np.minimum(BEFORE + 33, 255)
    np.testing.assert_array_equal(
        applied("solarize_add"), np.where(raised >= 128, 255 - raised, raised)
    )
    assert np.abs(applied("brightness") - BEFORE * 0.64).max() <= 1
    grey = BEFORE @ [0.299, 0.587, 0.114]
    blended = grey[..., None] + 0.64 * (BEFORE - grey[..., None])
    assert np.abs(applied("color") - blended).max() <= 2
    low, high = BEFORE.min((0, 1)), BEFORE.max((0, 1))
    stretched = (BEFORE - low) * 255 / (high - low)
    assert np.abs(applied("autocontrast") - stretched).max() <= 2


def test_what_leaves_the_image_is_black():
    right, left = applied("translate_x", 3), applied("translate_x", 3, negative=True)
    np.testing.assert_array_equal(right[:, :14], BEFORE[:, 10:])
    np.testing.assert_array_equal(left[:, 10:], BEFORE[:, :14])
    assert not right[:, 14:].any()
    assert not left[:, :10].any()
    down = applied("translate_y", 1.5)
    np.testing.assert_array_equal(down[:15], BEFORE[5:])
    for name in ("rotate", "shear_x", "shear_y"):
        one, other = applied(name, 30), applied(name, 30, negative=True)
        assert (one == 0).all(-1).any()
        assert (one != other).any()


def test_weak_ops_change_nothing_at_all():
    for name in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y"):
        np.testing.assert_array_equal(applied(name, 0), BEFORE)


def test_a_draw_is_a_function_of_its_generator():
    def drawn(seed: int) -> np.ndarray:
        return np.asarray(RandAugment()(ramp(), np.random.default_rng(seed)))

    seen = {drawn(seed).tobytes() for seed in range(60)}
    assert len(seen) > 30
    for seed in range(5):
        np.testing.assert_array_equal(drawn(seed), drawn(seed))
        assert drawn(seed).shape == (20, 24, 3)


@pytest.mark.parametrize("fields", [dict(ops=0), dict(magnitude=31)])
def test_impossible_numbers(fields):
    with pytest.raises(ValueError, match="one or more, of 0 to 30"):
        RandAugment(**fields)
