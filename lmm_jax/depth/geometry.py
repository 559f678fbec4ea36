"""Static sizes of a model and of its prompt: all that a strategy may know."""

from __future__ import annotations

import dataclasses
from typing import Literal

from lmm_jax.depth.layout import Layout


@dataclasses.dataclass(frozen=True)
class StackGeometry:
    """Sizes of a stack of equal transformer blocks.

    Attributes:
        depth: layers.
        width: residual stream.
        heads, kv_heads, head_dim: attention.
        hidden: MLP width.
        gated: three MLP matrices instead of two.
        causal: tokens see only earlier positions.
        parallel: attention and MLP read the same input, so nothing lies between them.
        cross: tokens are of two streams, text and image, and between the two there is an
            attention to the other one. In a layer text comes first; the image then reads
            what has become of it ("sequential") or what it was ("parallel").
    """

    depth: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    gated: bool
    causal: bool
    parallel: bool = False
    cross: Literal["sequential", "parallel"] | None = None


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Static sizes handed to strategies.

    Attributes:
        vision, language: the two stacks.
        vision_layers: vision layers that run; features are taken after the last of them.
        class_token: whether the vision stack carries a [CLS] token.
        patches: of one view; where images keep their own shape, the most there can be.
        fixed_grid: rows and columns of patches in every view; None if images keep theirs.
        patch: values of one patch: pixels, colours and frames.
        connector: entries of the connector's matrices, each used once per token.
        images: image slots per example.
        crops: hi-res views per image (crops or tiles), beside the view of the whole.
        prefix, suffix: text slots before and after the visual span.
        vocab: rows of the embedding.
        pinpoints: grids of tiles (columns, rows), of which an any-resolution image has
            one; empty if images have another form.
        train: which of two plans is asked for, where learning and running differ.
        merge: patches a side that the connector makes one token of.
        passes: images of `patches` that the vision layers read for one view.
        fine: every view comes again as fine x fine views of the same area; 0: it does not.
        image_class: a [CLS] token of the image leads the visual span.
        text: the text's own tower, before the language stack; None without one.
        rows: sequences of an example, such as each of its images with the text.
        head: entries of the matrices of one prediction; None: of the next token.
        dtype, param_dtype: of computation and of parameters, for ops that learn.
    """

    vision: StackGeometry
    language: StackGeometry
    vision_layers: int
    class_token: bool
    patches: int
    fixed_grid: tuple[int, int] | None
    patch: int
    connector: int
    images: int
    crops: int
    prefix: int
    suffix: int
    vocab: int
    pinpoints: tuple[tuple[int, int], ...] = ()
    train: bool = False
    merge: int = 1
    passes: int = 1
    fine: int = 0
    image_class: bool = False
    text: StackGeometry | None = None
    rows: int = 1
    head: int | None = None
    dtype: str = "float32"
    param_dtype: str = "float32"

    @property
    def views(self) -> int:
        """Views of an image: the whole, its crops or tiles, and the fine ones of each."""
        return (1 + self.crops) * (1 + self.fine**2)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches in every view.

        Raises:
            ValueError: they differ from image to image.
        """
        if self.fixed_grid is None:
            raise ValueError(
                "this strategy needs views of one shape, and this model's images keep "
                "their own: choose another strategy, or a vision tower of fixed size."
            )
        return self.fixed_grid

    @property
    def visual_tokens(self) -> int:
        """Visual tokens per image without any strategy."""
        return self.patches // self.merge**2 + self.image_class

    @property
    def tiled_tokens(self) -> int:
        """Tokens that an any-resolution image may have: the patches of the whole view, then
        those of the tiles, with a newline after each of their rows; 0 without tiles."""
        if not self.pinpoints:
            return 0
        down, across = self.grid
        tiles = (
            rows * down * (columns * across + 1) for columns, rows in self.pinpoints
        )
        return self.patches + max(tiles)

    def layout(self, visual_per_image: int) -> Layout:
        """Storage order at the entrance of the language stack."""
        return Layout.of(
            {
                "prefix": self.prefix,
                "visual": self.images * visual_per_image,
                "suffix": self.suffix,
            }
        )
