"""Pixels and grids against the reference processors, and every kind of file."""

from __future__ import annotations

import io
import re

import numpy as np
from PIL import Image
import pytest

from lmm_jax.data.images import (
    CLIP_MEAN,
    ImageSpec,
    candidates,
    choose_grid,
    load,
    real,
    rgb,
    views,
)
from lmm_jax.data.sources import BadRecord


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def test_grids_of_the_reference(golden):
    arrays = golden("deepstack/grid_choice")
    for key in arrays:
        if found := re.fullmatch(r"out/grid_nc(\d+)_crop(\d+)", key):
            crops, size = map(int, found.groups())
            chosen = [
                choose_grid(wh, candidates(crops), size)
                for wh in arrays["in/sizes_wh"].tolist()
            ]
            assert chosen == [tuple(grid) for grid in arrays[key].tolist()], key
            order = arrays[key.replace("grid_", "candidates_")].tolist()
            assert candidates(crops) == tuple(map(tuple, order))


@pytest.mark.parametrize("case, grid", [("plain", "aspect"), ("2xsample", "square")])
def test_pixels_of_the_reference(golden, case, grid):
    arrays = golden("deepstack/preprocess")
    config = arrays["meta"]["config"]
    spec = ImageSpec(
        config["crop_size"],
        mode="stretch",
        crops=config["num_crops"],
        grid=grid,
        mean=tuple(config["image_mean"]),
        std=tuple(config["image_std"]),
    )
    keys = [key for key in arrays if key.startswith(f"out/pixels_{case}_")]
    assert keys
    for key in keys:
        number = key.rsplit("_", 1)[1]
        found, chosen = views(Image.fromarray(arrays[f"in/image_{number}"]), spec)
        assert chosen == tuple(arrays[f"out/grid_{case}_{number}"].tolist())
        normalised = (found / np.float32(255) - np.float32(spec.mean)) / spec.std
        wanted = arrays[key].transpose(0, 2, 3, 1)
        np.testing.assert_allclose(normalised[: len(wanted)], wanted, atol=1e-5)
        assert not found[len(wanted) :].any()
        assert len(found) == spec.views


def test_pixels_of_tiles_with_fine_views(golden):
    arrays = golden("deepstack/preprocess")
    config = arrays["meta"]["config"]
    spec = ImageSpec(
        config["crop_size"],
        mode="stretch",
        fine=2,
        pinpoints=candidates(config["num_crops"]),
        patches=3,
        mean=tuple(config["image_mean"]),
        std=tuple(config["image_std"]),
    )
    keys = [key for key in arrays if key.startswith("out/pixels_hd_")]
    assert keys
    for key in keys:
        number = key.rsplit("_", 1)[1]
        found, chosen = views(Image.fromarray(arrays[f"in/image_{number}"]), spec)
        assert chosen == tuple(arrays[f"out/grid_hd_{number}"].tolist())
        has = real(chosen, spec)
        ours = (found / np.float32(255) - np.float32(spec.mean)) / spec.std
        wanted = arrays[key].transpose(0, 2, 3, 1)
        np.testing.assert_allclose(ours[has], wanted, atol=1e-5)
        assert not found[~has].any() and len(found) == 25


@pytest.mark.parametrize(
    ("form", "fields"),
    [
        ("square", dict(mode="stretch")),
        ("pad", dict(mode="pad")),
        ("hd", dict(mode="quadrants", crops=4)),
    ],
)
def test_pixels_of_flashsloth(golden, form, fields):
    arrays = golden("flashsloth/image_preprocess")
    config = arrays["meta"]["config"]
    half = (config["mean"],) * 3
    spec = ImageSpec(config["size"], mean=half, std=(config["std"],) * 3, **fields)
    kept = slice(config["sample_offset"], None, config["sample_stride"])
    for number in range(3):
        image = Image.fromarray(arrays[f"in/image_{number}"])
        found, grid = views(image, spec)
        assert real(grid, spec).all() and grid == ((2, 2) if form == "hd" else (0, 0))
        pixels = (found.transpose(0, 3, 1, 2) / 255 - 0.5) / 0.5
        # Without crops theirs has no axis of views.
        wanted, mean = (
            np.atleast_2d(arrays[f"out/{form}_{number}{end}"]) for end in ("", "_mean")
        )
        wanted = wanted.reshape(-1, *wanted.shape[-3:])
        np.testing.assert_allclose(pixels[..., kept, kept], wanted, atol=1e-6)
        np.testing.assert_allclose(pixels.mean((2, 3)), mean, atol=1e-5)


