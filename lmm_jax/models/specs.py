"""Named sizes of vision encoders and language models: those that are published, and tiny
ones for tests, timings and the quickstart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
from typing import Literal

from lmm_jax.depth import Edit, Geometry
from lmm_jax.nn.block import BlockSpec
from lmm_jax.nn.rope import RopeSpec

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class VisionSpec:
    """A vision transformer.

    Attributes:
        image: pixels a side of one view, or of the image that the table of positions
            was made for where images keep their own size.
        patch: pixels a side of one patch.
        block: its block (bidirectional, LayerNorm).
        depth: layers.
        run: layers that run; features are the residual stream after the last of them
            (LLaVA reads CLIP one layer before its end, so 23 of 24).
        class_token: a [CLS] token in front, dropped from the features.
        pre_norm: a LayerNorm between embedding and layers (CLIP).
        patch_bias: bias in the patch embedding (SigLIP).
        post_norm: checkpoints hold a last LayerNorm; connectors read the residual stream
            before it, so there it is kept and never applied.
        mean, std: of pixels in 0..1, per channel.
        native: images keep their own size and shape, up to this many patches; 0: every
            view is a square of `image` pixels.
        frames: of a video that one patch holds; a still image is all of them.
        merge: patches a side that the connector makes one token of.
        taps: layers after which features are read too, 0-based, in published order.
        scales: a view has the side of the last of these, and is read at all of them in
            tiles of `image` (S2); empty: at its own only.
        kind: model type on the hub whose keys its checkpoints have.
    """

    image: int
    patch: int
    block: BlockSpec
    depth: int
    run: int
    class_token: bool = True
    pre_norm: bool = True
    patch_bias: bool = False
    post_norm: bool = True
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    native: int = 0
    frames: int = 1
    merge: int = 1
    taps: tuple[int, ...] = ()
    scales: tuple[int, ...] = ()
    kind: str = "clip_vision_model"

    def read_at(self, state: int) -> VisionSpec:
        """The same tower, run up to hidden state `state` as the hub counts them: 0 is the
        embedding, -1 the last layer's output, -2 (LLaVA) that of the layer before.

        Raises:
            ValueError: there is no such layer.
        """
        run = state if state >= 0 else self.depth + 1 + state
        if not 0 < run <= self.depth:
            raise ValueError(
                f"vision layer {state}: the tower has {self.depth} layers; use 1 to "
                f"{self.depth}, or -1 to -{self.depth}."
            )
        return dataclasses.replace(self, run=run)

    @property
    def view(self) -> int:
        """Pixels a side of a view."""
        return self.scales[-1] if self.scales else self.image

    @property
    def passes(self) -> int:
        """Images that the layers read for one view."""
        return sum((side // self.image) ** 2 for side in self.scales) or 1

    @property
    def grid(self) -> tuple[int, int]:
        side = self.image // self.patch
        return side, side

    @property
    def patches(self) -> int:
        """Of one view; where images keep their own size, the most there can be."""
        return self.native or self.grid[0] * self.grid[1]

    @property
    def merged(self) -> int:
        """Joint width of the features, merged patches or scales, that the connector makes
        one token of."""
        return self.merge**2 * (len(self.scales) or 1) * self.block.width


@dataclasses.dataclass(frozen=True)
class LanguageSpec:
    """A decoder-only language model.

    Attributes:
        vocab: rows of the embedding and of the head.
        block: its block (causal, rotary).
        depth: layers.
        tied: the head is the embedding.
        head_bias: the head has a bias (Phi-2).
        kind: model type on the hub whose keys its checkpoints have.
        kept: of a pruned model, the numbers that its layers had before; () where none
            was removed.
        region: of a pruned model, numbers of layers that further pruning is to spare.
    """

    vocab: int
    block: BlockSpec
    depth: int
    tied: bool = False
    head_bias: bool = False
    kind: str = "llama"
    kept: tuple[int, ...] = ()
    region: tuple[int, ...] = ()

    @property
    def numbers(self) -> tuple[int, ...]:
        """What the layers are called: their indices, those before pruning if there was."""
        return self.kept or tuple(range(self.depth))

    def left(self, layers: Sequence[int], region: Sequence[int] = ()) -> LanguageSpec:
        """The same model with some of its layers.

        Args:
            layers: their indices, ascending; all of them are the model itself.
            region: see there.
        """
        if len(layers) == self.depth:
            return self
        kept = tuple(self.numbers[layer] for layer in layers)
        return dataclasses.replace(
            self, depth=len(kept), kept=kept, region=tuple(region)
        )

    @property
    def axes(self) -> int:
        """Rotary coordinates of a token; 0 where its position is the only one."""
        rope = self.block.rope
        return rope.axes.count if rope and rope.axes else 0


@dataclasses.dataclass(frozen=True)
class LMMSpec:
    """A LLaVA-shaped model: vision encoder, projector, language model.

    Attributes:
        remat, unroll: see `LayerStack`; they apply to both stacks.
        own: edits that belong to the model, each a hashable function of the geometry such
            as a strategy's `edits`; they come before those of a config.
        mode, crops, pinpoints, fine: images for which the model was trained, as an
            `ImageSpec` says it; "" leaves all of it to a config.
        kind: model type on the hub whose layout its checkpoints have.
    """

    vision: VisionSpec
    language: LanguageSpec
    remat: Literal["none", "full", "dots"] = "none"
    unroll: int = 1
    own: tuple[Callable[[Geometry], tuple[Edit, ...]], ...] = ()
    mode: str = ""
    crops: int = 0
    pinpoints: tuple[tuple[int, int], ...] = ()
    fine: int = 0
    kind: str = "llava"

    def replaced(
        self, *, dtype: str, param_dtype: str, remat: str, unroll: int
    ) -> LMMSpec:
        """The same sizes with other numerics and execution."""
        kinds = dict(dtype=dtype, param_dtype=param_dtype)
        parts = {
            name: dataclasses.replace(
                part, block=dataclasses.replace(part.block, **kinds)
            )
            for name, part in (("vision", self.vision), ("language", self.language))
        }
        return dataclasses.replace(self, **parts, remat=remat, unroll=unroll)


def vit_block(
    width: int, heads: int, hidden: int, activation: str, *, norm_eps: float = 1e-5
) -> BlockSpec:
    """A bidirectional LayerNorm block with biases everywhere."""
    return BlockSpec(
        width=width,
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        hidden=hidden,
        norm="layer",
        norm_eps=norm_eps,
        activation=activation,
        gated=False,
        bias="all",
        rope=None,
        causal=False,
    )


def llama_block(
    width: int, heads: int, hidden: int, *, kv_heads: int = 0, base: float = 10_000.0
) -> BlockSpec:
    """A causal RMSNorm block with SwiGLU, rotary embedding and no biases."""
    return BlockSpec(
        width=width,
        heads=heads,
        kv_heads=kv_heads or heads,
        head_dim=width // heads,
        hidden=hidden,
        rope=RopeSpec(base),
    )


def _qwen(width: int, heads: int, hidden: int, kv_heads: int, **own) -> BlockSpec:
    """Llama's block with Qwen's wavelengths and epsilon, and what a version adds."""
    block = llama_block(width, heads, hidden, kv_heads=kv_heads, base=1e6)
    return dataclasses.replace(block, norm_eps=1e-6, **own)


VISION = {
    "clip-l-336": VisionSpec(
        336, 14, vit_block(1024, 16, 4096, "quick_gelu"), depth=24, run=23
    ),
    "siglip-so400m-384": VisionSpec(
        384,
        14,
        vit_block(1152, 16, 4304, "gelu_tanh", norm_eps=1e-6),
        depth=27,
        run=26,
        class_token=False,
        pre_norm=False,
        patch_bias=True,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        kind="siglip_vision_model",
    ),
    "quickstart-vit": VisionSpec(
        32,
        8,
        vit_block(96, 4, 256, "gelu_tanh"),
        depth=3,
        run=3,
        class_token=False,
        post_norm=False,
        mean=(0.61, 0.60, 0.58),
        std=(0.25, 0.25, 0.25),
    ),
    "speed-vit": VisionSpec(
        336, 14, vit_block(32, 2, 64, "quick_gelu"), depth=1, run=1, post_norm=False
    ),
    "tiny-vit": VisionSpec(16, 4, vit_block(32, 2, 64, "quick_gelu"), depth=3, run=2),
}

PHI_2 = BlockSpec(
    width=2560,
    heads=32,
    kv_heads=32,
    head_dim=80,
    hidden=10_240,
    norm="layer",
    activation="gelu_tanh",
    gated=False,
    bias="all",
    rope=RopeSpec(fraction=0.4),
    parallel=True,
)
LANGUAGE = {
    "vicuna-7b": LanguageSpec(32_000, llama_block(4096, 32, 11_008), 32),
    "vicuna-13b": LanguageSpec(32_000, llama_block(5120, 40, 13_824), 40),
    "llama-3-8b": LanguageSpec(
        128_256, llama_block(4096, 32, 14_336, kv_heads=8, base=500_000.0), 32
    ),
    "phi-2": LanguageSpec(51_200, PHI_2, 32, head_bias=True, kind="phi"),
    "phi-3-mini": LanguageSpec(
        32_064,
        dataclasses.replace(llama_block(3072, 32, 8192), window=2047),
        32,
        kind="phi3",
    ),
    "qwen2-0.5b": LanguageSpec(
        151_936, _qwen(896, 14, 4864, 2, bias="qkv"), 24, tied=True, kind="qwen2"
    ),
    "qwen2-7b": LanguageSpec(
        152_064, _qwen(3584, 28, 18_944, 4, bias="qkv"), 28, kind="qwen2"
    ),
    "qwen3-8b": LanguageSpec(
        151_936, _qwen(4096, 32, 12_288, 8, qk_norm=True), 36, kind="qwen3"
    ),
    "quickstart-lm": LanguageSpec(512, llama_block(96, 4, 256), 6, tied=True),
    "region-lm": LanguageSpec(512, llama_block(96, 4, 256), 8, tied=True),
    "speed-region": LanguageSpec(2000, llama_block(1536, 12, 4096), 8),
    "speed-lm": LanguageSpec(2000, llama_block(512, 8, 1408), 18),
    "speed-phi": LanguageSpec(
        2000,
        dataclasses.replace(
            PHI_2, width=1024, heads=16, kv_heads=16, head_dim=64, hidden=4096
        ),
        14,
        head_bias=True,
    ),
    "tiny-lm": LanguageSpec(128, llama_block(48, 4, 96, kv_heads=2), 6),
}


def named(kind: str, name: str) -> VisionSpec | LanguageSpec:
    """Looks a spec up.

    Raises:
        ValueError: no such name; lists those that exist.
    """
    table = {"vision": VISION, "language": LANGUAGE}[kind]
    if name not in table:
        raise ValueError(
            f"model.{kind}={name!r} is not a named size; use one of "
            f"{', '.join(sorted(table))}, or add it to lmm_jax/models/specs.py."
        )
    return table[name]
