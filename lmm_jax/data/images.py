"""Images to uint8 views of one size: pad, crop or stretch, and crops or tiles of a grid.

Pixels stay uint8 on the host; `mean` and `std` are carried for the device. Resizing is
Pillow's bicubic on uint8, which is what every reference processor does.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import io
import math
from pathlib import Path

import einops
import numpy as np
from PIL import Image

from lmm_jax.data import tiles
from lmm_jax.data.canvas import CanvasSpec, on_canvas
from lmm_jax.data.native import NativeSpec, patches
from lmm_jax.data.sources import BadRecord

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


MODES = ("pad", "crop", "stretch", "quadrants", "anyres", "native", "aspect")


@dataclasses.dataclass(frozen=True)
class ImageSpec:
    """How an image becomes views.

    Attributes:
        size: side of a view, pixels.
        mode: the global view. "pad" to a square with the mean colour (LLaVA), "crop"
            the centre after the short side fits (CLIP), "stretch" (SigLIP, DeepStack),
            "anyres" stretches too and adds tiles that keep the aspect (LLaVA-NeXT).
            "quadrants" stretches too; its four crops are cut from the padded image at
            twice the size (FlashSloth-HD). "native" keeps the image's own size (Qwen-VL),
            "aspect" its shape, on a canvas (ViLT).
        crops: budget of high-resolution crops besides the global view; 0 for none.
        fine: every view of "stretch" with `pinpoints` again as fine x fine views, cut from
            the image at as many times its resolution (DeepStack-HD); 0 for none.
        grid: "aspect" chooses the grid by image size, "square" takes isqrt(crops)
            each way.
        pinpoints: of tiled images, the grids (columns, rows) to choose from; those of
            "stretch" fill their grid.
        patches: of tiled images, patches along a side of a view.
        native: of "native", patches and limits of size.
        canvas: of "aspect", its size.
        mean, std: normalisation, per channel, in units of full scale.
        resample: name of a Pillow filter.

    Raises:
        ValueError: fields that do not go together.
    """

    size: int
    mode: str = "pad"
    crops: int = 0
    fine: int = 0
    grid: str = "aspect"
    pinpoints: tuple[tuple[int, int], ...] = ()
    patches: int = 0
    native: NativeSpec | None = None
    canvas: CanvasSpec | None = None
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    resample: str = "bicubic"

    def __post_init__(self):
        for name, known in (
            ("mode", MODES),
            ("grid", ("aspect", "square")),
            ("resample", tuple(f.name.lower() for f in Image.Resampling)),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}; choose from {', '.join(known)}"
                )
        if self.mode == "quadrants" and self.crops != 4:
            raise ValueError(
                f"mode='quadrants' with crops={self.crops}: the quadrants are crops; use 4"
            )
        if self.crops and self.mode not in ("stretch", "quadrants"):
            raise ValueError(
                f"mode={self.mode!r} with crops={self.crops}: crops are stretched, and "
                "the global view must match them; use mode='stretch'"
            )
        if self.crops == 1 and self.grid == "aspect":
            raise ValueError("crops=1 leaves no grid to choose; use 0, or 2 and more")

        tiled = bool(self.pinpoints)
        allowed = {"anyres": (True,), "stretch": (True, False)}.get(self.mode, (False,))
        if tiled not in allowed or tiled != bool(self.patches):
            raise ValueError(
                f"mode={self.mode!r} with pinpoints={self.pinpoints} and "
                f"patches={self.patches}: they go together; mode='anyres' needs them, "
                "mode='stretch' may have them, and no other"
            )
        if tiled and self.crops:
            raise ValueError(
                f"crops={self.crops} with pinpoints={self.pinpoints}: an image has either "
                "crops or tiles; use one of them"
            )
        if self.fine and not (tiled and self.mode == "stretch"):
            raise ValueError(
                f"fine={self.fine} with mode={self.mode!r} and "
                f"pinpoints={self.pinpoints}: fine views are of stretched tiles; use "
                "mode='stretch' with pinpoints"
            )

        if (self.mode == "native") != bool(self.native):
            raise ValueError(
                f"mode={self.mode!r} with native={self.native}: a vision tower for images "
                "of their own size needs mode='native', and no other tower can have it"
            )
        if (self.mode == "aspect") != bool(self.canvas):
            raise ValueError(
                f"mode={self.mode!r} with canvas={self.canvas}: they go together; "
                "mode='aspect' needs a canvas, and no other mode has one"
            )

    @property
    def view(self) -> tuple[int, ...]:
        """Shape of one view: [H, W, 3], or [P, 1, p, p, 3] of an image in patches."""
        if self.native:
            return self.native.slots, 1, self.native.patch, self.native.patch, 3
        if self.canvas:
            return self.canvas.side, self.canvas.side, 3
        return self.size, self.size, 3

    @property
    def cells(self) -> int:
        """Crops or tiles that an image may have."""
        return max([self.crops, *(columns * rows for columns, rows in self.pinpoints)])

    @property
    def views(self) -> int:
        """Number C of views: the global one, the crops or tiles, the fine ones of each."""
        return (1 + self.cells) * (1 + self.fine**2)

    @property
    def filter(self) -> Image.Resampling:
        return Image.Resampling[self.resample.upper()]


def load(image: str | Path | bytes) -> Image.Image:
    """An RGB image from a path or encoded bytes, fully decoded.

    Raises:
        BadRecord: "missing image" or "unreadable image".
    """
    name = f"{len(image)} bytes" if isinstance(image, bytes) else str(image)
    try:
        file = io.BytesIO(image) if isinstance(image, bytes) else image
        with Image.open(file) as opened:
            return rgb(opened)
    except FileNotFoundError as error:
        raise BadRecord("missing image", f"no file {name}; check image_root") from error
    except Exception as error:  # Pillow's decoders raise nearly every type
        raise BadRecord("unreadable image", f"{name}: {error}") from error


def rgb(image: Image.Image) -> Image.Image:
    """RGB of an image of any mode; what is transparent becomes white, 16 bits 8."""
    if image.mode.startswith("I"):
        # Pillow would clip 16-bit grey at 255 and leave a white image.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def candidates(crops: int) -> tuple[tuple[int, int], ...]:
    """Grids (gw, gh) of 2 to `crops` cells, in the order that breaks ties."""
    return tuple(
        (gw, gh)
        for gw in range(1, crops + 1)
        for gh in range(1, crops // gw + 1)
        if (gw, gh) != (1, 1)
    )


def choose_grid(
    wh: tuple[int, int], grids: Sequence[tuple[int, int]], size: int
) -> tuple[int, int]:
    """The grid (gw, gh) that keeps most pixels of an image, then wastes fewest.

    Python floats: a float32 version truncates differently. Of grids that are as good as
    each other, as all are for an image within one crop, the first.
    """
    width, height = wh

    def value(grid: tuple[int, int]) -> tuple[int, int]:
        w, h = size * grid[0], size * grid[1]
        scale = min(w / width, h / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - w * h

    return max(grids, key=value)  # the first of equals


def views(image: Image.Image, spec: ImageSpec) -> tuple[np.ndarray, tuple[int, int]]:
    """All views of an RGB image.

    Returns:
        uint8 [C, *spec.view]: the global view, then the crops or tiles row by row, then
        zeros; then the fine views of each of them, row by row; and their grid (gw, gh),
        (0, 0) without any. An image that keeps its size or shape is one view, its grid
        that of its patches.

    Raises:
        BadRecord: see `native.patches` and `canvas.on_canvas`.
    """
    if spec.native:
        found, grid = patches(image, spec.native, spec.filter)
        return found[None], grid
    if spec.canvas:
        found, grid = on_canvas(image, spec.canvas, spec.filter)
        return found[None], grid
    size = spec.size
    out = np.zeros((spec.views, *spec.view), np.uint8)
    out[0] = np.asarray(_fit(image, spec))
    if spec.views == 1:
        return out, (0, 0)
    gw, gh = _grid(image.size, spec)
    if spec.mode == "anyres":
        large = tiles.on_grid(image, (gw, gh), size, spec.filter)
    else:
        whole = _squared(image, spec) if spec.mode == "quadrants" else image
        large = whole.resize((size * gw, size * gh), spec.filter)
    cells = _cut(large, size)
    used, n = 1 + gw * gh, spec.fine
    out[1:used] = cells
    if n:
        whole = image.resize((size * n, size * n), spec.filter)
        large = image.resize((size * gw * n, size * gh * n), spec.filter)
        seen = np.concatenate([_cut(whole, size * n), _cut(large, size * n)])
        fine = out[1 + spec.cells :].reshape(-1, n * n, *spec.view)
        fine[:used] = [_cut(view, size) for view in seen]
    return out, (gw, gh)


def real(grid: tuple[int, int], spec: ImageSpec) -> np.ndarray:
    """Which of `views` an image has, bool [C]; `grid` is that of its crops or tiles."""
    has = np.arange(1 + spec.cells) < 1 + np.prod(grid)
    return np.concatenate([has, np.repeat(has, spec.fine**2)])


def rows(wh: tuple[int, int], spec: ImageSpec) -> np.ndarray:
    """The tokens of a tiled image of this size; see `tiles.rows`. Stretched tiles have no
    border."""
    columns, lines = _grid(wh, spec)
    mosaic = columns * spec.patches, lines * spec.patches
    border = tiles.borders(wh, mosaic) if spec.mode == "anyres" else (0, 0)
    return tiles.rows((columns, lines), spec.patches, 1 + spec.cells, border)


def _grid(wh: tuple[int, int], spec: ImageSpec) -> tuple[int, int]:
    """Columns and rows of an image's crops or tiles."""
    if spec.mode == "quadrants":
        return 2, 2
    if spec.grid == "square" and not spec.pinpoints:
        return (math.isqrt(spec.crops),) * 2
    return choose_grid(wh, spec.pinpoints or candidates(spec.crops), spec.size)


def _cut(image: Image.Image | np.ndarray, size: int) -> np.ndarray:
    """[rows * size, columns * size, 3] to its squares, row by row."""
    pixels = np.asarray(image)
    return einops.rearrange(pixels, "(r y) (c x) d -> (r c) y x d", y=size, x=size)


def _fit(image: Image.Image, spec: ImageSpec) -> Image.Image:
    """The global view: `image` at size x size."""
    size, (width, height) = spec.size, image.size
    if spec.mode == "pad":
        image = _squared(image, spec)
    elif spec.mode == "crop":
        short = min(width, height)
        width, height = int(size * width / short), int(size * height / short)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.resize((width, height), spec.filter)
        return image.crop((left, top, left + size, top + size))
    return (
        image if image.size == (size, size) else image.resize((size,) * 2, spec.filter)
    )


def _squared(image: Image.Image, spec: ImageSpec) -> Image.Image:
    """`image` in the middle of a square of the mean colour."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    fill = tuple(int(255 * mean) for mean in spec.mean)
    square = Image.new("RGB", (side, side), fill)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square
