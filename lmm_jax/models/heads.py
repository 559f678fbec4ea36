"""What encoders predict of an image and a text, and the sequence in which they read them.

Letters: B batch, I images of an example, T text tokens, V visual tokens, D width, P width
of the vector that stands for an image with its text.
"""

from __future__ import annotations

import dataclasses

import einops
from flax import linen as nn
import jax
import jax.numpy as jnp

from lmm_jax.depth import Layout, Role, TokenState
from lmm_jax.nn.linear import Linear
from lmm_jax.nn.norm import LayerNorm
from lmm_jax.nn.params import Param

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class HeadSpec:
    """A head.

    Attributes:
        task: what it was made for; names its published keys.
        outputs: classes; or 1, a score that ranks images and texts.
        hidden: width between its two products; 0 if there is one product.
        images: of an example, whose vectors are read side by side.
        match: two classes beside it say whether image and text belong together.
    """

    task: str
    outputs: int
    hidden: int = 0
    images: int = 1
    match: bool = False

    def weights(self, width: int) -> int:
        """Entries of its matrices, for vectors of P = `width`."""
        inputs, match = self.images * width, 2 * width * self.match
        if not self.hidden:
            return inputs * self.outputs + match
        return inputs * self.hidden + self.hidden * self.outputs + match


def head(task: str, width: int) -> HeadSpec:
    """The head of a task as it is published, in a model of that width.

    Raises:
        ValueError: no such task.
    """
    found = {
        "vqav2": HeadSpec(task, 3129, 2 * width),
        "nlvr2": HeadSpec(task, 2, 2 * width, images=2),
        "snli_ve": HeadSpec(task, 3, 2 * width),
        "flickr30k": HeadSpec(task, 1, match=True),
    }
    if task not in found:
        raise ValueError(f"task={task!r}: use one of {', '.join(found)}.")
    return found[task]


class Head(nn.Module):
    """Linear, LayerNorm, exact GELU, linear; or one linear.

    Attributes:
        width: P.
    """

    spec: HeadSpec
    width: int
    dtype: str
    param_dtype: str

    def setup(self):
        s, kinds = self.spec, (True, self.dtype, self.param_dtype)
        inputs, outputs = (s.images * self.width,), (s.outputs,)
        if s.hidden:
            self.first = Linear(inputs, (s.hidden,), *kinds)
            self.norm = LayerNorm(1e-5)
            self.second = Linear((s.hidden,), outputs, *kinds)
        else:
            self.rank = Linear(inputs, outputs, *kinds)
        if s.match:
            self.match = Linear(inputs, (2,), *kinds)

    def __call__(self, pooled: Array) -> dict[str, Array]:
        """f32 "logits" [B, outputs], and "match" [B, 2], of vectors [B * I, P]."""
        x = einops.rearrange(pooled, "(b i) p -> b (i p)", i=self.spec.images)
        if self.spec.hidden:
            y = self.norm(self.first(x))
            logits = self.second(nn.gelu(y, approximate=False))
        else:
            logits = self.rank(x)
        found = {"logits": logits.astype(jnp.float32)}
        if self.spec.match:
            found["match"] = self.match(x).astype(jnp.float32)
        return found


# What PuMer's authors call a classifier; `transformers` calls all of them "classifier".
CLASSIFIERS = {
    "vqav2": "vqa_classifier",
    "nlvr2": "nlvr2_classifier",
    "snli_ve": "ve_classifier",
}


def params(spec: HeadSpec | None, classifier: str = "") -> tuple[Param, ...]:
    """Rows of a head; none without one.

    Args:
        classifier: what a classifier is called; its task's name in `CLASSIFIERS` if "".
    """
    if spec is None:
        return ()
    rows = []
    if spec.hidden:
        name = classifier or CLASSIFIERS[spec.task]
        rows += _linear("first", "embed mlp", f"{name}.0")
        rows += [
            Param("norm/scale", "norm", f"{name}.1.weight", "norm"),
            Param("norm/bias", "norm", f"{name}.1.bias", "norm"),
        ]
        rows += _linear("second", "mlp classes", f"{name}.3")
    else:
        rows += _linear("rank", "embed classes", "rank_output")
    if spec.match:
        rows += _linear("match", "embed classes", "itm_score.fc")
    return tuple(rows)


def _linear(path: str, axes: str, key: str) -> list[Param]:
    into, out = axes.split()
    kernel = Param(f"{path}/kernel", axes, f"{key}.weight", f"{out} {into}")
    return [kernel, Param(f"{path}/bias", "norm", f"{key}.bias", "norm")]


def entrance(
    text: Array, visual: Array, valid: Array, shown: Array | None = None
) -> TokenState:
    """A text, as the span "prefix", and an image, as "visual", before the first layer.

    Args:
        text: [B, T, D].
        visual: [B, V, D], [CLS] first.
        valid: bool [B, T].
        shown: bool [B, V]; None if all of the image is there.
    """
    words, pixels = text.shape[1], visual.shape[1]
    if shown is None:
        shown = jnp.ones(visual.shape[:2], bool)
    hidden = jnp.concatenate([text, visual], axis=1)
    shape = hidden.shape[:2]
    zero, place = jnp.zeros(shape, jnp.int32), jnp.arange(words + pixels)
    role = jnp.where(place < words, Role.USER, Role.VISUAL).astype(jnp.int8)
    return TokenState(
        hidden=hidden,
        positions=jnp.broadcast_to(place, shape),
        valid=jnp.concatenate([valid, shown], axis=1),
        segment=zero,
        role=jnp.broadcast_to(role, shape),
        turn=zero,
        size=jnp.ones(shape, jnp.float32),
        layout=Layout.of({"prefix": words, "visual": pixels, "suffix": 0}),
    )
