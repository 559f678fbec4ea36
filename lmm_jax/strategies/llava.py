"""LLaVA-1.5: all visual tokens, in every layer. The baseline without any edit.

Liu et al., "Improved Baselines with Visual Instruction Tuning", arXiv:2310.03744.
"""

from __future__ import annotations

from lmm_jax.depth import Edit, Geometry


def edits(geometry: Geometry) -> tuple[Edit, ...]:
    """No edits: the projected view of the whole image enters the language stack."""
    return ()