@pytest.mark.parametrize("wh", [(7, 4), (4, 7), (5, 5), (1, 6), (9, 1), (6, 3)])
def test_pad_pastes_on_the_mean_colour(wh):
    """LLaVA's expand2square, written out."""
    image, side = noise(*wh), max(wh)
    square = Image.new("RGB", (side, side), (122, 116, 104))
    square.paste(image, ((side - wh[0]) // 2, (side - wh[1]) // 2))
    wanted = square.resize((8, 8), Image.Resampling.BICUBIC)
    found, grid = views(image, ImageSpec(8, mode="pad"))
    assert grid == (0, 0)
    assert np.array_equal(found, np.asarray(wanted)[None])


def test_pad_colour_of_siglip():
    found, _ = views(Image.new("RGB", (8, 2)), ImageSpec(8, mean=(0.5,) * 3))
    assert found[0, 0, 0].tolist() == [127] * 3
    assert ImageSpec(8).mean == CLIP_MEAN


@pytest.mark.parametrize("wh", [(20, 10), (10, 21), (8, 8), (3, 5)])
def test_crop_takes_the_centre(wh):
    """CLIP's processor, written out."""
    image, size, short = noise(*wh), 8, min(wh)
    width, height = (size if side == short else int(size * side / short) for side in wh)
    fitted = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    top, left = (height - size) // 2, (width - size) // 2
    wanted = fitted[top : top + size, left : left + size]
    found, _ = views(image, ImageSpec(size, mode="crop"))
    assert np.array_equal(found[0], wanted)


def test_crops_are_in_raster_order():
    """The crops, put together again, are the stretched image."""
    image = noise(30, 20)
    found, (gw, gh) = views(image, ImageSpec(4, mode="stretch", crops=6))
    whole = np.concatenate(
        [
            np.concatenate(list(found[1 + r * gw : 1 + (r + 1) * gw]), axis=1)
            for r in range(gh)
        ]
    )
    wanted = image.resize((4 * gw, 4 * gh), Image.Resampling.BICUBIC)
    assert np.array_equal(whole, np.asarray(wanted))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_any_mode_becomes_rgb(mode):
    image = Image.new("RGB", (4, 4), (200, 200, 200)).convert(mode)
    found = np.asarray(rgb(image)).astype(int)
    assert found.shape == (4, 4, 3)
    assert np.abs(found - 200).max() <= 4


def test_bilevel_becomes_black_and_white():
    found = np.asarray(rgb(Image.new("1", (2, 2), 1)))
    assert (found == 255).all()


def test_palette_with_transparency_and_sixteen_bits():
    palette = encoded(noise(6, 5).convert("P"), "PNG")
    assert load(palette).size == (6, 5)
    grey = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024
    for image in (Image.fromarray(grey), Image.fromarray(grey.astype(np.int32))):
        found = np.asarray(load(encoded(image, "TIFF")))
        assert np.array_equal(found[..., 0], grey >> 8)


def test_files_that_cannot_be_read(tmp_path):
    good = encoded(noise(40, 40), "PNG")
    for bad in (good[: len(good) // 2], b"", b"not an image", good[:8] + b"x" * 99):
        with pytest.raises(BadRecord, match=r"unreadable image: \d+ bytes"):
            load(bad)
    jpeg = encoded(noise(40, 40), "JPEG")
    with pytest.raises(BadRecord, match="unreadable"):
        load(jpeg[: len(jpeg) // 2])
    with pytest.raises(BadRecord, match=r"missing image.*nothing\.png"):
        load(tmp_path / "nothing.png")
    with pytest.raises(BadRecord, match="unreadable"):
        load(tmp_path)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"mode": "squash"}, "pad, crop, stretch"),
        ({"crops": 4}, "mode='stretch'"),
        ({"mode": "stretch", "crops": 1}, "crops=1"),
        ({"mode": "quadrants", "crops": 2}, "crops=2: the quadrants are crops; use 4"),
        ({"mode": "pad", "pinpoints": ((2, 1),), "patches": 2}, "no other"),
        ({"mode": "stretch", "pinpoints": ((2, 1),)}, "patches=0: they go together"),
        (
            {"mode": "stretch", "crops": 4, "fine": 2},
            "fine views are of stretched tiles",
        ),
        (
            {"mode": "stretch", "crops": 4, "pinpoints": ((2, 1),), "patches": 2},
            "either crops or tiles",
        ),
        ({"grid": "hexagonal"}, "aspect, square"),
        ({"resample": "magic"}, "bicubic"),
    ],
)
def test_specs_that_contradict_themselves(fields, message):
    with pytest.raises(ValueError, match=message):
        ImageSpec(8, **fields)
