"""LoRA as an option of any config: what is adapted, what learns, and merging.

Adapters exist in training and in its checkpoints only. Whatever runs, is exported or is
trained on has them merged, so that no other code knows of them.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp

from lmm_jax import partition, region
from lmm_jax.models import lmm
from lmm_jax.models.specs import LMMSpec
from lmm_jax.nn.lora import Lora

Array = jax.Array

LEARNS = r"language/.*/lora_[ab]"  # pattern of all that LoRA adds
_A, _B = "lora_a", "lora_b"


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adaptation of the language model; learns beside `train.learn`.

    Attributes:
        rank: 0 turns it off.
        alpha, dropout: see `lmm_jax.nn.lora.Lora`.
        targets: patterns (`lmm_jax.partition`) of projections in blocks of the language
            model, such as "language/.*/(q|v)"; by default all of them, but not its head.
        layers: of the language model that get adapters, ascending; () is all.
    """

    rank: int = 0
    alpha: float = 256.0
    dropout: float = 0.05
    targets: tuple[str, ...] = ("language",)
    layers: tuple[int, ...] = ()

    def __post_init__(self):
        if self.rank < 0 or not 0 <= self.dropout < 1:
            raise ValueError(
                f"lora.rank={self.rank} must be at least 0 (0 turns LoRA off) and "
                f"lora.dropout={self.dropout} in [0, 1)"
            )

    def applied(self, spec: LMMSpec) -> LMMSpec:
        """The same model with adapters, or itself where LoRA is off.

        Raises:
            ValueError: a target that matches no projection, or layers that are not there.
        """
        if not self.rank:
            return spec
        at, end = "language/stack/layers/", "/kernel"
        paths = [
            row.path.removesuffix(end)
            for row in lmm.params(spec)
            if row.path.startswith(at) and row.path.endswith(end)
        ]
        names = {
            path.removeprefix(at)
            for target in self.targets
            for path in partition.require(target, paths)
        }
        language = spec.language
        layers = region.checked(self.layers, language.depth)
        layers = layers if 0 < len(layers) < language.depth else None
        named = tuple(sorted(names))
        lora = Lora(self.rank, self.alpha, self.dropout, named, layers)
        block = dataclasses.replace(language.block, lora=lora)
        language = dataclasses.replace(language, block=block)
        return dataclasses.replace(spec, language=language)


def merged(params: Mapping[str, Any], lora: Lora | None) -> dict[str, Any]:
    """Parameters of the plain model: every adapted kernel + alpha / rank * A B.

    Args:
        params: of an adapted model.
        lora: of its language model's block; None returns `params`.
    """
    if lora is None:
        return params
    flat = partition.flatten(params)
    for path in [path for path in flat if path.endswith(_A)]:
        kernel = path.replace(_A, "kernel")
        whole = flat[kernel]
        some = whole if lora.layers is None else whole[jnp.asarray(lora.layers)]
        layers = (some, flat.pop(path), flat.pop(path.replace(_A, _B)))
        # One layer after the other: a product of all of them is as large as the stack.
        new = jax.lax.map(lambda layer: _merged(*layer, lora.scale), layers)
        if lora.layers is not None:
            new = jnp.asarray(whole).at[jnp.asarray(lora.layers)].set(new)
        flat[kernel] = new
    return traverse_util.unflatten_dict(flat, sep="/")


def _merged(kernel: Array, a: Array, b: Array, scale: float) -> Array:
    rank = a.shape[-1]
    product = jnp.matmul(
        a.reshape(-1, rank), b.reshape(rank, -1), precision=jax.lax.Precision.HIGHEST
    )
    added = kernel.astype(jnp.float32) + scale * product.reshape(kernel.shape)
    return added.astype(kernel.dtype)
