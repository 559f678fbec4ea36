"""How much each layer of a language model matters: scores over depth.

Gromov et al., arXiv:2403.17887 (angular distance); ShortGPT, arXiv:2403.03853 (Block
Influence); Visual Region, arXiv:2412.12785 (multimodal Block Influence, parameter change).
Large is important: such layers are worth tuning, the others may be removed.

Letters: B batch, N samples, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from lmm_jax.data import pipeline
from lmm_jax.data.conversation import HUMAN
from lmm_jax.data.placement import SampleSpec
from lmm_jax.data.sources import Record
from lmm_jax.experiment import Conversing, Experiment
from lmm_jax.models import lmm
from lmm_jax.nn import watch
from lmm_jax.partition import LAYERS, flatten

Array = jax.Array
Tree = Mapping[str, Any]
Program = Callable[[Any, Mapping[str, Array]], Any]


# --- From the residual stream ---------------------------------------------------------


@struct.dataclass
class Streams:
    """What samples show of the residual stream, before the last norm.

    Attributes:
        cosine: f32 [N, L, 2], means over image and over text tokens of the cosine between
            what enters and what leaves a layer; NaN where there is no such token.
        share: f32 [N, L, 2], of these tokens among all.
        ends: f32 [N, L + 1, L + 1], cosines at the last prompt token between the streams
            that enter the layers, and the one that leaves the last.
    """

    cosine: Array
    share: Array
    ends: Array


def streams(model: lmm.LMM) -> Program:
    """(parameters, batch) to `Streams`, compiled at its first call."""

    @jax.jit
    def look(params, batch):
        out = model.apply({"params": params}, batch, watch=watch.change)
        return of_layers(out.watched)

    return look


def of_layers(seen: watch.Change) -> Streams:
    """What the changes of all layers, [L, B, ...], say together."""
    ends = jnp.concatenate([seen.entered, seen.left[-1:]]).swapaxes(0, 1)
    count = seen.count.swapaxes(0, 1)
    return Streams(
        seen.cosine.swapaxes(0, 1) / count,
        count / count.sum(axis=-1, keepdims=True),
        watch.cosine(ends[:, :, None], ends[:, None]),
    )


def bi(seen: Streams) -> np.ndarray:
    """Block Influence f64 [L]: 1 - the mean cosine over all tokens of a sample, then over
    samples."""
    cosine, share = np.float64(seen.cosine), np.float64(seen.share)
    return 1 - _mean(np.nansum(cosine * share, axis=-1))


def mbi(seen: Streams) -> np.ndarray:
    """Multimodal Block Influence f64 [L]: image and text count alike, however many their
    tokens are."""
    return 1 - _mean(seen.cosine).mean(axis=-1)


def angular(seen: Streams, block: int = 1) -> np.ndarray:
    """Angle in units of pi, f64 [L + 1 - block], by which `block` layers from each on turn
    the last prompt token.

    Raises:
        ValueError: no block of so many layers.
    """
    depth = seen.ends.shape[-1] - 1
    if not 1 <= block <= depth:
        raise ValueError(
            f"blocks of {block} layers: use 1..{depth}, the model's depth."
        )
    cosine = np.diagonal(np.float64(seen.ends), block, axis1=1, axis2=2)
    return _mean(np.arccos(np.clip(cosine, -1, 1)) / np.pi)


def attention(model: lmm.LMM) -> Program:
    """(parameters, batch) to f32 [B, L], `ImageAttention` of every layer."""
    look_at = watch.ImageAttention(model.spec.language.block)

    @jax.jit
    def look(params, batch):
        return model.apply({"params": params}, batch, watch=look_at).watched.T

    return look


def _mean(values: Array) -> np.ndarray:
    """f64 mean over samples, without those that have no value.

    Raises:
        ValueError: there is none.
    """
    found = np.asarray(values, np.float64)
    if np.isnan(found).all(axis=0).any():
        raise ValueError(
            "no sample has both an image and text after it, which this score compares: "
            "use data with images, or method=bi."
        )
    return np.nanmean(found, axis=0)


# --- From the parameters --------------------------------------------------------------


def parameter_change(tuned: Tree, base: Tree, over: str = "base") -> np.ndarray:
    """Sum over the kernels of a layer of |tuned - base| / |base|, Frobenius norms: f64 [L].

    Args:
        tuned, base: stacked parameters of the layers, adapters merged.
        over: whose norm divides; the authors' code takes that of "tuned".
    """

    def one(new, old):
        size = _norm({"base": old, "tuned": new}[over])
        return _norm(new - old) / (size + 1e-8)

    return _over_kernels(one, tuned, base)


def angular_param(tuned: Tree, base: Tree) -> np.ndarray:
    """Sum over the kernels of a layer of the angle between tuned and base, in units of pi:
    f64 [L]."""

    def one(new, old):
        # Not by the cosine, of which small angles leave nothing in float32 (Kahan).
        new, old = new * _norm(old), old * _norm(new)
        return 2 / jnp.pi * jnp.arctan2(_norm(new - old), _norm(new + old))

    return _over_kernels(one, tuned, base)


def _over_kernels(one: Callable, tuned: Tree, base: Tree) -> np.ndarray:
    tuned, base = flatten(tuned), flatten(base)
    kernels = [path for path in tuned if path.endswith("kernel")]
    total = 0.0
    for path in kernels:
        if tuned[path].shape != base[path].shape:
            raise ValueError(
                f"{path} has shape {tuned[path].shape} and {base[path].shape} in the base: "
                "give the model that this one was tuned from."
            )

        def layer(pair):  # one at a time: float32 of all would be twice the stack
            return one(*(x.astype(jnp.float32) for x in pair))

        both = tuned[path], base[path]
        total += np.float64(jax.jit(lambda both: jax.lax.map(layer, both))(both))
    return total


def _norm(x: Array) -> Array:
    return jnp.sqrt(jnp.sum(x * x))


# --- A model's scores -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Method:
    """A score.

    Attributes:
        score: what the program makes of samples to f64 [L], or (tuned, base) layers if
            there is no program.
        program: (model) to a program over batches of samples.
        blocks: whether `score` takes `block`, a number of layers.
    """

    score: Callable[..., np.ndarray]
    program: Callable[[lmm.LMM], Program] | None = None
    blocks: bool = False


METHODS = {
    "bi": Method(bi, streams),
    "mbi": Method(mbi, streams),
    "angular_hidden": Method(angular, streams, blocks=True),
    "image_attention": Method(_mean, attention),
    "parameter_change": Method(parameter_change),
    "angular_param": Method(angular_param),
}


def scored(exp: Experiment) -> Conversing:
    """The experiment with its parameters as they are, not rounded.

    Raises:
        ValueError: it has no language model.
    """
    if not isinstance(exp, Conversing):
        raise ValueError(f"{exp.called} is an encoder: scores are of language models.")
    told = dataclasses.replace(exp.config.eval, weights="float")
    return dataclasses.replace(exp, config=dataclasses.replace(exp.config, eval=told))


def base_of(exp: Conversing, named: str) -> str:
    """Run or hub folder that a model was tuned from, "" if the config names none."""
    return named or exp.config.init.run or exp.config.init.load


def scores(
    exp: Conversing,
    model: lmm.LMM,
    params: Tree,
    name: str,
    *,
    samples: int,
    base: Tree | None = None,
    block: int = 1,
) -> np.ndarray:
    """f64 [L], or [L + 1 - block] of blocks: how much the layers matter.

    Args:
        exp: whose data is sampled.
        model, params: what is scored; parameters of layers stacked.
        name: of `METHODS`.
        samples: how many at most; the first in the order of training, each up to its
            first question.
        base: parameters that `params` were tuned from, if the method compares the two.

    Raises:
        ValueError: no such method, nothing to compare with, or no score of blocks.
    """
    if name not in METHODS:
        raise ValueError(f"method={name!r}: use one of {', '.join(METHODS)}.")
    method = METHODS[name]
    if block != 1 and not method.blocks:
        able = ", ".join(name for name, found in METHODS.items() if found.blocks)
        raise ValueError(f"{name} scores single layers; blocks: {able}.")
    if method.program is None:
        if base is None:
            raise ValueError(f"{name} compares with the base: give --base=RUN.")
        return method.score(*(p["language"]["stack"][LAYERS] for p in (params, base)))
    seen = observed(exp, model, params, method.program(model), samples)
    return method.score(seen, block=block) if method.blocks else method.score(seen)


def observed(
    exp: Conversing, model: lmm.LMM, params: Tree, program: Program, samples: int
) -> Any:
    """What a program says of `samples` samples: its arrays [N, ...], on every host."""
    data = dataclasses.replace(
        exp.config.data,
        batch_size=exp.config.eval.batch_size,
        pack=1,
        group="none",
        workers=0,
    )
    source = pipeline.open_sources(data)
    samples = min(samples, len(source))
    asked, own = _Asked(exp.samples(model.plan)), exp.axes.own_rows(data.batch_size)
    batches = pipeline.train_batches(source, asked, data, own=own)
    found = []
    for _ in range(-(-samples // data.batch_size)):
        seen = program(params, exp.place(next(batches)))
        found.append(exp.axes.read({"seen": seen})["seen"])
    batches.close()
    return jax.tree.map(lambda *x: np.concatenate(x)[:samples], *found)


@dataclasses.dataclass(frozen=True)
class _Asked:
    """Records as prompts: up to the first question."""

    samples: SampleSpec

    def sample(self, record: Record, *, index: int, position: int) -> dict[str, Any]:
        asks = (i for i, turn in enumerate(record.turns) if turn["from"] in HUMAN)
        turns = record.turns[: next(asks, 0) + 1]
        asked = dataclasses.replace(record, turns=turns)
        return self.samples.prompt(asked, index=index)
