"""Pixels of image processors, as their files say, against `transformers`."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
from PIL import Image
import pytest
import transformers

from lmm_jax import experiment, hub
from lmm_jax.data import images
from lmm_jax.data.canvas import CanvasSpec
from lmm_jax.data.sources import BadRecord
from lmm_jax.models import vilt
from lmm_jax.models.specs import VisionSpec, vit_block
from tests.small import small_config

SIZE = 12
TOWER = VisionSpec(SIZE, 4, vit_block(8, 1, 8, "gelu"), depth=1, run=1)
SQUARE = {"height": SIZE, "width": SIZE}
CROP = dict(size={"shortest_edge": SIZE}, crop_size=SQUARE)
PINPOINTS = [[12, 24], [24, 12], [24, 24], [36, 12], [12, 36]]
PROCESSORS = {
    "crop": transformers.CLIPImageProcessorPil(**CROP),
    "stretch": transformers.SiglipImageProcessorPil(size=SQUARE),
    "pad": transformers.LlavaImageProcessorPil(**CROP, do_pad=True),
    "anyres": transformers.LlavaNextImageProcessorPil(
        **CROP, image_grid_pinpoints=PINPOINTS
    ),
    "bilinear": transformers.CLIPImageProcessorPil(**CROP, resample=2),
}


def read(processor, folder):
    processor.save_pretrained(folder)
    return hub.image_spec(folder / hub.PROCESSOR, TOWER)


@st.composite
def pictures(draw):
    """Any size, and any mode with all that can be in it: transparency, palettes."""
    width, height = draw(st.integers(1, 90)), draw(st.integers(1, 90))
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    rgba = Image.fromarray(rng.integers(0, 256, (height, width, 4), np.uint8))
    mode = draw(st.sampled_from(["RGB", "L", "RGBA", "LA", "P", "1", "CMYK"]))
    if mode == "CMYK":
        return Image.fromarray(np.asarray(rgba), "CMYK")
    found = rgba if mode in ("RGBA", "LA") else rgba.convert("RGB")
    found = found.convert(mode)
    if mode == "P" and draw(st.booleans()):
        found.info["transparency"] = 3
    return found


@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_equal_transformers(name, tmp_path):
    processor = PROCESSORS[name]
    spec = read(processor, tmp_path)
    assert spec.mode == {"bilinear": "crop"}.get(name, name)

    @settings(max_examples=60, deadline=None)
    @given(pictures())
    def check(picture):
        theirs = np.asarray(processor(picture)["pixel_values"])[0]
        theirs = theirs.reshape(-1, 3, SIZE, SIZE).transpose(0, 2, 3, 1)
        found, grid = images.views(images.rgb(picture), spec)
        ours = (found / np.float32(255) - np.float32(spec.mean)) / np.float32(spec.std)
        assert len(theirs) == 1 + np.prod(grid)
        np.testing.assert_allclose(ours[: len(theirs)], theirs, rtol=0, atol=1e-6)

    check()


@pytest.mark.parametrize("name", PROCESSORS)
def test_files_there_and_back(name, tmp_path):
    spec = read(PROCESSORS[name], tmp_path / "theirs")
    file = tmp_path / hub.PROCESSOR
    file.write_text(json.dumps(hub.processor_config(spec, TOWER)))
    assert hub.image_spec(file, TOWER) == spec
    pil = getattr(transformers, type(PROCESSORS[name]).__name__)
    picture = Image.fromarray(np.arange(900, dtype=np.uint8).reshape(15, 20, 3))
    again = pil.from_pretrained(tmp_path)
    for key, value in PROCESSORS[name](picture).items():
        np.testing.assert_array_equal(again(picture)[key], value)


def test_sixteen_bits_keep_their_greys(tmp_path):
    """The reference clips them to white, so it is shown the upper eight."""
    spec = read(PROCESSORS["crop"], tmp_path)
    grey = np.random.default_rng(0).integers(0, 2**16, (20, 31)).astype(np.uint16)
    upper = Image.fromarray((grey >> 8).astype(np.uint8))
    for deep in (Image.fromarray(grey), Image.fromarray(grey.astype(np.int32))):
        ours, _ = images.views(images.rgb(deep), spec)
        theirs, _ = images.views(images.rgb(upper), spec)
        np.testing.assert_array_equal(ours, theirs)


CLIP = {
    "crop_size": SIZE,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": SIZE,
}


def test_a_file_of_the_first_years(tmp_path):
    """As the CLIP towers have it: plain numbers for sizes."""
    file = tmp_path / hub.PROCESSOR
    file.write_text(json.dumps(CLIP))
    assert hub.image_spec(file, TOWER) == images.ImageSpec(SIZE, "crop")
    siglip = dict(size=SIZE, image_processor_type="SiglipImageProcessor")
    file.write_text(json.dumps(siglip | dict(image_mean=[0.5] * 3)))
    assert hub.image_spec(file, TOWER).mode == "stretch"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (dict(do_resize=False), "do_resize=False"),
        (dict(do_normalize=False), "do_normalize=False"),
        (dict(rescale_factor=0.5), r"rescale_factor=0\.5"),
        (dict(do_center_crop=False), "without do_center_crop"),
        (dict(size=13), "size=.*13.*squares of 12"),
        (dict(crop_size={"height": 12, "width": 10}), "crop_size=.*10"),
        (dict(do_pad=True), "do_pad=True"),
        (dict(sharpen=2), "sharpen=2"),
        (dict(feature_extractor_type="ViTFeatureExtractor"), "is a ViTFeature"),
    ],
)
def test_what_changes_pixels_is_refused_by_name(fields, says, tmp_path):
    file = tmp_path / hub.PROCESSOR
    file.write_text(json.dumps(CLIP | fields))
    with pytest.raises(ValueError, match=says):
        hub.image_spec(file, TOWER)


def test_a_folder_says_how_its_tower_wants_images(tmp_path):
    config = transformers.CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=1,
        image_size=SIZE,
        patch_size=4,
    )
    transformers.CLIPVisionModel(config).save_pretrained(tmp_path / "clip")
    changed = transformers.CLIPImageProcessorPil(
        **CROP, image_mean=[0.1, 0.2, 0.3], resample=2
    )
    changed.save_pretrained(tmp_path / "clip")
    c = small_config(tmp_path, "llava")
    c.init = dict(vision=str(tmp_path / "clip"))
    for mode, wanted in (("auto", "crop"), ("pad", "pad")):
        c.image.mode = mode
        exp = experiment.build(c)
        assert exp.images.mode == wanted
        assert exp.images.resample == "bilinear"
        assert exp.images.mean == exp.spec.vision.mean == (0.1, 0.2, 0.3)
    c.init, c.image.mode = dict(), "auto"
    with pytest.raises(ValueError, match=r"image\.mode='auto', but tiny-vit"):
        _ = experiment.build(c).images


VILT_TOWER = vilt.patches(384, 32, vit_block(8, 1, 8, "gelu"))
SIZES = {  # width and height of pictures -> those that ViLT reads
    (900, 300): (608, 192),
    (1280, 720): (608, 352),
    (640, 480): (512, 384),
    (500, 333): (576, 384),
    (384, 384): (384, 384),
    (30, 40): (384, 512),
}


@pytest.mark.parametrize("wh", SIZES)
def test_shapes_that_vilt_keeps(wh, tmp_path):
    """Sizes, pixels and what is masked; square and bilinear is PuMer's "stretch"."""
    processor = transformers.ViltImageProcessorPil()
    processor.save_pretrained(tmp_path)
    spec = hub.image_spec(tmp_path / hub.PROCESSOR, VILT_TOWER)
    picture = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (*wh[::-1], 3), np.uint8)
    )
    found, (columns, rows) = images.views(picture, spec)
    width, height = SIZES[wh]
    assert (columns * 32, rows * 32) == (width, height)
    assert found.shape == (1, *spec.view) == (1, 608, 608, 3)
    theirs = processor(picture)
    pixels = np.asarray(theirs["pixel_values"])[0].transpose(1, 2, 0)
    assert np.asarray(theirs["pixel_mask"]).all()
    ours = found[0, :height, :width] / np.float32(255) * 2 - 1
    np.testing.assert_allclose(ours, pixels, rtol=0, atol=1e-6)
    assert not found[0, height:].any() and not found[0, :, width:].any()
    file = tmp_path / hub.PROCESSOR
    file.write_text(json.dumps(hub.processor_config(spec, VILT_TOWER)))
    assert hub.image_spec(file, VILT_TOWER) == spec


def test_a_file_of_vilts_first_years(tmp_path):
    """One number for the size."""
    file = tmp_path / hub.PROCESSOR
    old = dict(feature_extractor_type="ViltFeatureExtractor", size=384, size_divisor=32)
    file.write_text(json.dumps(old | dict(image_mean=[0.5] * 3, resample=3)))
    assert hub.image_spec(file, VILT_TOWER).canvas == CanvasSpec(384, 32)


def test_a_strip_narrower_than_a_patch_is_a_bad_record():
    spec = images.ImageSpec(384, "aspect", canvas=CanvasSpec(384, 32))
    with pytest.raises(BadRecord, match="900 x 30 pixels"):
        images.views(Image.new("RGB", (900, 30)), spec)
    with pytest.raises(ValueError, match="mode='aspect' needs a canvas"):
        images.ImageSpec(384, "aspect")
