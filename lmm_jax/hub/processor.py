"""The image processor of a hub folder: what it does to pixels, in our words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from lmm_jax.data.canvas import CanvasSpec
from lmm_jax.data.images import ImageSpec
from lmm_jax.data.native import NativeSpec
from lmm_jax.hub.families.llava_next import grids
from lmm_jax.hub.fields import Fields
from lmm_jax.hub.folder import read_json
from lmm_jax.models.specs import CLIP_MEAN, CLIP_STD, VisionSpec

PROCESSOR = "preprocessor_config.json"
HALF = (0.5, 0.5, 0.5)
# Kind -> (mean, standard deviation, centre crop) where a file does not speak of them.
KINDS = {
    "CLIP": (CLIP_MEAN, CLIP_STD, True),
    "Llava": (CLIP_MEAN, CLIP_STD, True),
    "LlavaNext": (CLIP_MEAN, CLIP_STD, True),
    "Siglip": (HALF, HALF, False),
    "Qwen2VL": (CLIP_MEAN, CLIP_STD, False),
    "Vilt": (HALF, HALF, False),
}
_ALWAYS = ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")
_NOT_ABOUT_PIXELS = """
    processor_class _processor_class _valid_processor_keys feature_extractor_type
    image_seq_length default_to_square data_format input_data_format return_tensors
    device disable_grouping
"""


def image_spec(path: Path, tower: VisionSpec) -> ImageSpec:
    """How a processor makes views.

    Args:
        path: a `preprocessor_config.json`.
        tower: that reads the views.

    Raises:
        ValueError: a processor or a setting that we do not know or cannot follow, or
            views of another size than the tower's.
    """
    f = Fields(read_json(path), str(path))
    name = f.take("image_processor_type", f.take("feature_extractor_type", "CLIP"))
    kind = name.removesuffix("Fast").removesuffix("Pil")
    kind = kind.removesuffix("ImageProcessor").removesuffix("FeatureExtractor")
    if kind not in KINDS:
        raise ValueError(
            f"{path} is a {name}; lmm_jax knows the image processors of "
            f"{', '.join(KINDS)} only: set image.mode and remove the file."
        )
    for field in _ALWAYS:
        f.only(field, True)
    f.only("rescale_factor", 1 / 255)
    for field in _NOT_ABOUT_PIXELS.split():
        f.take(field, None)
    mean, std, _ = KINDS[kind]
    spec = ImageSpec(
        mean=tuple(f.take("image_mean", mean)),
        std=tuple(f.take("image_std", std)),
        resample=Image.Resampling(f.take("resample", 3)).name.lower(),
        **_view(f, kind, tower, path),
    )
    f.done()
    return spec


def processor_config(spec: ImageSpec, tower: VisionSpec) -> dict[str, Any]:
    """A `preprocessor_config.json` from which `image_spec` gives `spec` again.

    Crops are left out: they belong to a strategy, and no processor makes them.
    """
    size, square = spec.size, {"height": spec.size, "width": spec.size}
    centre = {
        "size": {"shortest_edge": size},
        "crop_size": square,
        "do_center_crop": True,
    }
    pixels = [[rows * size, columns * size] for columns, rows in spec.pinpoints]
    kind, own = {
        "crop": ("CLIP", centre),
        "pad": ("Llava", {**centre, "do_pad": True}),
        "stretch": ("Siglip", {"size": square}),
        "quadrants": ("Siglip", {"size": square}),
        "anyres": ("LlavaNext", {**centre, "image_grid_pinpoints": pixels}),
        "native": ("Qwen2VL", _limits(spec, tower)),
        "aspect": (
            "Vilt",
            {"size": {"shortest_edge": size}, "size_divisor": tower.patch},
        ),
    }[spec.mode]
    return {
        "image_processor_type": f"{kind}ImageProcessor",
        **dict.fromkeys(_ALWAYS, True),
        "rescale_factor": 1 / 255,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
        "resample": int(spec.filter),
        **own,
    }


def _view(f: Fields, kind: str, tower: VisionSpec, path: Path) -> dict[str, Any]:
    """How an image becomes a view: size and mode of `ImageSpec`, and what they need."""
    size = f.take("size", {})
    if kind == "Qwen2VL":
        return dict(size=tower.image, mode="native", native=_native(f, size, tower))
    if kind == "Vilt":
        return _aspect(f, size, tower)
    if isinstance(size, int):
        size = {"height": size, "width": size} if kind == "Siglip" else {"short": size}
    centred = f.take("do_center_crop", KINDS[kind][2])
    crop = f.take("crop_size", None) if centred else None
    if isinstance(crop, int):
        crop = {"height": crop, "width": crop}
    sides = {*size.values(), *(crop or {}).values()}
    if sides not in ({tower.image}, {tower.view}):
        raise ValueError(
            f"{path} says size={size}, crop_size={crop}; the tower reads squares of "
            f"{tower.view} pixels, and lmm_jax resizes to that only."
        )
    squashed = set(size) == {"height", "width"}
    # LLaVA pads the image to a square; LLaVA-NeXT means its list of tiles, as we do.
    padded = f.take("do_pad", False) if kind.startswith("Llava") else False
    if kind == "LlavaNext":
        pixels = f.take("image_grid_pinpoints")
        pinpoints = grids(pixels, tower.image)
        tiled = dict(mode="anyres", pinpoints=pinpoints, patches=tower.grid[0])
        return dict(size=tower.image, **tiled)
    if padded or squashed or crop:
        mode = "pad" if padded else "stretch" if squashed else "crop"
        return dict(size=sides.pop(), mode=mode)
    raise ValueError(
        f"{path} keeps the aspect of size={size} without do_center_crop; lmm_jax knows "
        "square views only."
    )


def _aspect(f: Fields, size: dict[str, int] | int, tower: VisionSpec) -> dict[str, Any]:
    """The shape is kept; what the reference pads in a batch, our canvas always has."""
    f.only("size_divisor", tower.patch)
    f.only("do_pad", True)
    short = size if isinstance(size, int) else size.get("shortest_edge", tower.image)
    return dict(size=short, mode="aspect", canvas=CanvasSpec(short, tower.patch))


def _native(f: Fields, size: dict[str, int], tower: VisionSpec) -> NativeSpec:
    """Limits of an image's area; `min_pixels` and `max_pixels` are their older names."""
    f.only("patch_size", tower.patch)
    f.only("merge_size", tower.merge)
    f.only("temporal_patch_size", tower.frames)
    least = f.take("min_pixels", size.get("shortest_edge"))
    most = f.take("max_pixels", size.get("longest_edge"))
    return NativeSpec(tower.patch, tower.merge, least, most)


def _limits(spec: ImageSpec, tower: VisionSpec) -> dict[str, Any]:
    """The inverse of `_native`."""
    if spec.native is None:
        return {}
    least, most = spec.native.min_pixels, spec.native.max_pixels
    return {
        "size": {"shortest_edge": least, "longest_edge": most},
        "patch_size": tower.patch,
        "merge_size": tower.merge,
        "temporal_patch_size": tower.frames,
    }
