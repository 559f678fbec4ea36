"""The tokens of the whole image stacked into language layers: ablations of DeepStack.

Meng et al., arXiv:2406.04334. They tell where tokens enter from what they are:

    repeated, Table 6 "Dummy"           deepstack_whole(groups=4)
    entering later, Figure 3a           deepstack_whole(start=N, inputs=False)
    the same, before the hi-res groups  ... and deepstack(start=N + 1)

Letters: B batch, I images, P patches of a view, D width, G groups.
"""

from __future__ import annotations

import dataclasses

import einops
import jax
import jax.numpy as jnp

from lmm_jax.depth import Connect, Geometry, Inject, Project, VisionFeatures

Array = jax.Array


def edits(
    geometry: Geometry, *, start: int = 1, groups: int = 1, inputs: bool = True
) -> tuple[Connect | Inject, ...]:
    """Returns an injection, and a connector that gives zeros if there are no `inputs`.

    Args:
        geometry: static sizes.
        start: language layer before which the tokens are added first.
        groups: in how many layers, one after the other; those behind the last do not
            count.
        inputs: whether the tokens enter the first layer as they would without stacking.

    Raises:
        ValueError: an impossible place.
    """
    if start < 0 or groups < 0:
        raise ValueError(
            f"deepstack_whole.start={start}, groups={groups}: use numbers from 0 on."
        )
    layers = tuple(range(start, min(start + groups, geometry.language.depth)))
    stack = Inject("deepstack_whole", layers, RepeatedView(len(layers)))
    silence = Connect("deepstack_whole_inputs", geometry.patches, _silence)
    return (*(() if inputs else (silence,)), *((stack,) if layers else ()))


def lossless(geometry: Geometry, tokens: int) -> dict[str, int]:
    """Arguments at which stacking must do nothing."""
    return dict(groups=0)


@dataclasses.dataclass(frozen=True)
class RepeatedView:
    """The tokens of the whole image, `groups` times."""

    groups: int

    def __call__(self, vision: VisionFeatures, project: Project) -> Array:
        """[G, B, I * P, D]."""
        tokens = project(vision.hidden[:, :, 0])
        tokens = einops.rearrange(tokens, "b i p d -> b (i p) d")
        return jnp.broadcast_to(tokens, (self.groups, *tokens.shape))


def _silence(vision: VisionFeatures, project: Project) -> Array:
    """[B, I, P, D], zeros."""
    return jnp.zeros_like(project(vision.hidden[:, :, 0]))
