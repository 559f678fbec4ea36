"""FastV: drop the visual tokens that the prompt's last token ignores.

Chen et al., "An Image is Worth 1/2 Tokens After Layer 2", ECCV 2024, arXiv:2403.06764,
section 4.1. Training-free. The paper describes a mean over queries; its code, which this
follows, reads the last query alone, ranks once in prefill and keeps positions.

Letters: B batch, V visual tokens before the cut, T tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from lmm_jax.depth import (
    Context,
    Geometry,
    Keep,
    Observation,
    Reduce,
    TokenState,
    before,
)
from lmm_jax.ops.select import top_k_keep


def edits(
    geometry: Geometry,
    *,
    layer: int = 2,
    keep: int = 288,
    score: Literal["last", "mean"] = "last",
) -> tuple[Reduce, ...]:
    """Returns the single cut of FastV.

    Args:
        geometry: static sizes of the model and of its prompt.
        layer: first language layer that runs without the dropped tokens (the paper's K).
            Its attention is read one layer earlier, so it is >= 1.
        keep: visual tokens that stay, all images together; the paper's R is 1 - keep / V.
        score: attention of the "last" prompt token (the code), or the "mean" over all
            queries (the paper's text), which favours early tokens.

    Raises:
        ValueError: no layer before or after the cut, or an unknown score.
    """
    depth = geometry.language.depth
    if not 1 <= layer < depth:
        raise ValueError(
            f"fastv.layer={layer}: it needs a layer before it to read attention from and "
            f"one after it to speed up; use 1..{depth - 1}."
        )
    if score not in ("last", "mean"):
        raise ValueError(f"fastv.score={score!r}: use 'last' or 'mean'.")
    seen = f"{score}_attention"
    op = MostAttended(keep, seen)
    return (Reduce("fastv", before(layer), keep, op, observe=(seen,)),)


def lossless(geometry: Geometry, tokens: int) -> dict[str, int]:
    """Arguments at which FastV must do nothing, for `tokens` visual tokens in all."""
    return dict(layer=1, keep=tokens)


@dataclasses.dataclass(frozen=True)
class MostAttended:
    """Keeps the visual tokens that receive most attention.

    Attention is averaged over heads. Positions are not renumbered: a kept token keeps its
    place in the rotary embedding.
    """

    keep: int
    seen: str

    def __call__(self, state: TokenState, seen: Observation, ctx: Context) -> Keep:
        visual = state.layout.slice("visual")
        scores = getattr(seen, self.seen)[:, visual]  # [B, T] -> [B, V]
        return top_k_keep(scores, state.valid[:, visual], self.keep)
